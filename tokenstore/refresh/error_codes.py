"""The error codes of a provider's answer, wherever the answer has them, and what the codes of RFC 6749 mean.

Providers put a code into an object, a list or another field than ``error``. Libraries return it in a dict, or raise an
exception that holds it.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Final

from tokenstore.errors import (
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
)

__all__ = ["INVALID_GRANT", "REFUSALS", "TRANSIENT", "error_codes", "error_for_codes", "exceptions_codes"]

INVALID_GRANT: Final = frozenset({"invalid_grant"})
"""The refresh token is no longer valid (RFC 6749 section 5.2)."""

REFUSALS: Final = frozenset(
    {"invalid_client", "invalid_request", "invalid_scope", "unauthorized_client", "unsupported_grant_type"}
)
"""Errors of the token endpoint that an operator has to fix (RFC 6749 section 5.2)."""

TRANSIENT: Final = frozenset({"server_error", "temporarily_unavailable"})
"""Errors that pass (RFC 6749 section 4.1.2.1)."""

# The fields of an answer that may hold a code, or an object or list that holds one.
_FIELDS: Final = (
    *("error", "errors", "error_code", "errorCode", "error_type", "errorType", "errcode", "err_code"),
    *("code", "status", "reason"),
)
_MAX_VALUES: Final = 200  # an answer is not trusted to be short


def error_codes(answer: object) -> list[str]:
    """The texts and whole numbers of an answer that may be error codes, the most likely ones first.

    Args:
        answer: The parsed answer: a mapping, a list of errors, or anything else, which has none.
    """
    if isinstance(answer, Mapping):
        values = deque(answer.get(name) for name in _FIELDS)
    else:
        values = deque(answer[:_MAX_VALUES] if isinstance(answer, list) else ())
    codes: list[str] = []
    for _ in range(_MAX_VALUES):
        if not values:
            break
        value = values.popleft()
        if isinstance(value, Mapping):
            values.extend(value.values())
        elif isinstance(value, list):
            values.extend(value)
        elif isinstance(value, str):
            codes.append(value)
        elif isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**15:
            codes.append(str(value))
    return codes


def exceptions_codes(error: Exception) -> list[str]:
    """The codes of an exception that a library raised for an OAuth error.

    Authlib and oauthlib set ``error``; google-auth passes the answer as an argument; the errors of httpx, requests and
    httpx-oauth have a ``response``.
    """
    try:
        answers: list[object] = [{"error": getattr(error, "error", None)}]
        answers += [argument for argument in error.args if isinstance(argument, Mapping)]
        response = getattr(error, "response", None)
        read = getattr(response, "json", None)
        if callable(read) and not inspect.iscoroutinefunction(read) and getattr(response, "status_code", 0) >= 400:
            answers.append(read())
        return [code for answer in answers for code in error_codes(answer)]
    except Exception:  # noqa: BLE001 - an exception's own attributes may raise anything, and the body may be no JSON
        return []


def error_for_codes(codes: Iterable[str]) -> RefreshError | None:
    """The error for codes of RFC 6749; None if there is none among them. Only such a code is shown."""
    for code in codes:
        if code in INVALID_GRANT:
            return ReauthorizationRequiredError(f"the provider refuses the refresh token ({code})", code=code)
        if code in REFUSALS:
            return ProviderRefusedError(f"the provider refuses this client ({code})", code=code)
        if code in TRANSIENT:
            return ProviderUnavailableError(f"the provider is unavailable ({code})", code=code)
    return None
