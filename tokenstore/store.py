"""The store: the public methods, and the function that opens a store."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from datetime import timedelta
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, cast, overload

from tokenstore.errors import (
    ConfigurationError,
    InvalidInputError,
    StoreClosedError,
    TransactionRequiredError,
    UnsupportedOperationError,
)
from tokenstore.health import (
    REFUSED,
    STATUSES,
    RowFilter,
    Status,
    TokenEntry,
    TokenEntryWithMetadata,
    status_of,
)
from tokenstore.keyring import Keyring
from tokenstore.listing import RefusedRow, open_metadata, scan_rows, search_rows
from tokenstore.operations import Clock, TokenOperations
from tokenstore.options import StoreOptions, TableOptions, positive_int
from tokenstore.protocol import Backend, BorrowedSession, SupportsClock, SupportsMigrations, SupportsRowLocks
from tokenstore.records import (
    MigrationResult,
    RedactedDict,
    SealedRecord,
    TokenKey,
    TokenRecord,
    from_epoch_us,
    optional_datetime,
)
from tokenstore.registry import backend_for_engine, backend_for_session, backend_for_url
from tokenstore.results import RefreshResult
from tokenstore.sealing import Sealer
from tokenstore.tracebacks import ClearedContext, clears_locals
from tokenstore.transaction import RowsUntilFailure, Transaction
from tokenstore.validation import extra_json, metadata_json, namespace_text, requested_row, seconds, token_key
from tokenstore.values import StoredValues, ValueOperations

if TYPE_CHECKING:
    # For annotations only: the core imports no database package, and a store that never refreshes no refresh engine.
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    from tokenstore.logins import Login
    from tokenstore.refresh.attempt import Refresh
    from tokenstore.refresh.engine import OnError, OnReauthorizationRequired, OnRefreshed, RefreshEngine
    from tokenstore.refresh.protected_task import Protection
    from tokenstore.refresh.revoke import SupportsRevocation

__all__ = ["AuthTokenStore", "open_store"]

# The end of an event loop waits this long for connections to be closed, in seconds.
_CLOSE_GRACE = 10.0
# A search reads at least so many rows in each query: most of them may not be found.
_SEARCHED_ROWS = 5000


class AuthTokenStore(TokenOperations, ValueOperations):
    """The OAuth tokens that a server holds on behalf of its users, encrypted at rest.

    With a borrowed session the store takes part in the session's transaction, and the caller commits. If a call of the
    store began the transaction, ``store_tokens`` commits it. :func:`open_store` opens a store with its own connections.

    Args:
        db_session: A SQLAlchemy ``AsyncSession`` on PostgreSQL, MySQL/MariaDB or SQLite. The caller closes it. Like any
            session, it serves one task at a time.
        backend: Instead of a session: a backend. The store closes it.
        keyring: The keys; default: :meth:`Keyring.from_env`.
        namespace: The name of a deployment or tenant, at most 255 UTF-8 bytes, no NUL. It is bound to every value that
            the store seals: a value that was copied from a table of another namespace does not open. Default: the
            empty name.
        clock: Seconds since the epoch; the validity checks read it. Default: :func:`time.time`.
        refreshers: For each provider a refresher, the callable that refreshes its tokens, for ``load_fresh_tokens``.
        refresh_margin: How long before its expiry a token is refreshed in the background, in seconds. Each row has its
            own, shorter margin, so that tokens that were issued together are not refreshed together. With a value of up
            to 60, the clock skew, no token is refreshed while it is valid.
        refresh_timeout: The longest call of a provider, in seconds. A lease, a refresh's claim on a row, lasts 1.5
            times as long. The write of new tokens is tried for 1.5 times as long before callers get an error.
            ``load_fresh_tokens`` waits 3 times as long for other processes.
        provider_concurrency: The most calls of one provider at a time in this process; further refreshes wait.
        force_min_age: ``load_fresh_tokens(force=True)`` does not refresh a valid token that was stored less than so
            many seconds ago.
        on_refreshed: Called with the new record, in the process that refreshed.
        on_reauthorization_required: Called with the error if a refresh finds a refresh token that is not usable.
        on_recovered: Called with the new record, in the process that refreshed, if the refresh before it had failed.
        on_error: Called with a :class:`ProviderCallFailure` for each exception of a refresher, after the row is free
            for other callers. It has the exception itself, which the errors of callers only name. The four callbacks
            may be coroutine functions. Their exceptions are logged, and change nothing else.
        options: With a session: ``table``, ``schema``, ``lock_timeout``.

    Raises:
        ConfigurationError: Neither or both of session and backend, an unknown option, or no keys.
        InvalidInputError: The namespace or a refresh setting is not acceptable.
    """

    @clears_locals
    def __init__(
        self,
        db_session: AsyncSession | None = None,
        *,
        backend: Backend | None = None,
        keyring: Keyring | None = None,
        namespace: str = "",
        clock: Clock = time.time,
        refreshers: Mapping[str, Refresh] | None = None,
        refresh_margin: float = 300.0,
        refresh_timeout: float = 20.0,
        provider_concurrency: int = 32,
        force_min_age: float = 10.0,
        on_refreshed: OnRefreshed | None = None,
        on_reauthorization_required: OnReauthorizationRequired | None = None,
        on_recovered: OnRefreshed | None = None,
        on_error: OnError | None = None,
        **options: Unpack[TableOptions],
    ) -> None:
        if (db_session is None) == (backend is None):
            raise ConfigurationError("pass either db_session or backend; open_store(url) opens a store by URL")
        self._session: BorrowedSession | None = None
        if backend is None:
            backend = self._session = backend_for_session(db_session, options)
        elif options:
            raise ConfigurationError(f"{', '.join(sorted(options))}: pass options to the backend's constructor")
        self._backend: Backend = backend
        self._sealer = Sealer(Keyring.from_env() if keyring is None else keyring, namespace_text(namespace))
        self._clock = clock
        self._margin = seconds("refresh_margin", refresh_margin)
        self._timeout = seconds("refresh_timeout", refresh_timeout, positive=True)
        self._provider_concurrency = positive_int("provider_concurrency", provider_concurrency)
        self._force_min_age = seconds("force_min_age", force_min_age)
        self._refreshers: Mapping[str, Refresh] = refreshers or {}
        self._on_refreshed = on_refreshed
        self._on_reauthorization_required = on_reauthorization_required
        self._on_recovered = on_recovered
        self._on_error = on_error
        self._closed = False
        if refreshers:
            _ = self._engine  # imports the modules of the refresh now, and not in the event loop

    def __repr__(self) -> str:
        return f"<AuthTokenStore on {self._backend!r}{' closed' if self._closed else ''}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @clears_locals
    async def aclose(self) -> None:
        """Wait for refreshes to end, then close what the store opened, but no borrowed session or engine. Idempotent.

        If the caller is cancelled, the store is closed nevertheless, and the end of the event loop waits for that.

        Raises:
            TokensNotStoredError: A provider has issued new tokens that cannot be written; the error carries them.
        """
        # Imported here: asyncio makes up most of the time of `import tokenstore`, and the caller has imported it.
        import asyncio

        from tokenstore.refresh.protected_task import Protection

        self._closed = True
        protection = Protection()
        # In a protected task: new tokens may be in the course of being written, also if the caller is cancelled or the
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

    @clears_locals
    async def setup(self) -> None:
        """Create the token table, and the table of values, if they are missing; many processes may call this at once.

        Raises:
            ConfigurationError: A table of such a name exists and is another one.
            BackendError: The database refused or failed.
        """
        await self._rows().setup()

    @clears_locals
    async def migrate(self, *, dry_run: bool = False) -> MigrationResult:
        """Bring the tables of an older tokenstore to this one's version; many processes may call this at once.

        Programs of the version before go on meanwhile and afterwards. So migrate first, and then replace the programs.

        Args:
            dry_run: Whether to change nothing, and only to tell what there is to do.

        Raises:
            UnsupportedOperationError: The backend has nothing to migrate, or the store has a borrowed session.
            ConfigurationError: The tables are too new for this tokenstore.
            TableMissingError: There are no tables: use :meth:`setup`.
            LockTimeoutError: Another migration is under way, or a transaction has used a table for a minute. What was
                done before stays; call again.
            BackendError: The database refused or failed.
        """
        backend = self._rows()
        if not isinstance(backend, SupportsMigrations):
            raise UnsupportedOperationError(f"{backend!r} has no migrations; use open_store() with the database's URL")
        return await backend.migrate(dry_run=dry_run)

    def transaction(self) -> AbstractAsyncContextManager[Transaction]:
        """One connection and one transaction: committed when the block ends, rolled back when it raises.

        Raises:
            UnsupportedOperationError: The backend has no row locks, or the store has a borrowed session, whose
                transaction the application begins.
        """
        return ClearedContext(self._transaction())

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Transaction]:
        backend, lockable = self._rows(), self._lockable
        if lockable is None:
            raise UnsupportedOperationError(f"{backend!r} has no transactions")
        async with lockable.transaction() as rows:
            guarded = RowsUntilFailure(rows, backend, lockable.lock_timeout)
            transaction = Transaction(guarded, self._sealer, self._clock, self._refreshers)
            try:
                yield transaction
                transaction._check()
            finally:
                transaction._end()

    @overload
    async def load_fresh_tokens(
        self,
        provider: str,
        user_id: str,
        *,
        account: str = "",
        refresh: Refresh | None = None,
        force: bool = False,
        generation: int | None = None,
        force_min_age: float | None = None,
        min_ttl: float = 0.0,
        scopes: Collection[str] = (),
        missing: Literal["none"] = "none",
    ) -> TokenRecord | None: ...
    @overload
    async def load_fresh_tokens(
        self,
        provider: str,
        user_id: str,
        *,
        account: str = "",
        refresh: Refresh | None = None,
        force: bool = False,
        generation: int | None = None,
        force_min_age: float | None = None,
        min_ttl: float = 0.0,
        scopes: Collection[str] = (),
        missing: Literal["raise"],
    ) -> TokenRecord: ...
    @clears_locals
    async def load_fresh_tokens(
        self,
        provider: str,
        user_id: str,
        *,
        account: str = "",
        refresh: Refresh | None = None,
        force: bool = False,
        generation: int | None = None,
        force_min_age: float | None = None,
        min_ttl: float = 0.0,
        scopes: Collection[str] = (),
        missing: Literal["none", "raise"] = "none",
    ) -> TokenRecord | None:
        """Read tokens whose access token is valid now; if it has expired, refresh it at the provider first.

        Of all tasks, processes and machines that find an expired token, one calls the provider, and holds no connection
        or lock meanwhile; the others wait, then read what it stored. A token within ``refresh_margin`` of its expiry is
        returned at once, and refreshed in the background. If the caller is cancelled, its refresh goes on. The end of
        the event loop waits for a refresh that has called the provider. Validity is judged by the database's clock.
        As in :meth:`is_access_token_valid`, a token counts as expired 60 s early, but at most half of its lifetime.
        A token with an unknown expiry is valid until the refresher's ``max_lifetime``, if it has one, has passed.

        Args:
            provider: The provider's name.
            user_id: The user's id.
            account: Which of the user's accounts; default: the empty name, for a user who has one.
            refresh: A callable that gets the record, uses its ``refresh_token``, and returns the token response
                (RFC 6749 section 5.1) as a mapping: ``access_token``, ``expires_in`` (or ``expires_at``) and, if they
                were issued, ``refresh_token`` and ``refresh_token_expires_in``; ``docs/logins.md`` lists the other
                spellings. All other fields are stored in ``extra``. An ``async def`` function runs in the event loop, a
                plain one in a thread of its own, which goes on after ``refresh_timeout``. It raises
                :class:`ReauthorizationRequiredError`, :class:`ProviderUnavailableError` or
                :class:`ProviderRefusedError` to say what went wrong; any other exception counts as unavailable. If
                several callers in one process wait for the same row, the first one's callable is used. Default: the
                provider's entry in ``refreshers``.
            force: Refresh a token that looks valid, for example after a 401. Concurrent callers share one refresh. A
                provider that has refused the client is called again, although the row's retry time has not come, unless
                it refused less than ``force_min_age`` seconds ago.
            generation: With ``force``: the ``generation`` of the refused record, the number of one version of the row.
                If the row has another generation by now, it is returned without a refresh. So many callers with the
                same refused token cause one refresh.
            force_min_age: With ``force``: a token that was stored less than so many seconds ago is returned without a
                refresh, if it is valid. So an API that answers 401 to every token does not cause a refresh for each
                request. Default: the store's ``force_min_age``.
            min_ttl: How long the access token has to remain valid, in seconds, as for a job that takes that long. A
                token that would not is refreshed first. If the provider's tokens never live that long, half of their
                lifetime counts. Default: 0, beside the clock skew.
            scopes: Scopes that the token has to have (RFC 6749 section 3.3), several texts. They are compared with the
                response's ``scope``; if it has none, with the refresher's attribute ``scope``, which was requested; if
                there is none either, nothing is missing. Default: none.
            missing: What to do if there is no row: return None (``"none"``, the default), or ``"raise"``.

        Returns:
            As :meth:`load_tokens`; None if there is no row.

        Raises:
            TokensMissingError: With ``missing="raise"``: there is no row. Or the row whose token is exchanged for this
                row's is missing.
            InsufficientScopeError: With ``scopes``: the user has not granted all of them.
            ReauthorizationRequiredError: There is no usable refresh token; the user has to log in again.
            ProviderUnavailableError: The provider failed; ``retry_after`` says when it is called again.
            ProviderRefusedError: The provider refuses this client.
            RefreshTimeoutError: Another process held the row's lease or lock for three times ``refresh_timeout``, or no
                place among the provider's ``provider_concurrency`` calls became free in that time.
            TokensNotStoredError: New tokens could not be written for 1.5 times ``refresh_timeout``; it carries them.
            ConfigurationError: There is no refresher for this provider. A token that does not expire needs none.
            UnsupportedOperationError: The store has a borrowed session.
            InvalidInputError: An argument is not acceptable.
            SealingError: The row does not open with the keyring.
            BackendError: The database refused or failed.
        """
        key = token_key(provider, user_id, account)
        if generation is not None and (not force or isinstance(generation, bool) or not isinstance(generation, int)):
            raise InvalidInputError("generation must be the `generation` of a record, and needs force=True")
        if force_min_age is not None and not force:
            raise InvalidInputError("force_min_age needs force=True")
        if missing not in ("none", "raise"):
            raise InvalidInputError('missing must be "none" or "raise"')
        return await self._refreshes().load(
            key,
            refresh,
            force=force,
            generation=generation,
            min_ttl=seconds("min_ttl", min_ttl),
            force_min_age=self._force_min_age if force_min_age is None else seconds("force_min_age", force_min_age),
            scopes=scopes,
            raise_missing=missing == "raise",
        )

    @clears_locals
    async def refresh_due(
        self,
        *,
        within: float | timedelta,
        provider: str | None = None,
        refresh: Refresh | None = None,
        concurrency: int = 8,
        page_size: int = 500,
    ) -> AsyncGenerator[RefreshResult, None]:
        """Refresh tokens that expire soon, and iterate over the results in the order in which the refreshes end.

        Several machines may do this at once: a row that one machine is refreshing is skipped by the others. Rows
        without a refresh token are skipped. So are rows whose user has to log in again, as an earlier refresh has
        shown. The rows are read by an index, so the cost grows with the rows that are due and not with the table. If
        the iteration ends early, refreshes in progress go on.

        Args:
            within: Refresh tokens that expire within this time, in seconds or as a timedelta.
            provider: Only this provider's rows; default: those of all providers that have a refresher.
            refresh: As for :meth:`load_fresh_tokens`; needs ``provider``.
            concurrency: The most refreshes at a time.
            page_size: Rows in each query.

        Raises:
            ConfigurationError: There is no refresher.
            UnsupportedOperationError: The store has a borrowed session.
            InvalidInputError: An argument is not acceptable.
            BackendError: The rows could not be listed. An error of one row is in its result.
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

    @clears_locals
    async def revoke_tokens(
        self, provider: str, user_id: str, *, account: str = "", refresher: SupportsRevocation | None = None
    ) -> bool:
        """Revoke a user's tokens at the provider (RFC 7009), then delete them. No process refreshes them meanwhile.

        Args:
            provider: The provider's name.
            user_id: The user's id.
            account: Which of the user's accounts; default: the empty name, for a user who has one.
            refresher: An object with a method ``revoke``; default: the provider's entry in ``refreshers``.

        Returns:
            Whether there was a row. Tokens that a new login has stored meanwhile are not deleted.

        Raises:
            ProviderUnavailableError: The provider failed; nothing was deleted.
            ProviderRefusedError: The provider refuses this client; nothing was deleted.
            RefreshTimeoutError: Other refreshes kept the row's lease.
            ConfigurationError: The refresher cannot revoke, or there is none.
            UnsupportedOperationError: The provider has no revocation endpoint, or the store has a borrowed session.
            InvalidInputError: An argument is not acceptable.
            SealingError: The row does not open with the keyring.
            BackendError: The database refused or failed.
        """
        return await self._refreshes().revoke(token_key(provider, user_id, account), refresher)

    @overload
    def list_tokens(
        self,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        user_prefix: str | None = None,
        status: Status | None = None,
        expiring_within: float | timedelta | None = None,
        page_size: int = 500,
        with_metadata: Literal[False] = False,
    ) -> AsyncIterator[TokenEntry]: ...
    @overload
    def list_tokens(
        self,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        user_prefix: str | None = None,
        status: Status | None = None,
        expiring_within: float | timedelta | None = None,
        page_size: int = 500,
        with_metadata: Literal[True],
    ) -> AsyncIterator[TokenEntryWithMetadata]: ...
    @clears_locals
    async def list_tokens(
        self,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        user_prefix: str | None = None,
        status: Status | None = None,
        expiring_within: float | timedelta | None = None,
        page_size: int = 500,
        with_metadata: bool = False,
    ) -> AsyncIterator[TokenEntry]:
        """Iterate over all rows, or those that match all arguments, without tokens.

        The order is that of provider, user id and account, each compared as UTF-8 bytes. The queries of a page are
        short, and no connection or snapshot is held between two pages. So a row that changes meanwhile appears in its
        old or its new state.

        Args:
            provider: Only this provider's rows.
            user_id: Only this user's rows.
            user_prefix: Only rows whose user id begins with this text.
            status: Only rows with this :data:`~tokenstore.health.Status`, such as ``reauthorization_required``: the
                users who have to log in again.
            expiring_within: Only rows whose access token expires within this time, in seconds or as a timedelta, or has
                expired.
            page_size: Rows that each query returns. With one of the last three arguments: rows that it reads, at least
                5000.
            with_metadata: Also open each row's metadata: the key ``metadata`` of an entry. A row whose metadata does
                not open is left out. A page is in memory at once, so a smaller ``page_size`` is better if the metadata
                is large. Default: nothing that is sealed is read.

        Raises:
            InvalidInputError: An argument is not acceptable.
            TamperedError: Some rows have values that no store has written: raised at the end, after all other rows. Or
                the database answered with a row that was not requested: raised at once.
            UnknownKeyError: With ``with_metadata=True``: some rows' metadata was sealed with a key that is not in the
                keyring. Raised at the end, after all other rows, if it is the first row that was left out.
            BackendError: The database refused or failed.
        """
        # token_key checks all parts of a key, so a missing part is replaced by a valid one.
        checked = token_key("-" if provider is None else provider, "-" if user_id is None else user_id)
        provider = None if provider is None else checked.provider
        user_id = None if user_id is None else checked.user_id
        page_size = positive_int("page_size", page_size)
        if status is not None and status not in STATUSES:
            raise InvalidInputError(f"status must be one of {', '.join(sorted(STATUSES))}")
        if isinstance(expiring_within, timedelta):
            expiring_within = expiring_within.total_seconds()
        where = RowFilter(
            status,
            self._margin,
            None if expiring_within is None else seconds("expiring_within", expiring_within),
            None if user_prefix is None else token_key("-", user_prefix).user_id,
        )
        if where == RowFilter(margin=self._margin):
            rows = scan_rows(
                self._rows(), provider=provider, user_id=user_id, page_size=page_size, with_metadata=with_metadata
            )
        else:
            read = max(page_size, _SEARCHED_ROWS)
            rows = search_rows(
                self._rows(), where, provider=provider, user_id=user_id, page_size=read, with_metadata=with_metadata
            )
        first_refused: RefusedRow | None = None
        refused = 0
        metadata: dict[str, Any] = {}
        async with aclosing(rows):
            async for listed in rows:
                row = listed
                if with_metadata:
                    row, metadata = open_metadata(listed, self._sealer)
                if isinstance(row, RefusedRow):
                    first_refused = first_refused or row
                    refused += 1
                    continue
                entry = TokenEntry(
                    provider=row.key.provider,
                    user_id=row.key.user_id,
                    account=row.key.account,
                    access_token_expires_at=optional_datetime(row.access_token_expires_at),
                    refresh_token_expires_at=optional_datetime(row.refresh_token_expires_at),
                    access_token_expiry_known=row.access_token_expiry_known,
                    has_refresh_token=row.has_refresh_token,
                    generation=row.generation,
                    key_id=row.key_id,
                    metadata_key_id=row.metadata_key_id,
                    created_at=from_epoch_us(row.created_at),
                    updated_at=from_epoch_us(row.updated_at),
                    status=status_of(row, self._margin),
                    failure_code=None if row.failure_code is None else row.failure_code.removeprefix(REFUSED),
                    failed_at=optional_datetime(row.failed_at),
                    retry_at=optional_datetime(row.retry_at),
                )
                # Redacted, as metadata may be secret: a plain dict would show it in a log.
                yield cast("TokenEntry", RedactedDict(entry, metadata=metadata)) if with_metadata else entry
        if first_refused is not None:
            problem = "do not open" if with_metadata else "were altered"
            raise first_refused.error(f" ({refused - 1} more rows {problem})" if refused > 1 else "")

    @clears_locals
    async def clear_failure(self, provider: str, user_id: str, *, account: str = "") -> bool:
        """Clear the failure of a row's last refresh, so that the next load calls the provider at once.

        For an operator who has mended what the provider refused, such as the client's secret. The tokens do not change.
        A refresh token that the provider has refused for good is sent once more.

        Args:
            provider: The provider's name.
            user_id: The user's id.
            account: Which of the user's accounts; default: the empty name, for a user who has one.

        Returns:
            Whether there was a failure.

        Raises:
            InvalidInputError: An argument is not acceptable.
            BackendError: The database refused or failed.
        """
        return await self._rows().clear_failure(token_key(provider, user_id, account))

    @clears_locals
    async def reseal_tokens(self, provider: str, user_id: str, *, account: str = "") -> bool:
        """Seal a row's values with the keyring's primary key, if they are not sealed with it.

        The tokens, metadata, times and generation do not change. This does not affect a newer write or a refresh in
        progress. Tokens and metadata are resealed by themselves, each if it is not sealed with the primary key.

        Args:
            provider: The provider's name.
            user_id: The user's id.
            account: Which of the user's accounts; default: the empty name, for a user who has one.

        Returns:
            Whether the row was resealed. False: there is no row, it has the primary key, or a newer write of the tokens
            or the metadata came first.

        Raises:
            InvalidInputError: An argument is not acceptable.
            SealingError: The row does not open with the keyring.
            BackendError: The database refused or failed.
        """
        key = token_key(provider, user_id, account)
        row = requested_row(key, await self._rows().get(key))
        if row is None:
            return False
        record, primary = self._sealer.open(key, row), self._sealer.keyring.primary
        if not self.needs_reseal(record):
            return False
        resealed = True
        if record["metadata_key_id"] not in (None, primary):
            own = self._sealer.seal_metadata(key, metadata_json(record["metadata"]))
            resealed = await self._rows().set_metadata(key, own, replacing=row.metadata.value)
        if record["key_id"] == primary:
            return resealed
        sealed = self._sealer.seal(
            key,
            access_token=record["access_token"],
            refresh_token=record["refresh_token"],
            extra=extra_json(record["extra"]),
            access_token_expires_at=row.tokens.access_token_expires_at,
            refresh_token_expires_at=row.tokens.refresh_token_expires_at,
            access_token_expiry_known=row.tokens.access_token_expiry_known,
        )
        return await self._rows().rewrap(key, sealed, generation=row.generation) and resealed

    def _rows(self) -> Backend:
        if self._closed:
            raise StoreClosedError("this store is closed")
        return self._backend

    # Cached: an isinstance check with a protocol takes as long as opening a row.

    @cached_property
    def _lockable(self) -> SupportsRowLocks | None:
        """The backend, if it has row locks."""
        return self._backend if isinstance(self._backend, SupportsRowLocks) else None

    @cached_property
    def _engine(self) -> RefreshEngine:
        from tokenstore.refresh.engine import RefreshEngine
        from tokenstore.refresh.gates import ProviderGates
        from tokenstore.refresh.settings import Settings
        from tokenstore.refresh.telemetry import Telemetry

        settings = Settings(
            self._backend,
            self._sealer,
            Telemetry(),
            margin=self._margin,
            timeout=self._timeout,
            gates=ProviderGates(self._provider_concurrency),
            values=StoredValues(self._backend, self._sealer),
        )
        return RefreshEngine(
            settings,
            refreshers=self._refreshers,
            on_refreshed=self._on_refreshed,
            on_reauthorization_required=self._on_reauthorization_required,
            on_recovered=self._on_recovered,
            on_error=self._on_error,
        )

    def _refreshes(self) -> RefreshEngine:
        self._rows()
        if self._session is not None:
            raise UnsupportedOperationError(
                "a refresh may continue after its caller, so it cannot use a borrowed session: "
                "use a store on the session's engine, `open_store(engine)`, or on a URL"
            )
        return self._engine

    async def _store_login(self, login: Login) -> TokenRecord:
        backend, session = self._rows(), self._session
        if session is None:
            return await login.store(backend, 3 * self._timeout)
        try:
            return await login.store_locked(session, session.lock)
        except BaseException:
            # A lock that this call took must not outlive it. A transaction of the application's stays as it is.
            with suppress(UnsupportedOperationError):
                await session.rollback()
            raise

    async def _lock(self, key: TokenKey) -> SealedRecord | None:
        backend = self._rows()
        if self._session is not None:
            return await self._session.lock(key)
        if self._lockable is None:
            raise UnsupportedOperationError(f"{backend!r} has no row locks, so for_update=True is not possible")
        raise TransactionRequiredError(
            "load_tokens(for_update=True) needs a transaction to hold the lock: "
            "`async with store.transaction() as tx: record = await tx.load_tokens(…, for_update=True)`, "
            "in tokenstore.sync without `async` and `await`"
        )

    async def _read_for_metadata(self, key: TokenKey) -> SealedRecord | None:
        backend = self._rows()
        return await (backend.get(key) if self._session is None else self._session.get_latest(key))


