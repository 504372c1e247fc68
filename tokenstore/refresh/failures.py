"""What a refresher's exception means: the failure that is stored with the row, and the error that callers get.

A *refresher* is the callable that calls the provider. Its exceptions are not trusted: their text may contain a token.
"""

from __future__ import annotations

import math
import random
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from tokenstore.errors import (
    InvalidInputError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
    TokensNotStoredError,
    TokenStoreError,
)
from tokenstore.records import Failure, TokenKey, TokenRecord

__all__ = [
    "BRIEF_FAILURE",
    "OUTCOME_OF_ERROR",
    "RefresherFailure",
    "error_for",
    "failure_of",
    "leak_free",
    "not_revoked",
    "not_stored",
]

# Seconds until the provider is called again, if it named no time.
_RETRY_UNAVAILABLE, _RETRY_REFUSED = 5.0, 60.0
# A provider's retry time is cut to this, in seconds.
_LONGEST_RETRY = 3600.0
# Errors of the token endpoint that an operator has to fix (RFC 6749 section 5.2).
_REFUSALS: Final = frozenset(
    {"invalid_client", "invalid_request", "invalid_scope", "unauthorized_client", "unsupported_grant_type"}
)
_CODE: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}", re.ASCII)
_UNREADABLE_CODE: Final = "unreadable_code"

BRIEF_FAILURE: Final = Failure("refresh_failed", _RETRY_UNAVAILABLE)
"""The failure of a refresher that was interrupted, as by KeyboardInterrupt."""

OUTCOME_OF_ERROR: Final[Mapping[type[RefreshError], str]] = {
    ReauthorizationRequiredError: "reauthorization_required",
    ProviderRefusedError: "provider_refused",
    ProviderUnavailableError: "provider_unavailable",
}
"""The outcome in logs and metrics (:data:`tokenstore.refresh.telemetry.OUTCOMES`) for each error of callers."""


@dataclass(frozen=True, slots=True)
class RefresherFailure:
    """What a refresher's exception means.

    Attributes:
        failure: What is stored with the row.
        cause: The exception, to be chained, or None if it may contain a token.
        refused: Whether the provider refuses this client. Callers in other processes only have the failure's code.
    """

    failure: Failure
    cause: Exception | None = None
    refused: bool = False


def failure_of(error: BaseException, record: TokenRecord) -> RefresherFailure:
    """Classify what a refresher raised.

    Args:
        error: The exception. A ``CancelledError`` is the refresher's own, such as that of a task that it awaited.
        record: The record that the refresher was called with.
    """
    if not isinstance(error, Exception):
        return RefresherFailure(Failure("refresh_failed", _retry_in(None, _RETRY_UNAVAILABLE)))
    cause = leak_free(error, record)
    if isinstance(error, ReauthorizationRequiredError):
        return RefresherFailure(Failure(_code_of(error, record), None), cause)
    if isinstance(error, ProviderUnavailableError):
        retry_in = _retry_in(error.retry_after, _RETRY_UNAVAILABLE)
        return RefresherFailure(Failure(_code_of(error, record), retry_in), cause)
    if isinstance(error, ProviderRefusedError):
        retry_in = _retry_in(error.retry_after, _RETRY_REFUSED)
        return RefresherFailure(Failure(_code_of(error, record), retry_in), cause, refused=True)
    code = {TimeoutError: "timeout", InvalidInputError: "invalid_response"}.get(type(error), "refresh_failed")
    return RefresherFailure(Failure(code, _retry_in(None, _RETRY_UNAVAILABLE)), cause)


