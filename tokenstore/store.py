"""The store itself: what is sealed, what is opened, and when tokens count as valid."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from tokenstore.errors import (
    BackendError,
    ConfigurationError,
    InvalidInputError,
    StoreClosedError,
    TransactionRequiredError,
    UnsupportedOperationError,
)
from tokenstore.keyring import Keyring
from tokenstore.protocol import Backend, BackendTransaction, SupportsRowLocks
from tokenstore.records import (
    SealedRecord,
    SealedTokens,
    TokenEntry,
    TokenKey,
    TokenRecord,
    extra_json,
    from_epoch_us,
    optional_datetime,
    optional_epoch_us,
    seconds,
    token_key,
    token_text,
)
from tokenstore.registry import backend_for_engine, backend_for_session, backend_for_url

if TYPE_CHECKING:
    # For annotations alone: the core imports no database package.
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

__all__ = ["AuthTokenStore", "Transaction", "open_store"]

T = TypeVar("T")
Clock = Callable[[], float]
_US = 1_000_000


class _Rows(Protocol):
    async def get(self, keys: Sequence[TokenKey]) -> list[SealedRecord | None]: ...
    async def put(self, entries: Mapping[TokenKey, SealedTokens]) -> None: ...
    async def delete(self, key: TokenKey) -> bool: ...


class _TokenOperations(ABC):
    """What a store and its transactions have in common."""

    _keyring: Keyring
    _clock: Clock

    @abstractmethod
    def _rows(self) -> _Rows:
        """Where to read and write, or StoreClosedError."""

    @abstractmethod
    async def _lock(self, key: TokenKey) -> SealedRecord | None:
        """Lock and read a row, where that makes sense."""

    async def store_tokens(
        self,
        provider: str,
        user_id: str,
        access_token: str,
        refresh_token: str | None,
        access_token_expires_at: datetime | None,
        refresh_token_expires_at: datetime | None = None,
        *,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Insert or replace the tokens of one user at one provider, atomically.

        What is passed is what is stored: nothing of an earlier row is kept. Tokens and ``extra`` are encrypted first.

        Args:
            provider: The provider's name: 1 to 128 UTF-8 bytes, no NUL. Compared byte for byte.
            user_id: The user's id: 1 to 512 UTF-8 bytes, no NUL. Compared byte for byte.
            access_token: At most 256 KiB.
            refresh_token: At most 256 KiB; None where none was issued (RFC 6749 section 5.1 makes it optional).
            access_token_expires_at: When the access token expires; a naive datetime is UTC; None means never.
            refresh_token_expires_at: Likewise for the refresh token.
            extra: Further fields of the token response (``scope``, ``token_type``, ``id_token`` …): JSON values,
                at most 256 KiB as JSON.

        Raises:
            InvalidInputError: An argument is not acceptable; nothing was written.
            LockTimeoutError: Somebody held the row's lock for too long; nothing was written.
            BackendError: The database refused or failed.
        """
        key = token_key(provider, user_id)
        access_token = token_text("access_token", access_token)
        if refresh_token is not None:
            refresh_token = token_text("refresh_token", refresh_token)
        expires_at = optional_epoch_us("access_token_expires_at", access_token_expires_at)
        refresh_expires_at = optional_epoch_us("refresh_token_expires_at", refresh_token_expires_at)
        sealed = self._seal(key, access_token, refresh_token, extra_json(extra), expires_at, refresh_expires_at)
        await self._rows().put({key: sealed})

    async def load_tokens(self, provider: str, user_id: str, for_update: bool = False) -> TokenRecord | None:
        """Read the tokens of one user at one provider.

        Args:
            provider: The provider's name.
            user_id: The user's id.
            for_update: Also take the row's lock, until the transaction ends: a second caller waits, then reads what
                the first one stored. Needs ``store.transaction()`` or a borrowed session.

        Returns:
            A dict (its ``repr`` shows no token; see :class:`~tokenstore.TokenRecord` for its keys), or None where
            there is no row.

        Raises:
            InvalidInputError: An argument is not acceptable.
            TransactionRequiredError: ``for_update=True`` outside a transaction.
            LockTimeoutError: The lock was not free within ``lock_timeout``.
            UnknownKeyError: The row was sealed with a key that is not in the keyring.
            TamperedError: The row was altered outside the store.
            BackendError: The database refused or failed.
        """
        key = token_key(provider, user_id)
        if for_update:
            row = await self._lock(key)
        else:
            (row,) = await self._rows().get([key])
        return None if row is None else self._open(row)

    async def delete_tokens(self, provider: str, user_id: str) -> bool:
        """Delete the tokens of one user at one provider.

        Returns:
            Whether there were any.

        Raises:
            InvalidInputError: An argument is not acceptable.
            BackendError: The database refused or failed.
        """
        return await self._rows().delete(token_key(provider, user_id))

    def is_access_token_valid(self, token_record: Mapping[str, Any], clock_skew_seconds: float = 60) -> bool:
        """Whether the access token can still be used: now + skew is before its expiry.

        Args:
            token_record: What ``load_tokens`` returned, or any mapping with ``access_token_expires_at``.
            clock_skew_seconds: How long before its expiry a token counts as expired, in seconds.

        Raises:
            InvalidInputError: The record lacks that key or holds no datetime there, or the skew is negative.
        """
        skew = seconds("clock_skew_seconds", clock_skew_seconds)
        expires_at = optional_epoch_us("access_token_expires_at", _field(token_record, "access_token_expires_at"))
        return expires_at is None or self._clock() + skew < expires_at / _US

    def is_refresh_token_valid(self, token_record: Mapping[str, Any]) -> bool:
        """Whether there is a refresh token that has not expired. One without an expiry does not expire.

        Args:
            token_record: What ``load_tokens`` returned, or any mapping with ``refresh_token`` and
                ``refresh_token_expires_at``.

        Raises:
            InvalidInputError: The record lacks one of the two, or holds no datetime.
        """
        if _field(token_record, "refresh_token") is None:
            return False
        expires_at = optional_epoch_us("refresh_token_expires_at", _field(token_record, "refresh_token_expires_at"))
        return expires_at is None or self._clock() < expires_at / _US

    def needs_reseal(self, token_record: Mapping[str, Any]) -> bool:
        """Whether a record, or an entry of ``list_tokens``, was sealed with another key than the one that seals now."""
        return bool(_field(token_record, "key_id") != self._keyring.primary)

    def _seal(
        self,
        key: TokenKey,
        access_token: str,
        refresh_token: str | None,
        extra: str | None,
        access_token_expires_at: int | None,
        refresh_token_expires_at: int | None,
    ) -> SealedTokens:
        seal = self._keyring.seal
        return SealedTokens(
            access_token=seal(key, "access_token", access_token),
            refresh_token=None if refresh_token is None else seal(key, "refresh_token", refresh_token),
            extra=None if extra is None else seal(key, "extra", extra),
            access_token_expires_at=access_token_expires_at,
            refresh_token_expires_at=refresh_token_expires_at,
            key_id=self._keyring.primary,
        )

    def _open(self, row: SealedRecord) -> TokenRecord:
        key, tokens = row.key, row.tokens
        access_token = self._keyring.open(key, "access_token", tokens.access_token)
        refresh_token = extra = None
        if tokens.refresh_token is not None:
            refresh_token = self._keyring.open(key, "refresh_token", tokens.refresh_token)
        if tokens.extra is not None:
            extra = self._keyring.open(key, "extra", tokens.extra)
        return TokenRecord(
            provider=key.provider,
            user_id=key.user_id,
            access_token=access_token,
            refresh_token=refresh_token,
            access_token_expires_at=optional_datetime(tokens.access_token_expires_at),
            refresh_token_expires_at=optional_datetime(tokens.refresh_token_expires_at),
            extra={} if extra is None else json.loads(extra),
            generation=row.generation,
            key_id=tokens.key_id,
            created_at=from_epoch_us(row.created_at),
            updated_at=from_epoch_us(row.updated_at),
        )


