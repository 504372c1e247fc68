"""Refreshers whose provider issues tokens without a refresh token, such as those of machines (RFC 6749 section 4.4).

Any refresher with the attribute ``issues = True`` is one. Its provider can issue tokens at any time, so a row that is
missing gets tokens as well as one whose token has expired, and no failure of such a row is permanent.

If it also has a method ``subject_of``, it exchanges the token of another row, the *subject* (RFC 8693).

Any refresher may have a method ``prepare_refresh``, which reads values of the store before the row is claimed.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import replace
from typing import Any, Final, Protocol, runtime_checkable

from tokenstore.errors import ConfigurationError, TokenStoreError
from tokenstore.health import REFUSED
from tokenstore.records import Failure, TokenKey, TokenRecord, from_epoch_us
from tokenstore.refresh.failures import RefresherFailure
from tokenstore.tracebacks import described, module_of
from tokenstore.validation import RequestedRow, token_key

__all__ = [
    "SupportsPreparation",
    "SupportsSubject",
    "blank_record",
    "issues_tokens",
    "preparation_of",
    "subject_of",
    "without_end",
]

# Seconds until tokens are requested again that the provider has refused.
_RETRY: Final = 60.0


@runtime_checkable
class SupportsSubject(Protocol):
    """A refresher that exchanges the token of another row. It is called with both records."""

    def subject_of(self, key: TokenKey, /) -> TokenKey:
        """The row whose access token is exchanged for the tokens of this row."""
        ...


@runtime_checkable
class SupportsPreparation(Protocol):
    """A refresher that needs a value of the store, such as a key. Its last argument is what it has prepared."""

    def prepare_refresh(self, values: Any, key: TokenKey, /) -> Awaitable[object] | None:
        """Load what the refresh of a row needs. An error is the caller's, and no failure of the row.

        Args:
            values: The store's values: :class:`tokenstore.values.ValueOperations`.
            key: The row.

        Returns:
            What is awaited for the argument; None: nothing is needed, and there is no such argument.
        """
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


def preparation_of(refresher: object, values: object, key: TokenKey) -> Awaitable[object] | None:
    """What is awaited before the refresh of a row, if the refresher needs a value; its result is the last argument.

    Raises:
        ConfigurationError: The refresher raised an exception that is none of tokenstore's; so does the awaitable.
    """
    if not isinstance(refresher, SupportsPreparation):
        return None
    try:
        preparation = refresher.prepare_refresh(values, key)
    except Exception as error:  # noqa: BLE001 - as any exception of a refresher
        failure = _not_prepared(error, refresher, key)
    else:
        return None if preparation is None else _prepared(preparation, refresher, key)
    raise failure


async def _prepared(preparation: Awaitable[object], refresher: object, key: TokenKey) -> object:
    try:
        return await preparation
    except Exception as error:  # noqa: BLE001 - as any exception of a refresher
        failure = _not_prepared(error, refresher, key)
    raise failure  # outside the handler: otherwise its context could show a secret


def _not_prepared(error: Exception, refresher: object, key: TokenKey) -> TokenStoreError:
    if isinstance(error, TokenStoreError):
        return error
    return ConfigurationError(f"{key}: the refresher's prepare_refresh raised {described(error, module_of(refresher))}")


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