def error_for(
    key: TokenKey, failure: Failure, cause: Exception | None = None, *, refused: bool = False
) -> RefreshError:
    """The error that callers get for a failure.

    Args:
        key: The row.
        failure: The failure, from this process's refresher or as it was read from the row.
        cause: The refresher's exception, if it was raised in this process and contains no token.
        refused: Whether this process's refresher raised ``ProviderRefusedError``.
    """
    code, retry_in = failure.code, failure.retry_in
    error: RefreshError
    if retry_in is None:
        error = ReauthorizationRequiredError(
            f"{key}: there is no usable refresh token ({code}); the user has to log in again", code=code
        )
    elif code in _REFUSALS or refused:
        error = ProviderRefusedError(
            f"{key}: the provider refuses this client ({code}): check its registration; "
            f"the provider is not called again for {retry_in:.0f} s",
            code=code,
            retry_after=retry_in,
        )
    else:
        error = ProviderUnavailableError(
            f"{key}: the provider was unreachable, or sent no readable response ({code}); "
            f"the provider is not called again for {retry_in:.0f} s",
            code=code,
            retry_after=retry_in,
        )
    error.provider, error.user_id = key
    error.__cause__ = cause
    return error


def not_stored(key: TokenKey, record: TokenRecord) -> TokensNotStoredError:
    """The error for new tokens that could not be written."""
    error = TokensNotStoredError(
        f"{key}: the provider issued new tokens, which could not be stored; `record` is the only copy",
        records=[record],
    )
    error.provider, error.user_id = key
    return error


def not_revoked(key: TokenKey, error: Exception, record: TokenRecord) -> TokenStoreError:
    """The error that callers of ``revoke_tokens`` get: one of this library's errors, without a token.

    Args:
        key: The row.
        error: What the refresher's ``revoke`` raised.
        record: The record that ``revoke`` was called with.
    """
    cause = leak_free(error, record)
    failed: TokenStoreError
    if isinstance(cause, TokenStoreError):
        failed = cause
    elif isinstance(error, TimeoutError):
        failed = ProviderUnavailableError(f"{key}: the provider did not answer in time", code="timeout")
    else:
        failed = ProviderUnavailableError(
            f"{key}: the tokens could not be revoked ({type(error).__name__}); they are still stored",
            code="revocation_failed",
        )
        failed.__cause__ = cause
    if isinstance(failed, RefreshError):
        failed.provider, failed.user_id = key
    return failed


def leak_free(error: Exception, record: TokenRecord) -> Exception | None:
    """The exception, if it can be chained: neither it nor an exception that it chains contains a token of the record.

    None if one of them does, or cannot be formatted.
    """
    chain: list[BaseException] = [error]
    try:
        for link in chain:  # the loop appends to this list
            following = (link.__cause__, link.__context__, *getattr(link, "exceptions", ()))
            chain += [one for one in following if one is not None and all(one is not known for known in chain)]
        texts = [[*traceback.format_exception(one, chain=False), repr((one.args, one.__dict__))] for one in chain]
    except Exception:  # noqa: BLE001 - an exception's own `__repr__` or `__str__` may raise anything
        return None
    return None if any(_has_token(text, record) for some in texts for text in some) else error


def _has_token(text: str, record: TokenRecord) -> bool:
    """Whether a text contains a token of the record: unchanged, as `repr` writes it, or percent-encoded as in a URL."""
    tokens = [token for token in (record["access_token"], record["refresh_token"]) if token]
    return any(form in text for token in tokens for form in (token, repr(token)[1:-1], quote(token, safe="")))


def _code_of(error: RefreshError, record: TokenRecord) -> str:
    """The error's code, if it is fit for a column, a message and a log."""
    code: object = error.code
    if _has_token(str(code), record) or not isinstance(code, str) or not _CODE.fullmatch(code):
        return _UNREADABLE_CODE
    return str(code)


def _retry_in(requested: object, otherwise: float) -> float:
    """Seconds until the provider is called again: as it requested, or else about ``otherwise``."""
    if isinstance(requested, int | float) and not math.isnan(requested):
        return float(min(max(requested, 0.0), _LONGEST_RETRY))
    return otherwise * random.uniform(0.8, 1.2)  # noqa: S311 - spreads a fleet's calls; no secret depends on it