class _UntilFailure:
    """A transaction's rows, until a call fails: databases disagree on what is left of the transaction then."""

    def __init__(self, rows: BackendTransaction) -> None:
        self._rows = rows
        self.failure: BackendError | None = None

    async def get(self, keys: Sequence[TokenKey]) -> list[SealedRecord | None]:
        return await self._note_failure(self._rows.get(keys))

    async def lock(self, key: TokenKey) -> SealedRecord | None:
        return await self._note_failure(self._rows.lock(key))

    async def put(self, entries: Mapping[TokenKey, SealedTokens]) -> None:
        await self._note_failure(self._rows.put(entries))

    async def delete(self, key: TokenKey) -> bool:
        return await self._note_failure(self._rows.delete(key))

    async def _note_failure(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except BackendError as failure:
            self.failure = failure
            raise


class Transaction(_TokenOperations):
    """One open transaction of a store: what ``async with store.transaction() as tx`` gives.

    It is an object, not a context variable, so that tasks started inside the block do not slip into it. After a
    :class:`BackendError` it can only be left: it is rolled back, and leaving it as if nothing had happened is an error.
    """

    def __init__(self, rows: BackendTransaction, keyring: Keyring, clock: Clock) -> None:
        self._open_rows: _UntilFailure | None = _UntilFailure(rows)
        self._keyring = keyring
        self._clock = clock

    def _rows(self) -> _UntilFailure:
        if self._open_rows is None:
            raise StoreClosedError("this transaction has ended; open another with `async with store.transaction()`")
        self._check()
        return self._open_rows

    def _check(self) -> None:
        if self._open_rows is not None and self._open_rows.failure is not None:
            raise StoreClosedError(
                "a call in this transaction failed, so it is rolled back; start again with a new one"
            )

    async def _lock(self, key: TokenKey) -> SealedRecord | None:
        return await self._rows().lock(key)

    def _end(self) -> None:
        self._open_rows = None


class AuthTokenStore(_TokenOperations):
    """The OAuth tokens that a server holds on behalf of its users, encrypted at rest.

    With a borrowed session the store takes part in the session's transaction and the caller commits; where a call of
    the store's own began the transaction, ``store_tokens`` commits it. A store over its own connections comes from
    :func:`open_store`.

    Args:
        db_session: A SQLAlchemy ``AsyncSession`` on PostgreSQL, MySQL/MariaDB or SQLite. It stays the caller's to
            close, and like any session serves one task at a time.
        backend: Instead of a session: a backend, which the store closes.
        keyring: The keys; default: :meth:`Keyring.from_env`.
        clock: Seconds since the epoch; the validity checks read it. Default: :func:`time.time`.
        options: With a session: ``table``, ``schema``, ``lock_timeout``.

    Raises:
        ConfigurationError: Neither or both of session and backend, an unknown option, or no keys.
    """

    def __init__(
        self,
        db_session: AsyncSession | None = None,
        *,
        backend: Backend | None = None,
        keyring: Keyring | None = None,
        clock: Clock = time.time,
        **options: Any,
    ) -> None:
        if (db_session is None) == (backend is None):
            raise ConfigurationError("give either db_session or backend; open_store(url) makes a store by URL")
        if backend is None:
            backend = backend_for_session(db_session, options)
        elif options:
            raise ConfigurationError(f"{', '.join(sorted(options))}: options go to the backend when it is made")
        self._backend: Backend = backend
        self._keyring = Keyring.from_env() if keyring is None else keyring
        self._clock = clock
        self._closed = False

    def __repr__(self) -> str:
        return f"<AuthTokenStore on {self._backend!r}{' closed' if self._closed else ''}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close what the store opened: never a borrowed session or engine. Idempotent."""
        self._closed = True
        await self._backend.aclose()

    async def setup(self) -> None:
        """Create the token table where it is missing; safe to run from many processes at once.

        Raises:
            ConfigurationError: A table of that name exists and is not a token table.
            BackendError: The database refused or failed.
        """
        await self._rows().setup()

    def transaction(self) -> AbstractAsyncContextManager[Transaction]:
        """One connection and one transaction: committed when the block ends, rolled back when it raises.

        Raises:
            UnsupportedOperationError: The backend has no row locks, or the store borrows a session, which is a
                transaction itself.
        """
        return self._transaction()

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Transaction]:
        backend = self._rows()
        if not isinstance(backend, SupportsRowLocks):
            raise UnsupportedOperationError(f"{backend!r} has no transactions")
        async with backend.transaction() as rows:
            transaction = Transaction(rows, self._keyring, self._clock)
            try:
                yield transaction
                transaction._check()
            finally:
                transaction._end()

    async def list_tokens(
        self, *, provider: str | None = None, user_id: str | None = None, page_size: int = 500
    ) -> AsyncIterator[TokenEntry]:
        """Iterate over rows by provider, by user or all, ordered by provider and user id; no token is read.

        Pages are read one after the other, each by one short query: no connection or snapshot is held in between, so
        rows that change meanwhile show up in their old or their new state.

        Args:
            provider: Only this provider's rows.
            user_id: Only this user's rows.
            page_size: Rows to a query.

        Raises:
            InvalidInputError: An argument is not acceptable.
            BackendError: The database refused or failed.
        """
        # An absent part is checked with a stand-in, so that both parts go through the one check.
        checked = token_key("-" if provider is None else provider, "-" if user_id is None else user_id)
        if isinstance(page_size, bool) or not isinstance(page_size, int) or page_size < 1:
            raise InvalidInputError("page_size must be a whole number of at least 1")
        after: TokenKey | None = None
        while True:
            page = await self._rows().scan(
                provider=None if provider is None else checked.provider,
                user_id=None if user_id is None else checked.user_id,
                after=after,
                limit=page_size,
            )
            for row in page:
                yield TokenEntry(
                    provider=row.key.provider,
                    user_id=row.key.user_id,
                    access_token_expires_at=optional_datetime(row.access_token_expires_at),
                    refresh_token_expires_at=optional_datetime(row.refresh_token_expires_at),
                    has_refresh_token=row.has_refresh_token,
                    generation=row.generation,
                    key_id=row.key_id,
                    created_at=from_epoch_us(row.created_at),
                    updated_at=from_epoch_us(row.updated_at),
                )
            if len(page) < page_size:
                return
            after = page[-1].key

    async def reseal_tokens(self, provider: str, user_id: str) -> bool:
        """Seal a row's values anew with the keyring's first key, if another one sealed them.

        The tokens, times and generation stay; a newer write, or a refresh in progress, is never disturbed.

        Returns:
            Whether the row was resealed; False where there is none, it needed nothing, or a newer write won.

        Raises:
            InvalidInputError: An argument is not acceptable.
            SealingError: The row does not open with the keyring.
            BackendError: The database refused or failed.
        """
        key = token_key(provider, user_id)
        (row,) = await self._rows().get([key])
        if row is None or row.tokens.key_id == self._keyring.primary:
            return False
        record = self._open(row)
        sealed = self._seal(
            key,
            record["access_token"],
            record["refresh_token"],
            extra_json(record["extra"]),
            row.tokens.access_token_expires_at,
            row.tokens.refresh_token_expires_at,
        )
        return await self._rows().rewrap(key, sealed, generation=row.generation)

    def _rows(self) -> Backend:
        if self._closed:
            raise StoreClosedError("this store is closed")
        return self._backend

    async def _lock(self, key: TokenKey) -> SealedRecord | None:
        backend = self._rows()
        if isinstance(backend, BackendTransaction):
            return await backend.lock(key)  # a borrowed session is a transaction already
        if not isinstance(backend, SupportsRowLocks):
            raise UnsupportedOperationError(f"{backend!r} has no row locks, so for_update=True cannot be served")
        raise TransactionRequiredError(
            "load_tokens(for_update=True) needs a transaction to hold the lock: "
            "`async with store.transaction() as tx: record = await tx.load_tokens(…, for_update=True)`"
        )


