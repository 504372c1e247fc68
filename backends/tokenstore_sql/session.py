"""A backend over an application's own SQLAlchemy session."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, TypeVar, cast

from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session

from tokenstore.cancellation import finish
from tokenstore.errors import ConfigurationError, ConflictError, LockTimeoutError, UnsupportedOperationError
from tokenstore.options import read_options
from tokenstore.records import SealedRecord, TokenKey, is_leased
from tokenstore_sql.base import (
    LOCK_TIMEOUT,
    TABLE_OPTIONS,
    SQLBackend,
    SQLOperations,
    backend_class,
)
from tokenstore_sql.connection import AlchemyConnection, beside
from tokenstore_sql.failures import mapped
from tokenstore_sql.rows import Rows

__all__ = ["SessionBackend"]

T = TypeVar("T")

# In Session.info, which belongs to users of a session, so that every store on it sees it: the transaction that a call
# of a store began.
_BEGUN_HERE: Final = "tokenstore.transaction"
# How far behind a lease's end to look again, in seconds: SQLite's clock has milliseconds.
_LEASE_GRACE: Final = 0.005


class SessionBackend(SQLOperations):
    """The rows as a borrowed session sees them.

    In a transaction that the caller began, the store takes part and the caller commits. One that a call of the store
    began is the store's: a write commits it, and so does a read without a lock, so that no connection stays checked
    out; a lock keeps it open for the write that follows.

    Args:
        session: An ``AsyncSession`` or ``async_scoped_session``; its owner closes it.
        options: ``table``, ``schema``, ``lock_timeout``.

    Raises:
        ConfigurationError: It is no such session, it is bound to no engine, or an option is not acceptable.
        UnsupportedOperationError: Its database is none of ours.
    """

    def __init__(self, session: object, options: Mapping[str, object]) -> None:
        if not isinstance(session, AsyncSession | async_scoped_session):
            raise ConfigurationError(
                f"db_session must be a SQLAlchemy AsyncSession, not {type(session).__name__}; "
                "open_store() takes engines and URLs"
            )
        values: dict[str, Any] = read_options("a store on a session", TABLE_OPTIONS, {}, options)
        self._source = session
        try:
            bind = self._session().get_bind()
        except UnboundExecutionError:
            raise ConfigurationError("the session is bound to no engine") from None
        dialect = backend_class(bind.dialect.name).dialect_class(values.pop("lock_timeout", LOCK_TIMEOUT))
        dialect.check_url(bind.engine.url)
        super().__init__(dialect, bind.engine.url, **values)

    def __repr__(self) -> str:
        return f"<SessionBackend {self.table.fullname} in {type(self._source).__name__}>"

    async def setup(self) -> None:
        async def create(rows: Rows) -> None:
            await self._create_table(_alchemy(rows))

        await self._run([], create, write=True)

    async def aclose(self) -> None:
        """Nothing: the session is its owner's."""

    async def lock(self, key: TokenKey) -> SealedRecord | None:
        """Lock and read a row; the lock is held until the session's transaction ends.

        Somebody's live lease is waited for first, without the lock, which its holder needs in order to end it.

        Raises:
            LockTimeoutError: A lock was not free, or a lease not over, within ``lock_timeout``.
            ConflictError: In a transaction of the caller's a lease began just before the lock.
        """
        deadline = asyncio.get_running_loop().time() + self.dialect.lock_timeout

        async def lock(rows: Rows) -> SealedRecord | None:
            row = await self._locked(rows, key)
            if is_leased(row):
                raise _Leased(row)  # and so undo the transaction, which this call began
            return row

        async def lock_in_transaction(rows: Rows) -> SealedRecord | None:
            await self._wait_without_lock(rows, key, deadline)
            row = await self._locked(rows, key)
            if is_leased(row):
                raise ConflictError(f"{key}: a refresh began at this moment; repeat the transaction")
            return row

        while not self._session().in_transaction():
            try:
                return await self._run([key], lock, write=True, keep=True)
            except _Leased as leased:
                row = leased.row
            await self._pause(self, row, deadline)
        return await self._run([key], lock_in_transaction, write=True, keep=True)

    async def _locked(self, rows: Rows, key: TokenKey) -> SealedRecord | None:
        if not await self.dialect.holds_locks(_alchemy(rows)):
            raise UnsupportedOperationError(
                "for_update=True on a session in autocommit mode: no lock would outlive its statement; "
                "let the session's engine, or its transaction, have the isolation level READ COMMITTED"
            )
        return await rows.lock(key)

    async def _wait_without_lock(self, rows: Rows, key: TokenKey, deadline: float) -> None:
        """Wait for the end of a live lease in a transaction that cannot be undone to try again.

        Over another connection: what this transaction sees of the lease may stand still.
        """
        if await self.dialect.may_look(_alchemy(rows)):
            row = await rows.get(key)
            if not is_leased(row):
                return
        async with self._aside(_alchemy(rows).engine) as aside:
            while is_leased(row := await aside.get(key)):
                await self._pause(aside, row, deadline)

    @asynccontextmanager
    async def _aside(self, engine: AsyncEngine) -> AsyncIterator[SQLBackend]:
        """The same table over the pool of the session's engine, or beside it where no connection is free."""
        pool: Any = engine.sync_engine.pool
        free = hasattr(pool, "checkedin") and pool.checkedin() > 0
        used = engine if free else beside(engine)
        try:
            yield backend_class(engine.dialect.name)(
                used, table=self.table.name, schema=self.table.schema, lock_timeout=self.dialect.lock_timeout
            )
        finally:
            if not free:
                await finish(used.dispose())

    async def _pause(self, rows: SQLOperations, row: SealedRecord, deadline: float) -> None:
        """Until it is worth reading a leased row again."""
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0:
            raise LockTimeoutError(
                f"{row.key}: a refresh held the row's lease for longer than {self.dialect.lock_timeout:g} s; "
                "repeat the call"
            )
        with suppress(TimeoutError):
            async with asyncio.timeout(min(left, _lease_left(row) + _LEASE_GRACE)):
                await rows.watch(row.key)

    async def rollback(self) -> None:
        """Undo what a call of the store began, and give its locks up.

        Raises:
            UnsupportedOperationError: The transaction is the caller's to end.
        """
        session = self._session()
        if not session.in_transaction():
            return
        if not _is_ours(session):
            raise UnsupportedOperationError("the session's transaction was begun by its owner, who alone may end it")
        await finish(session.rollback())

    async def _run(
        self, keys: Sequence[TokenKey], operation: Callable[[Rows], Awaitable[T]], *, write: bool, keep: bool = False
    ) -> T:
        session = self._session()
        begins = not session.in_transaction()
        ours = begins or _is_ours(session)

        async def run() -> T:
            options = {"isolation_level": self.dialect.isolation_level} if begins and write else {}
            # Cancelled half-way, a new connection would be nobody's to close.
            connection = await finish(session.connection(execution_options=options))
            if begins:
                _mark_ours(session)
            wrapped = await AlchemyConnection.of(connection, self.dialect)
            rows = Rows(wrapped, self.statements, self.dialect, transactional=True)
            result = await operation(rows)
            # A lock that found no row holds nothing that the caller could mean to keep.
            if (ours and write and not keep) or (begins and (not keep or result is None)):
                await finish(session.commit())
            return result

        try:
            return await mapped(self.dialect, lambda: self._about(keys), run)
        except BaseException:
            if ours and session.in_transaction():
                await finish(session.rollback())
            raise

    def _own_clients(self) -> int:
        pool: Any = self._session().get_bind().engine.pool
        return int(pool.checkedin() + pool.checkedout()) if hasattr(pool, "checkedin") else 1

    def _session(self) -> AsyncSession:
        """The session, or the current one of a scope."""
        return self._source if isinstance(self._source, AsyncSession) else self._source()


def _alchemy(rows: Rows) -> AsyncConnection:
    return cast(AlchemyConnection, rows.connection).alchemy


class _Leased(Exception):  # noqa: N818 - a signal, not an error
    """Ends a transaction of the store's own that has locked a row with a live lease."""

    def __init__(self, row: SealedRecord) -> None:
        self.row = row


def _lease_left(row: SealedRecord) -> float:
    return row.lease_expires_in or 0.0


def _mark_ours(session: AsyncSession) -> None:
    if transaction := session.sync_session.get_transaction():
        session.info[_BEGUN_HERE] = weakref.ref(transaction)


def _is_ours(session: AsyncSession) -> bool:
    marked = session.info.get(_BEGUN_HERE)
    return (
        marked is not None
        and marked() is session.sync_session.get_transaction()
        and not session.in_nested_transaction()
    )
