"""A backend over an application's own SQLAlchemy session."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from functools import partial
from typing import Any, Final, TypeVar, cast

from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session

from tokenstore.cancellation import finish
from tokenstore.errors import ConfigurationError, UnsupportedOperationError
from tokenstore.leases import lock_unleased, wait_for_lease
from tokenstore.options import read_options
from tokenstore.records import SealedRecord, TokenKey, is_leased
from tokenstore_sql.backend import SQLBackend
from tokenstore_sql.calls import Calls, Operation
from tokenstore_sql.connections.alchemy import AlchemyConnection, beside
from tokenstore_sql.databases import backend_class, way_to_pass
from tokenstore_sql.operations import SQLOperations
from tokenstore_sql.options import LOCK_TIMEOUT, TABLE_OPTIONS
from tokenstore_sql.rows import Rows
from tokenstore_sql.setup import create_tables

__all__ = ["SessionBackend"]

T = TypeVar("T")

# The key in Session.info, which belongs to users of a session, under which every store on the session finds the
# transaction that a call of a store began.
_BEGUN_HERE: Final = "tokenstore.transaction"


class _SessionCalls(Calls):
    """Calls on a borrowed session's connection.

    In a transaction that the application began, a call takes part, and the application commits. A transaction that a
    call began is the store's: a write commits it, and so does a read without a lock, so that no connection stays
    checked out; a lock leaves it open for the write that follows.

    Args:
        session: The session, or a scope that has a current one.
        operations: Whose statements and dialect to use.
    """

    def __init__(self, session: AsyncSession | async_scoped_session[AsyncSession], operations: SQLOperations) -> None:
        super().__init__(operations.statements, operations.dialect)
        self._session = session

    def session(self) -> AsyncSession:
        """The session, or the scope's current one."""
        return self._session if isinstance(self._session, AsyncSession) else self._session()

    async def lock(self, key: TokenKey, operation: Operation[SealedRecord | None]) -> SealedRecord | None:
        """Carry out an operation that locks a row, and leave the transaction open if there is such a row."""

        async def lock(rows: Rows) -> SealedRecord | None:
            row = await operation(rows)
            # A transaction that this call began, and that found no row, holds nothing that the caller could keep.
            session_rows = cast(_SessionRows, rows)
            session_rows.keeps_transaction = row is not None or not session_rows.begun_by_call
            return row

        return await self.once([key], lock, write=True)

    @asynccontextmanager
    async def _connected(self, keys: Sequence[Hashable], *, write: bool) -> AsyncIterator[Rows]:
        session = self.session()
        begins = not session.in_transaction()
        ours = begins or _is_ours(session)
        level = {"isolation_level": self.dialect.isolation_level} if begins and write else {}
        try:
            # A new connection whose checkout is cancelled half-way would never return to the pool.
            alchemy = await finish(session.connection(execution_options=level))
            if begins:
                _mark_ours(session)
            connection = await self.dialect.alchemy_class.of(alchemy, self.dialect.errors)
            rows = _SessionRows(connection, self.statements, self.dialect, transactional=True)
            rows.begun_by_call = begins
            yield rows
            if ours and (write or begins) and not rows.keeps_transaction:
                await finish(session.commit())
        except BaseException:
            if ours and session.in_transaction():
                await finish(session.rollback())
            raise

    def _limited(self, keys: Sequence[Hashable], *, write: bool) -> AbstractContextManager[None]:
        # Cutting off a statement would end the connection in the middle of the application's transaction. The dialect
        # limits the waits for locks; how long else to wait is for the application to decide.
        return nullcontext()


class _SessionRows(Rows):
    """The rows in a session's transaction.

    Attributes:
        begun_by_call: Whether the call that has these rows began the transaction.
        keeps_transaction: Whether the transaction is to stay open although a call of the store began it.
    """

    begun_by_call = False
    keeps_transaction = False