def open_store(
    target: str | AsyncEngine | Backend,
    *,
    keyring: Keyring | None = None,
    clock: Clock = time.time,
    **options: Any,
) -> AuthTokenStore:
    """Make a store over connections of its own. Nothing is connected before the first call.

    Args:
        target: A URL (``sqlite:///tokens.db``, ``postgresql://…``, ``mysql://…``, ``memory://``), a SQLAlchemy
            ``AsyncEngine`` (which stays the caller's to dispose of), or a backend.
        keyring: The keys; default: :meth:`Keyring.from_env`.
        clock: Seconds since the epoch; the validity checks read it. Default: :func:`time.time`.
        options: The backend's options, which a URL's query can hold too: ``table``, ``schema``, ``lock_timeout``,
            ``pool_size`` … An unknown one is an error that lists the known ones.

    Returns:
        A store; close it with ``aclose()`` or use it in ``async with``.

    Raises:
        ConfigurationError: The URL, an option or the keys are not acceptable, or a driver is missing.
    """
    # Keys first: a store that could not seal must not have opened anything.
    keyring = Keyring.from_env() if keyring is None else keyring
    if isinstance(target, str):
        backend = backend_for_url(target, options)
    elif isinstance(target, Backend):
        if options:
            raise ConfigurationError(f"{', '.join(sorted(options))}: options go to the backend when it is made")
        backend = target
    else:
        backend = backend_for_engine(target, options)
    return AuthTokenStore(backend=backend, keyring=keyring, clock=clock)


def _field(record: object, name: str) -> Any:
    if not isinstance(record, Mapping):
        raise InvalidInputError(f"token_record must be a record from load_tokens, not {type(record).__name__}")
    if name not in record:
        raise InvalidInputError(f"token_record has no {name!r}; pass what load_tokens returned")
    return record[name]
