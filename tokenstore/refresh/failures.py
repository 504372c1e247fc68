"""What a refresher's exception means: the failure that is stored with the row, and the error that callers get.

A *refresher* is the callable that calls the provider. Its exceptions are not trusted: their text, their attributes and
the local variables of their tracebacks may contain old or new tokens and the client's secret, in any encoding. So no
error of callers chains one or quotes it. It says the exception's type and where it was raised; the callback
``on_error`` gets the exception itself.
"""

from __future__ import annotations

import math
import random
import re
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
    TokensMissingError,
    TokensNotStoredError,
    TokenStoreError,
    UnsupportedOperationError,
)
from tokenstore.health import REFUSED
from tokenstore.records import Failure, TokenKey, TokenRecord
from tokenstore.refresh.error_codes import error_for_codes, exceptions_codes
from tokenstore.tracebacks import described, is_own, module_of

__all__ = [
    "BRIEF_FAILURE",
    "OUTCOME_OF_ERROR",
    "RefresherFailure",
    "error_for",
    "failure_of",
    "not_revoked",
    "not_stored",
    "tokens_missing",
]

# Seconds until the provider is called again, if it named no time.
_RETRY_UNAVAILABLE, _RETRYREFUSED = 5.0, 60.0
# A provider's retry time is cut to this, in seconds.
_LONGEST_RETRY = 3600.0
_CODE: Final = re.compile(r"[A-Za-z0-9_.:-]+", re.ASCII)
_LONGEST_CODE: Final = 64
# Of exceptions without a code of their own.
_CODE_OF_TYPE: Final[Mapping[type[BaseException], str]] = {
    TimeoutError: "timeout",
    InvalidInputError: "invalid_response",
}
# Codes of ``OAuth2Refresher`` that ask every user to wait, although the provider named no time.
_OVERLOADED: Final = frozenset({"http_429", "http_503"})
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
        raised: The exception's type and place, for the message of this process's callers.
        outage: Whether the provider is down, as far as one call can tell.
        requested: How long the provider asked not to be called by any user, in seconds; None: it did not ask.
    """

    failure: Failure
    raised: str | None = None
    outage: bool = True
    requested: float | None = None


def failure_of(error: BaseException, record: TokenRecord, refresher: object) -> RefresherFailure:
    """Classify what a refresher raised.

    Args:
        error: The exception. A ``CancelledError`` is the refresher's own, such as that of a task that it awaited.
        record: The record that the refresher was called with.
        refresher: The refresher.
    """
    raised = _without_text(error, refresher)
    if isinstance(error, Exception) and not isinstance(error, TokenStoreError):
        error = error_for_codes(exceptions_codes(error)) or error
    if isinstance(error, ReauthorizationRequiredError):
        return RefresherFailure(Failure(_code_of(error, record), None), raised, outage=False)
    if isinstance(error, ProviderUnavailableError):
        retry_in, code = _retry_in(error.retry_after, _RETRY_UNAVAILABLE), _code_of(error, record)
        asked = error.retry_after is not None or code in _OVERLOADED
        return RefresherFailure(Failure(code, retry_in), raised, requested=retry_in if asked else None)
    if isinstance(error, ProviderRefusedError):
        retry_in = _retry_in(error.retry_after, _RETRYREFUSED)
        code = _code_of(error, record, limit=_LONGEST_CODE - len(REFUSED))
        return RefresherFailure(Failure(REFUSED + code, retry_in), raised, outage=False)
    code = _CODE_OF_TYPE.get(type(error), "refresh_failed")
    return RefresherFailure(Failure(code, _retry_in(None, _RETRY_UNAVAILABLE)), raised)


def error_for(key: TokenKey, failure: Failure, raised: str | None = None) -> RefreshError:
    """The error that callers get for a failure.

    Args:
        key: The row.
        failure: The failure, from this process's refresher or as it was read from the row.
        raised: The type and place of the refresher's exception, if it was raised in this process.
    """
    refused = failure.code.startswith(REFUSED)
    code, retry_in = failure.code.removeprefix(REFUSED), failure.retry_in
    origin = "" if raised is None else f"; the refresher raised {raised}"
    error: RefreshError
    if retry_in is None:
        error = ReauthorizationRequiredError(
            f"{key}: there is no usable refresh token ({code}); the user has to log in again{origin}", code=code
        )
    elif refused:
        error = ProviderRefusedError(
            f"{key}: the provider refuses this client ({code}): check its registration; "
            f"the provider is not called again for {retry_in:.0f} s{origin}",
            code=code,
            retry_after=retry_in,
        )
    else:
        error = ProviderUnavailableError(
            f"{key}: the provider was unreachable, or sent no readable response ({code}); "
            f"the provider is not called again for {retry_in:.0f} s{origin}",
            code=code,
            retry_after=retry_in,
        )
    error.provider, error.user_id, error.account = key
    return error


def tokens_missing(key: TokenKey) -> TokensMissingError:
    """The error for a row that does not exist."""
    error = TokensMissingError(f"{key}: no tokens are stored; the user has to log in")
    error.provider, error.user_id, error.account = key
    return error


def not_stored(key: TokenKey, record: TokenRecord) -> TokensNotStoredError:
    """The error for new tokens that could not be written."""
    error = TokensNotStoredError(
        f"{key}: the provider issued new tokens, which could not be stored; `record` is the only copy",
        records=[record],
    )
    error.provider, error.user_id, error.account = key
    return error


def not_revoked(key: TokenKey, error: BaseException, record: TokenRecord, refresher: object) -> TokenStoreError:
    """The error that callers of ``revoke_tokens`` get.

    Args:
        key: The row.
        error: What the refresher's ``revoke`` raised.
        record: The record that ``revoke`` was called with.
        refresher: The refresher.
    """
    origin = f"they are still stored; the refresher raised {_without_text(error, refresher)}"
    failed: RefreshError
    if isinstance(error, UnsupportedOperationError):
        return UnsupportedOperationError(f"{key}: the refresher cannot revoke the tokens; {origin}")
    if isinstance(error, ReauthorizationRequiredError):
        code = _code_of(error, record)
        failed = ReauthorizationRequiredError(f"{key}: the provider knows no such tokens ({code}); {origin}", code=code)
    elif isinstance(error, ProviderRefusedError):
        code = _code_of(error, record)
        failed = ProviderRefusedError(
            f"{key}: the provider refuses to revoke the tokens ({code}); {origin}",
            code=code,
            retry_after=_given_retry(error.retry_after),
        )
    elif isinstance(error, ProviderUnavailableError):
        code = _code_of(error, record)
        failed = ProviderUnavailableError(
            f"{key}: the tokens could not be revoked ({code}); {origin}",
            code=code,
            retry_after=_given_retry(error.retry_after),
        )
    elif isinstance(error, TimeoutError):
        failed = ProviderUnavailableError(f"{key}: the provider did not answer in time; {origin}", code="timeout")
    else:
        failed = ProviderUnavailableError(f"{key}: the tokens could not be revoked; {origin}", code="revocation_failed")
    failed.provider, failed.user_id, failed.account = key
    return failed


def _without_text(error: BaseException, refresher: object) -> str:
    """What a message says of a refresher's exception. The text of this library's own errors contains no secret."""
    text = described(error, module_of(refresher))
    return f"{text}: {error}" if isinstance(error, TokenStoreError) and is_own(error) else text


def _has_token(text: str, record: TokenRecord) -> bool:
    """Whether a text contains a token of the record: unchanged, as `repr` writes it, or percent-encoded as in a URL."""
    tokens = [token for token in (record["access_token"], record["refresh_token"]) if token]
    return any(form in text for token in tokens for form in (token, repr(token)[1:-1], quote(token, safe="")))


def _code_of(error: RefreshError, record: TokenRecord, limit: int = _LONGEST_CODE) -> str:
    """The error's code, if it is fit for a column, a message and a log."""
    code: object = error.code
    if _has_token(str(code), record) or not isinstance(code, str) or not _CODE.fullmatch(code) or len(code) > limit:
        return _UNREADABLE_CODE
    return str(code)


def _given_retry(requested: object) -> float | None:
    """Seconds until the provider is called again, as it requested; None if it named no number."""
    if isinstance(requested, int | float) and not math.isnan(requested):
        return float(min(max(requested, 0.0), _LONGEST_RETRY))
    return None


def _retry_in(requested: object, otherwise: float) -> float:
    """Seconds until the provider is called again: as it requested, or else about ``otherwise``."""
    if (given := _given_retry(requested)) is not None:
        return given
    return otherwise * random.uniform(0.8, 1.2)  # noqa: S311 - spreads a fleet's calls; no secret depends on it