@clears_locals
def open_store(
    target: str | AsyncEngine | Backend,
    *,
    keyring: Keyring | None = None,
    namespace: str = "",
    clock: Clock = time.time,
    refreshers: Mapping[str, Refresh] | None = None,
    refresh_margin: float = 300.0,
    refresh_timeout: float = 20.0,
    provider_concurrency: int = 32,
    force_min_age: float = 10.0,
    on_refreshed: OnRefreshed | None = None,
    on_reauthorization_required: OnReauthorizationRequired | None = None,
    on_recovered: OnRefreshed | None = None,
    on_error: OnError | None = None,
    **options: Unpack[StoreOptions],
) -> AuthTokenStore:
    """Open a store with its own connections. Nothing is connected before the first call.

    Args:
        target: A URL (``sqlite:///tokens.db``, ``postgresql://…``, ``mysql://…``, ``memory://``), a SQLAlchemy
            ``AsyncEngine`` (which the caller disposes of), or a backend.
        keyring: The keys; default: :meth:`Keyring.from_env`.
        namespace: The name of a deployment or tenant, at most 255 UTF-8 bytes, no NUL. It is bound to every value that
            the store seals: a value that was copied from a table of another namespace does not open. Default: the
            empty name.
        clock: Seconds since the epoch; the validity checks read it. The rows of ``memory://`` follow it, too; all other
            databases have a clock of their own. Default: :func:`time.time`.
        refreshers: See :class:`AuthTokenStore`, also for the arguments up to ``on_error``.
        refresh_margin: In seconds; default: 300.
        refresh_timeout: In seconds; default: 20.
        provider_concurrency: Default: 32.
        force_min_age: In seconds; default: 10.
        on_refreshed: Default: no callback.
        on_reauthorization_required: Default: no callback.
        on_recovered: Default: no callback.
        on_error: Default: no callback.
        options: The backend's options, which may also be in the URL's query: ``table``, ``schema``, ``lock_timeout``,
            ``pool_size`` … The error for an unknown option lists the known ones. See ``docs/options.md``.

    Returns:
        A store; close it with ``aclose()`` or use it in ``async with``.

    Raises:
        ConfigurationError: The URL, an option or the keys are not acceptable, or a driver is missing.
        InvalidInputError: The namespace or a refresh setting is not acceptable.
    """
    # Before the backend: without keys nothing should be opened.
    keyring = Keyring.from_env() if keyring is None else keyring
    if isinstance(target, str):
        backend = backend_for_url(target, options)
        if isinstance(backend, SupportsClock):
            backend.use_clock(clock)
    elif isinstance(target, Backend):
        if options:
            raise ConfigurationError(f"{', '.join(sorted(options))}: pass options to the backend's constructor")
        backend = target
    else:
        backend = backend_for_engine(target, options)
    return AuthTokenStore(
        backend=backend,
        keyring=keyring,
        namespace=namespace,
        clock=clock,
        refreshers=refreshers,
        refresh_margin=refresh_margin,
        refresh_timeout=refresh_timeout,
        provider_concurrency=provider_concurrency,
        force_min_age=force_min_age,
        on_refreshed=on_refreshed,
        on_reauthorization_required=on_reauthorization_required,
        on_recovered=on_recovered,
        on_error=on_error,
    )
