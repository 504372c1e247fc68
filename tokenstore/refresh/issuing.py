"""Refreshers whose provider issues tokens without a refresh token, such as those of machines (RFC 6749 section 4.4).

Any refresher with the attribute ``issues = True`` is one. Its provider can issue tokens at any time, so a row that is
missing gets tokens as well as one whose token has expired, and no failure of such a row is permanent.

If it also has a method ``subject_of``, it exchanges the token of another row, the *subject* (RFC 8693).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Protocol, runtime_checkable

from tokenstore.errors import ConfigurationError, TokenStoreError
from tokenstore.health import REFUSED
from tokenstore.records import Failure, TokenKey, TokenRecord, from_epoch_us
from tokenstore.refresh.failures import RefresherFailure
from tokenstore.tracebacks import described, module_of
from tokenstore.validation import RequestedRow, token_key

__all__ = ["SupportsSubject", "blank_record", "issues_tokens", "subject_of", "without_end"]

# Seconds until tokens are requested again that the provider has refused.
_RETRY: Final = 60.0


@runtime_checkable
class SupportsSubject(Protocol):
    """A refresher that exchanges the token of another row. It is called with both records."""

    def subject_of(self, key: TokenKey, /) -> TokenKey:
        """The row whose access token is exchanged for the tokens of this row."""
        ...


def issues_tokens(refresher: object) -> bool:
    """Whether a refresher gets tokens without a refresh token."""
    return getattr(refresher, "issues", False) is True


def subject_of(refresher: object, key: TokenKey) -> TokenKey | None:
    """The row whose token a refresher exchanges for the tokens of a row; None if it exchanges none.

    Raises:
        ConfigurationError: The refresher names no other row.
    """
    if not isinstance(refresher, SupportsSubject):
        return None
    subject = None
    try:
        subject = token_key(*refresher.subject_of(key))
        problem = f"{key}: this row is its own subject" if subject == key else ""
    except TokenStoreError as error:
        problem = f"{key}: the refresher's subject_of names no row: {error}"
    except Exception as error:  # noqa: BLE001 - as any exception of a refresher
        problem = f"{key}: the refresher's subject_of raised {described(error, module_of(refresher))}"
    if problem:
        raise ConfigurationError(problem)
    return subject


def blank_record(key: TokenKey, row: RequestedRow) -> TokenRecord:
    """The record that a refresher gets for an empty row: one without tokens."""
    return TokenRecord(
        provider=key.provider,
        user_id=key.user_id,
        account=key.account,
        access_token="",
        refresh_token=None,
        access_token_expires_at=None,
        refresh_token_expires_at=None,
        access_token_expiry_known=False,
        extra={},
        metadata={},
        generation=row.generation,
        key_id="",
        metadata_key_id=None,
        created_at=from_epoch_us(row.created_at),
        updated_at=from_epoch_us(row.updated_at),
    )


def without_end(failed: RefresherFailure) -> RefresherFailure:
    """The same failure, so that it ends: no login could, as there is no refresh token that a login would replace."""
    if failed.failure.retry_in is not None:
        return failed
    code = failed.failure.code[: 64 - len(REFUSED)]
    return replace(failed, failure=Failure(REFUSED + code, _RETRY))