class SessionBackend(SQLOperations):
    """The rows as a borrowed session sees them.

    Args:
        session: An ``AsyncSession`` or ``async_scoped_session``; the application closes it.
        options: ``table``, ``schema``, ``lock_timeout``.

    Raises:
        ConfigurationError: The object is no such session, the session is bound to no engine, or an option is not
            acceptable.
        UnsupportedOperationError: No backend serves the session's database.
    """

    def __init__(self, session: object, options: Mapping[str, object]) -> None:
        if not isinstance(session, AsyncSession | async_scoped_session):
            raise ConfigurationError(f"db_session must be a SQLAlchemy AsyncSession, not {way_to_pass(session)}")
        values: dict[str, Any] = read_options("a store on a session", TABLE_OPTIONS, {}, options)
        try:
            bind = (session if isinstance(session, AsyncSession) else session()).get_bind()
        except UnboundExecutionError:
            raise ConfigurationError("the session is bound to no engine") from None
        except (LookupError, RuntimeError) as error:
            # From the application's scopefunc: asyncio.current_task, or a ContextVar's get.
            raise ConfigurationError(
                f"the async_scoped_session has no session here ({type(error).__name__}); make the store where the "
                "application uses the session, as in a request"
            ) from None
        dialect = backend_class(bind.dialect.name).dialect_class(values.pop("lock_timeout", LOCK_TIMEOUT))
        dialect.check_url(bind.engine.url)
        super().__init__(dialect, bind.engine.url, **values)
        self._source = session
        self._calls = _SessionCalls(session, self)

    def __repr__(self) -> str:
        return f"<SessionBackend {self.table.fullname} in {type(self._source).__name__}>"

    async def setup(self) -> None:
        await self._run([], lambda rows: create_tables(_alchemy(rows), self.tables, self.dialect), write=True)

    async def aclose(self) -> None:
        """Nothing: the application closes its session."""

    async def lock(self, key: TokenKey) -> SealedRecord | None:
        """Lock and read a row. The lock is held until the session's transaction ends.

        A live lease is waited for first, without the lock, because the lease holder needs the lock to end the lease.

        Raises:
            LockTimeoutError: A lock was not free, or a lease not over, within ``lock_timeout``.
            ConflictError: In a transaction that the application began, a lease began just before the lock.
        """
        if not self._calls.session().in_transaction():
            return await lock_unleased(
                key,
                lock=lambda: self._calls.lock(key, lambda rows: self._locked(rows, key)),
                read=lambda: self.get(key),
                unlock=self.rollback,
                wait=partial(wait_for_lease, self),
                lock_timeout=self.dialect.lock_timeout,
            )
        return await self._calls.lock(key, lambda rows: self._lock_without_rollback(rows, key))

    async def _lock_without_rollback(self, rows: Rows, key: TokenKey) -> SealedRecord | None:
        """Lock a row in a transaction that must not be rolled back, because the application began it.

        The end of a lease is waited for over another connection: in this transaction the lease may look the same for
        ever.
        """
        async with AsyncExitStack() as stack:
            aside: SQLBackend | None = None

            async def read() -> SealedRecord | None:
                nonlocal aside
                if aside is None:
                    if await self.dialect.may_look(_alchemy(rows)):
                        row = await rows.get(key)
                        if not is_leased(row):
                            return row
                    aside = await stack.enter_async_context(self._aside(_alchemy(rows).engine))
                return await aside.get(key)

            return await lock_unleased(
                key,
                lock=lambda: self._locked(rows, key),
                read=read,
                unlock=None,
                wait=lambda row, limit: wait_for_lease(aside, row, limit),
                lock_timeout=self.dialect.lock_timeout,
            )

    async def _locked(self, rows: Rows, key: TokenKey) -> SealedRecord | None:
        if not await self.dialect.holds_locks(_alchemy(rows)):
            raise UnsupportedOperationError(
                "for_update=True on a session in autocommit mode: no lock would outlive its statement; "
                "let the session's engine, or its transaction, have the isolation level READ COMMITTED"
            )
        return await rows.lock(key)

    async def get_latest(self, key: TokenKey) -> SealedRecord | None:
        """Read a row as it is now, also in a transaction whose plain reads come from a snapshot.

        In a transaction the read takes the row's lock, because a locking read sees the newest row at every isolation
        level. In autocommit mode there is neither a lock nor a snapshot.
        """
        if not self._calls.session().in_transaction():
            return await self.get(key)

        async def read(rows: Rows) -> SealedRecord | None:
            locks = await self.dialect.holds_locks(_alchemy(rows))
            return await (rows.lock(key) if locks else rows.get(key))

        return await self._calls.lock(key, read)

    @asynccontextmanager
    async def _aside(self, engine: AsyncEngine) -> AsyncIterator[SQLBackend]:
        """The same table over the pool of the session's engine, or over another pool if no connection is idle there."""
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

    async def rollback(self) -> None:
        """Undo what a call of the store began, and release its locks.

        Raises:
            UnsupportedOperationError: The application began the transaction, so only the application may end it.
        """
        session = self._calls.session()
        if not session.in_transaction():
            return
        if not _is_ours(session):
            raise UnsupportedOperationError("the application began the session's transaction and must end it itself")
        await finish(session.rollback())

    async def _run(self, keys: Sequence[Hashable], operation: Operation[T], *, write: bool) -> T:
        return await self._calls.once(keys, operation, write=write)

    def _own_clients(self) -> int:
        pool: Any = self._calls.session().get_bind().engine.pool
        return int(pool.checkedin() + pool.checkedout()) if hasattr(pool, "checkedin") else 1


def _alchemy(rows: Rows) -> AsyncConnection:
    return cast(AlchemyConnection, rows.connection).alchemy


def _mark_ours(session: AsyncSession) -> None:
    if transaction := session.sync_session.get_transaction():
        session.info[_BEGUN_HERE] = weakref.ref(transaction)


def _is_ours(session: AsyncSession) -> bool:
    """Whether a call of a store began the session's transaction."""
    marked = session.info.get(_BEGUN_HERE)
    return (
        marked is not None
        and marked() is session.sync_session.get_transaction()
        and not session.in_nested_transaction()
    )
