"""The store itself: what is sealed, what is opened, and when tokens count as valid."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from datetime import datetime, timedelta
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, Unpack

from tokenstore.errors import (
    BackendError,
    ConfigurationError,
    ConflictError,
    InvalidInputError,
    LockTimeoutError,
    StoreClosedError,
    TransactionRequiredError,
    UnsupportedOperationError,
)
from tokenstore.keyring import Keyring
from tokenstore.listing import scan_rows
from tokenstore.options import StoreOptions, TableOptions, positive_int
from tokenstore.protocol import Backend, BackendTransaction, SupportsRowLocks
from tokenstore.records import (
    CLOCK_SKEW,
    SealedRecord,
    SealedTokens,
    TokenEntry,
    TokenKey,
    TokenRecord,
    from_epoch_us,
    is_leased,
    optional_datetime,
)
from tokenstore.registry import backend_for_engine, backend_for_session, backend_for_url
from tokenstore.results import RefreshResult
from tokenstore.sealing import open_record, seal_tokens
from tokenstore.validation import extra_json, optional_epoch_us, requested_row, seconds, token_key, token_text

if TYPE_CHECKING:
    # For annotations alone: the core imports no database package, and a store that refreshes nothing no engine.
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    from tokenstore.refresh.attempt import Refresh
    from tokenstore.refresh.engine import OnReauthorizationRequired, OnRefreshed, RefreshEngine, SupportsRevocation
    from tokenstore.refresh.protected_task import Protection

__all__ = ["AuthTokenStore", "Transaction", "open_store"]

T = TypeVar("T")
Clock = Callable[[], float]
_US = 1_000_000
# How long the end of an event loop waits for connections to be closed, in seconds.
_CLOSE_GRACE = 10.0


class _Rows(Protocol):
    async def get(self, key: TokenKey) -> SealedRecord | None: ...
    async def put(self, key: TokenKey, tokens: SealedTokens) -> None: ...
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
        sealed = seal_tokens(
            self._keyring,
            key,
            access_token=access_token,
            refresh_token=refresh_token,
            extra=extra_json(extra),
            access_token_expires_at=expires_at,
            refresh_token_expires_at=refresh_expires_at,
        )
        await self._rows().put(key, sealed)

    async def load_tokens(self, provider: str, user_id: str, for_update: bool = False) -> TokenRecord | None:
        """Read the tokens of one user at one provider.

        Args:
            provider: The provider's name.
            user_id: The user's id.
            for_update: Also take the row's lock, until the transaction ends: a second caller waits, then reads what
                the first one stored. Waits for a refresh of :meth:`AuthTokenStore.load_fresh_tokens`, too. Needs
                ``store.transaction()`` or a borrowed session.

        Returns:
            A dict (its ``repr`` shows no token; see :class:`~tokenstore.TokenRecord` for its keys), or None where
            there is no row.

        Raises:
            InvalidInputError: An argument is not acceptable.
            TransactionRequiredError: ``for_update=True`` outside a transaction.
            LockTimeoutError: The lock was not free within ``lock_timeout``.
            UnknownKeyError: The row was sealed with a key that is not in the keyring.
            TamperedError: The row was altered outside the store, or the database answered with another row.
            BackendError: The database refused or failed.
        """
        key = token_key(provider, user_id)
        if for_update:
            row = await self._lock(key)
        else:
            row = await self._rows().get(key)
        return None if row is None else open_record(self._keyring, key, row)

    async def delete_tokens(self, provider: str, user_id: str) -> bool:
        """Delete the tokens of one user at one provider.

        Returns:
            Whether there were any.

        Raises:
            InvalidInputError: An argument is not acceptable.
            BackendError: The database refused or failed.
        """
        return await self._rows().delete(token_key(provider, user_id))

    def is_access_token_valid(self, token_record: Mapping[str, Any], clock_skew_seconds: float = CLOCK_SKEW) -> bool:
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


class _UntilFailure:
    """A transaction's rows, until a call fails: databases disagree on what is left of the transaction then."""

    def __init__(self, rows: BackendTransaction, backend: Backend, lock_timeout: float) -> None:
        self._rows = rows
        self._backend = backend
        self._lock_timeout = lock_timeout
        self._begun = False
        self.failure: BackendError | None = None

    async def get(self, key: TokenKey) -> SealedRecord | None:
        return await self._note_failure(self._rows.get(key))

    async def lock(self, key: TokenKey) -> SealedRecord | None:
        return await self._note_failure(self._lock_unleased(key))

    async def put(self, key: TokenKey, tokens: SealedTokens) -> None:
        self._begun = True
        await self._note_failure(self._rows.put(key, tokens))

    async def delete(self, key: TokenKey) -> bool:
        self._begun = True
        return await self._note_failure(self._rows.delete(key))

    async def _lock_unleased(self, key: TokenKey) -> SealedRecord | None:
        """Lock a row that nobody is refreshing under a lease, whose holder needs the row's lock in order to end."""
        deadline = time.monotonic() + self._lock_timeout
        while True:
            if not self._begun:
                row = requested_row(key, await self._rows.lock(key))
                if not is_leased(row):
                    self._begun = True
                    return row
                await self._rows.rollback()
            else:
                # What the transaction has locked and written so far must not be given up, so look before locking.
                row = requested_row(key, await self._rows.get(key))
                if not is_leased(row):
                    row = requested_row(key, await self._rows.lock(key))
                    if is_leased(row):
                        raise ConflictError(f"{key}: a refresh began at this moment; repeat the transaction")
                    return row
            if time.monotonic() > deadline:
                raise LockTimeoutError(
                    f"{key}: a refresh held the row's lease for longer than {self._lock_timeout:g} s; repeat the call"
                )
            from tokenstore.refresh.attempt import pause

            await pause(self._backend, row)

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

    def __init__(self, rows: _UntilFailure, keyring: Keyring, clock: Clock) -> None:
        self._open_rows: _UntilFailure | None = rows
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
        refreshers: For each provider a callable that refreshes its tokens, for ``load_fresh_tokens``.
        refresh_margin: How long before its expiry a token is refreshed in the background, in seconds. Each row has a
            margin of its own below this one, so that tokens which were issued together are not refreshed together.
            At most 60, the clock skew: no token is refreshed while it is valid.
        refresh_timeout: The longest call of a provider, in seconds. A lease lasts 1.5 times as long, and so does the
            attempt to write new tokens before callers get an error; ``load_fresh_tokens`` waits 3 times as long.
        on_refreshed: Called with the new record, in the process that refreshed.
        on_reauthorization_required: Called with the error when a refresh finds that a refresh token is no longer good.
            Both may be coroutine functions; what they raise is logged.
        options: With a session: ``table``, ``schema``, ``lock_timeout``.

    Raises:
        ConfigurationError: Neither or both of session and backend, an unknown option, or no keys.
        InvalidInputError: A refresh setting is not acceptable.
    """

    def __init__(
        self,
        db_session: AsyncSession | None = None,
        *,
        backend: Backend | None = None,
        keyring: Keyring | None = None,
        clock: Clock = time.time,
        refreshers: Mapping[str, Refresh] | None = None,
        refresh_margin: float = 300.0,
        refresh_timeout: float = 20.0,
        on_refreshed: OnRefreshed | None = None,
        on_reauthorization_required: OnReauthorizationRequired | None = None,
        **options: Unpack[TableOptions],
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
        self._margin = seconds("refresh_margin", refresh_margin)
        self._timeout = seconds("refresh_timeout", refresh_timeout, positive=True)
        self._refreshers = refreshers or {}
        self._on_refreshed = on_refreshed
        self._on_reauthorization_required = on_reauthorization_required
        self._closed = False
        if refreshers:
            _ = self._engine  # it will be wanted: its modules are better loaded now than in the event loop

    def __repr__(self) -> str:
        return f"<AuthTokenStore on {self._backend!r}{' closed' if self._closed else ''}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Let refreshes end, then close what the store opened: never a borrowed session or engine. Idempotent.

        If the caller is cancelled, closing goes on without it, and the end of the event loop waits for that.

        Raises:
            TokensNotStoredError: A provider has issued new tokens that cannot be written; the error carries them.
        """
        # Here: to load asyncio takes most of the time of `import tokenstore`, and whoever awaits this has loaded it.
        import asyncio

        from tokenstore.refresh.protected_task import Protection

        self._closed = True
        protection = Protection()
        # New tokens may be on their way into the database, so this goes on although the caller is cancelled or the
        # event loop ends.
        try:
            await asyncio.shield(protection.start(self._close(protection)))
        except Exception:
            self._raise_unsaved()
            raise
        # Not in the task: if the caller is cancelled, the error of the task is lost. The next `aclose` raises this one.
        self._raise_unsaved()

    def _raise_unsaved(self) -> None:
        if "_engine" in vars(self):
            self._engine.raise_unsaved()

    async def _close(self, protection: Protection) -> None:
        try:
            if "_engine" in vars(self):
                await self._engine.aclose()
        finally:
            protection.guard(grace=_CLOSE_GRACE)
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
        backend, lockable = self._rows(), self._lockable
        if lockable is None:
            raise UnsupportedOperationError(f"{backend!r} has no transactions")
        async with lockable.transaction() as rows:
            guarded = _UntilFailure(rows, backend, lockable.lock_timeout)
            transaction = Transaction(guarded, self._keyring, self._clock)
            try:
                yield transaction
                transaction._check()
            finally:
                transaction._end()

    async def load_fresh_tokens(
        self,
        provider: str,
        user_id: str,
        *,
        refresh: Refresh | None = None,
        force: bool = False,
        generation: int | None = None,
    ) -> TokenRecord | None:
        """Read tokens whose access token is valid now, after a refresh at the provider if that is needed.

        Of all tasks, processes and machines that find an expired token, one calls the provider, holding no connection
        or lock meanwhile; the others wait and read what it stored. A token within ``refresh_margin`` of its expiry is
        returned at once, and refreshed in the background. A caller may be cancelled; its refresh goes on. The end of
        the event loop waits for a refresh that has called the provider. Validity is judged on the database's clock,
        with the skew of :meth:`is_access_token_valid`.

        Args:
            provider: The provider's name.
            user_id: The user's id.
            refresh: An async callable that gets the record, uses its ``refresh_token`` and returns the token response
                (RFC 6749 section 5.1) as a mapping: ``access_token``, ``expires_in`` (or ``expires_at``) and, where
                there are any, ``refresh_token`` and ``refresh_token_expires_in``; what else it holds goes to
                ``extra``. It raises :class:`ReauthorizationRequiredError`, :class:`ProviderUnavailableError` or
                :class:`ProviderRefusedError` to say what went wrong; anything else counts as unavailable. Callers of
                one process that wait for the same row share the first one's. Default: the provider's in
                ``refreshers``.
            force: Refresh although the token looks valid, as after a 401. Callers at the same time share one refresh.
            generation: With ``force``: the ``generation`` of the record that was refused. If the row has another one by
                now, that is returned as it is, however many callers come with the old one.

        Returns:
            As :meth:`load_tokens`; None where there is no row.

        Raises:
            ReauthorizationRequiredError: There is no refresh token that is still good; the user has to log in again.
            ProviderUnavailableError: The provider failed; ``retry_after`` says when it is asked again.
            ProviderRefusedError: The provider refuses this client.
            RefreshTimeoutError: Others kept the row's lease or lock for three times ``refresh_timeout``.
            TokensNotStoredError: New tokens could not be written for 1.5 times ``refresh_timeout``: it carries them.
            ConfigurationError: Nobody is there to refresh this provider's tokens.
            UnsupportedOperationError: The store borrows a session.
            InvalidInputError: An argument is not acceptable.
            SealingError: The row does not open with the keyring.
            BackendError: The database refused or failed.
        """
        key = token_key(provider, user_id)
        if generation is not None and (not force or isinstance(generation, bool) or not isinstance(generation, int)):
            raise InvalidInputError("generation is the `generation` of a record, and goes with force=True")
        return await self._refreshes().load(key, refresh, force=force, generation=generation)

    async def refresh_due(
        self,
        *,
        within: float | timedelta,
        provider: str | None = None,
        refresh: Refresh | None = None,
        concurrency: int = 8,
        page_size: int = 500,
    ) -> AsyncGenerator[RefreshResult, None]:
        """Refresh what expires soon, and iterate over what became of each row, in the order in which they end.

        Several machines may do so at once: a row that another one is refreshing is left to it. Rows without a refresh
        token are passed over. Ending the iteration early leaves begun refreshes to end by themselves.

        Args:
            within: Refresh tokens that expire within this time, in seconds or as a timedelta.
            provider: Only this provider's; default: all that have a refresher.
            refresh: As for :meth:`load_fresh_tokens`; goes with ``provider``.
            concurrency: The most refreshes at a time.
            page_size: Rows to a query.

        Raises:
            ConfigurationError: There is no refresher.
            UnsupportedOperationError: The store borrows a session.
            InvalidInputError: An argument is not acceptable.
            BackendError: The rows could not be listed; what happens to one row is in its result.
        """
        if isinstance(within, timedelta):
            within = within.total_seconds()
        results = self._refreshes().refresh_due(
            within=seconds("within", within),
            provider=None if provider is None else token_key(provider, "-").provider,
            refresh=refresh,
            concurrency=positive_int("concurrency", concurrency),
            page_size=positive_int("page_size", page_size),
        )
        async with aclosing(results):
            async for result in results:
                yield result

    async def revoke_tokens(self, provider: str, user_id: str, *, refresher: SupportsRevocation | None = None) -> bool:
        """Revoke a user's tokens at the provider (RFC 7009), then delete them. Nobody refreshes them meanwhile.

        Args:
            provider: The provider's name.
            user_id: The user's id.
            refresher: What has the method ``revoke``; default: the provider's in ``refreshers``.

        Returns:
            Whether there were any. Tokens that were stored while this went on, by a new login, stay.

        Raises:
            ProviderUnavailableError: The provider failed; nothing was deleted.
            ProviderRefusedError: The provider refuses this client; nothing was deleted.
            RefreshTimeoutError: Others kept refreshing the row.
            ConfigurationError: The refresher cannot revoke, or there is none.
            UnsupportedOperationError: The provider has no way to revoke, or the store borrows a session.
            InvalidInputError: An argument is not acceptable.
            SealingError: The row does not open with the keyring.
            BackendError: The database refused or failed.
        """
        return await self._refreshes().revoke(token_key(provider, user_id), refresher)

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
            TamperedError: The database answered with a row that was not asked for.
            BackendError: The database refused or failed.
        """
        # An absent part is checked with a stand-in, so that both parts go through the one check.
        checked = token_key("-" if provider is None else provider, "-" if user_id is None else user_id)
        page_size = positive_int("page_size", page_size)
        rows = scan_rows(
            self._rows(),
            provider=None if provider is None else checked.provider,
            user_id=None if user_id is None else checked.user_id,
            page_size=page_size,
        )
        async with aclosing(rows):
            async for row in rows:
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
        row = requested_row(key, await self._rows().get(key))
        if row is None or row.tokens.key_id == self._keyring.primary:
            return False
        record = open_record(self._keyring, key, row)
        sealed = seal_tokens(
            self._keyring,
            key,
            access_token=record["access_token"],
            refresh_token=record["refresh_token"],
            extra=extra_json(record["extra"]),
            access_token_expires_at=row.tokens.access_token_expires_at,
            refresh_token_expires_at=row.tokens.refresh_token_expires_at,
        )
        return await self._rows().rewrap(key, sealed, generation=row.generation)

    def _rows(self) -> Backend:
        if self._closed:
            raise StoreClosedError("this store is closed")
        return self._backend

    # What a backend can do is asked once: a look through a protocol takes as long as to open a row.

    @cached_property
    def _session(self) -> BackendTransaction | None:
        """The backend, if it is a borrowed session, which is a transaction already."""
        return self._backend if isinstance(self._backend, BackendTransaction) else None

    @cached_property
    def _lockable(self) -> SupportsRowLocks | None:
        """The backend, if it has row locks."""
        return self._backend if isinstance(self._backend, SupportsRowLocks) else None

    @cached_property
    def _engine(self) -> RefreshEngine:
        from tokenstore.refresh.attempt import Settings
        from tokenstore.refresh.engine import RefreshEngine
        from tokenstore.refresh.telemetry import Telemetry

        settings = Settings(self._backend, self._keyring, Telemetry(), margin=self._margin, timeout=self._timeout)
        return RefreshEngine(
            settings,
            refreshers=self._refreshers,
            on_refreshed=self._on_refreshed,
            on_reauthorization_required=self._on_reauthorization_required,
        )

    def _refreshes(self) -> RefreshEngine:
        self._rows()
        if self._session is not None:
            raise UnsupportedOperationError(
                "a refresh outlives its caller and needs connections of its own, so not a borrowed session: "
                "use a store on the session's engine, `open_store(engine)`, or on a URL"
            )
        return self._engine

    async def _lock(self, key: TokenKey) -> SealedRecord | None:
        backend = self._rows()
        if self._session is not None:
            return await self._session.lock(key)
        if self._lockable is None:
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
    refreshers: Mapping[str, Refresh] | None = None,
    refresh_margin: float = 300.0,
    refresh_timeout: float = 20.0,
    on_refreshed: OnRefreshed | None = None,
    on_reauthorization_required: OnReauthorizationRequired | None = None,
    **options: Unpack[StoreOptions],
) -> AuthTokenStore:
    """Make a store over connections of its own. Nothing is connected before the first call.

    Args:
        target: A URL (``sqlite:///tokens.db``, ``postgresql://…``, ``mysql://…``, ``memory://``), a SQLAlchemy
            ``AsyncEngine`` (which stays the caller's to dispose of), or a backend.
        keyring: The keys; default: :meth:`Keyring.from_env`.
        clock: Seconds since the epoch; the validity checks read it. Default: :func:`time.time`.
        refreshers: See :class:`AuthTokenStore`, as for the next four.
        refresh_margin: In seconds; default: 300.
        refresh_timeout: In seconds; default: 20.
        on_refreshed: Default: nobody is told.
        on_reauthorization_required: Likewise.
        options: The backend's options, which a URL's query can hold too: ``table``, ``schema``, ``lock_timeout``,
            ``pool_size`` … An unknown one is an error that lists the known ones. See ``docs/options.md``.

    Returns:
        A store; close it with ``aclose()`` or use it in ``async with``.

    Raises:
        ConfigurationError: The URL, an option or the keys are not acceptable, or a driver is missing.
        InvalidInputError: A refresh setting is not acceptable.
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
    return AuthTokenStore(
        backend=backend,
        keyring=keyring,
        clock=clock,
        refreshers=refreshers,
        refresh_margin=refresh_margin,
        refresh_timeout=refresh_timeout,
        on_refreshed=on_refreshed,
        on_reauthorization_required=on_reauthorization_required,
    )


def _field(record: object, name: str) -> Any:
    if not isinstance(record, Mapping):
        raise InvalidInputError(f"token_record must be a record from load_tokens, not {type(record).__name__}")
    if name not in record:
        raise InvalidInputError(f"token_record has no {name!r}; pass what load_tokens returned")
    return record[name]
