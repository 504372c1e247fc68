"""The SQL backend over an engine, whether it made the engine from a URL or was given it."""

from __future__ import annotations

import asyncio
import os
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import Any, ClassVar, Final, Self, TypeVar

from sqlalchemy import URL, Engine, MetaData, inspect, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tokenstore.errors import (
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    ConflictError,
    LockTimeoutError,
    MissingDependencyError,
    StoreClosedError,
    UnsupportedOperationError,
)
from tokenstore.locks import KeyedLocks
from tokenstore.options import OptionParser, identifier, positive_int, positive_seconds, read_options
from tokenstore.records import Failure, ScannedRow, SealedRecord, SealedTokens, TokenKey
from tokenstore_sql.dialect import Dialect
from tokenstore_sql.failures import mapped
from tokenstore_sql.pace import Clients, Pace
from tokenstore_sql.rows import Rows
from tokenstore_sql.schema import DEFAULT_TABLE, token_table
from tokenstore_sql.statements import Statements

__all__ = [
    "POOL_OPTIONS",
    "TABLE_OPTIONS",
    "SQLBackend",
    "SQLOperations",
    "SQLTransaction",
    "backend_for_engine",
    "beside",
    "pool_arguments",
]

T = TypeVar("T")

TABLE_OPTIONS: Final[Mapping[str, OptionParser]] = {
    "table": identifier,
    "schema": identifier,
    "lock_timeout": positive_seconds,
}
"""Options of every SQL store."""

POOL_OPTIONS: Final[Mapping[str, OptionParser]] = {
    "pool_size": positive_int,
    "pool_timeout": positive_seconds,
    "pool_recycle": positive_seconds,
}
"""Options of a store that owns its engine, named as SQLAlchemy names them."""

_DEFAULTS: Final[Mapping[str, Any]] = {"pool_size": 10, "pool_timeout": 10.0, "pool_recycle": 1800.0}
LOCK_TIMEOUT: Final = 10.0
# Beyond lock_timeout, before the client gives up on a server that should have given up by itself.
_SERVER_GRACE: Final = 1.0
# How often a lone statement that a concurrent transaction undid is sent again.
_ATTEMPTS: Final = 10
# How long a connection may stay silent where no lock is waited for.
_STUCK: Final = 30.0
# How long a cancelled caller waits for a commit or clean-up that is already on its way.
_FINISH_GRACE: Final = 0.5


class SQLOperations(ABC):
    """The backend protocol's operations, each one call of :meth:`_run` on whatever connection that provides."""

    def __init__(self, dialect: Dialect, url: URL, table: str = DEFAULT_TABLE, schema: str | None = None) -> None:
        self.dialect = dialect
        self._url = url
        self._pace = Pace()
        self.table = token_table(MetaData(), table, schema)
        self.statements = self._build_statements()

    def _build_statements(self) -> Statements:
        return Statements(self.table, self.dialect)

    @abstractmethod
    async def _run(self, keys: Sequence[TokenKey], operation: Callable[[Rows], Awaitable[T]], *, write: bool) -> T:
        """Run an operation on these rows; a write is committed, or left to the transaction's owner."""

    def _about(self, keys: Sequence[TokenKey]) -> str:
        """What an error is about."""
        return str(keys[0]) if len(keys) == 1 else f"the table {self.table.fullname}"

    async def get(self, keys: Sequence[TokenKey]) -> list[SealedRecord | None]:
        return await self._run(keys, lambda rows: rows.get(keys), write=False)

    async def put(self, entries: Mapping[TokenKey, SealedTokens]) -> None:
        await self._run(list(entries), lambda rows: rows.put(entries), write=True)

    async def delete(self, key: TokenKey) -> bool:
        return await self._run([key], lambda rows: rows.delete(key), write=True)

    async def scan(
        self,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        after: TokenKey | None = None,
        limit: int,
    ) -> list[ScannedRow]:
        return await self._run(
            [], lambda rows: rows.scan(provider=provider, user_id=user_id, after=after, limit=limit), write=False
        )

    async def claim_lease(self, key: TokenKey, *, generation: int, holder: str, duration: float) -> bool:
        return await self._run(
            [key],
            lambda rows: rows.claim_lease(key, generation=generation, holder=holder, duration=duration),
            write=True,
        )

    async def complete_lease(self, key: TokenKey, tokens: SealedTokens, *, generation: int, holder: str) -> bool:
        return await self._run(
            [key], lambda rows: rows.complete_lease(key, tokens, generation=generation, holder=holder), write=True
        )

    async def release_lease(
        self, key: TokenKey, *, generation: int, holder: str, failure: Failure | None = None
    ) -> bool:
        return await self._run(
            [key],
            lambda rows: rows.release_lease(key, generation=generation, holder=holder, failure=failure),
            write=True,
        )

    async def rewrap(self, key: TokenKey, tokens: SealedTokens, *, generation: int) -> bool:
        return await self._run([key], lambda rows: rows.rewrap(key, tokens, generation=generation), write=True)

    async def watch(self, key: TokenKey) -> None:
        """See :class:`tokenstore.protocol.SupportsWatching`; :mod:`tokenstore_sql.pace` has the sums."""
        await self.dialect.watch(self._url, lambda: self._pace.interval(self._count_clients))

    async def _count_clients(self) -> Clients:
        return await self._run([], lambda rows: rows.count_clients(), write=False)

    async def _create_table(self, connection: AsyncConnection) -> None:
        """Create the table if it is missing, and refuse another table of its name."""
        await self.dialect.check(connection)
        async with self.dialect.exclusive_setup(connection):
            await connection.run_sync(self.table.metadata.create_all)
            found = await connection.run_sync(
                lambda sync: {
                    column["name"] for column in inspect(sync).get_columns(self.table.name, self.table.schema)
                }
            )
            if missing := sorted(set(self.table.columns.keys()) - found):
                raise ConfigurationError(
                    f"the table {self.table.fullname} exists but is no token table: it lacks {', '.join(missing)}; "
                    "choose another name with the option `table`"
                )


class SQLBackend(SQLOperations):
    """A store's rows in one table of a database, over an engine.

    Args:
        engine: The engine.
        table: The table's name.
        schema: Its schema.
        lock_timeout: The longest wait for a lock, in seconds.
        owned: Whether to dispose of the engine when closing, and whether its connections' settings are ours to make.
    """

    dialect_class: ClassVar[type[Dialect]]
    drivers: ClassVar[Mapping[str, str]]
    """From a URL's scheme to SQLAlchemy's name of dialect and driver."""
    extras: ClassVar[Mapping[str, str]]
    """From SQLAlchemy's name to the extra that installs the driver."""
    driver_options: ClassVar[Mapping[str, OptionParser]]
    """Options for the driver alone."""

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        table: str = DEFAULT_TABLE,
        schema: str | None = None,
        lock_timeout: float = LOCK_TIMEOUT,
        owned: bool = False,
    ) -> None:
        super().__init__(self.dialect_class(lock_timeout), engine.url, table, schema)
        self.dialect.check_url(engine.url)
        self._engine = engine
        self._owned = owned
        self._queue = KeyedLocks()
        self._closed = False
        self._home: tuple[int, asyncio.AbstractEventLoop] | None = None

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, object]) -> Self:
        """Make a backend with an engine of its own; see :class:`tokenstore.protocol.BackendFactory`."""
        parsed = None
        with suppress(ArgumentError, ValueError):
            parsed = make_url(url)
        if parsed is None:
            # Raised here, where the error has no context: that one's text may hold a password.
            raise ConfigurationError(
                "the database URL cannot be read; expected scheme://user:password@host:port/database"
            )
        scheme = parsed.drivername.lower()
        parsers = {**TABLE_OPTIONS, **POOL_OPTIONS, **cls.driver_options}
        values = {**_DEFAULTS, **read_options(f"{scheme}://", parsers, parsed.query, options)}
        driver = cls.drivers[scheme]
        try:
            engine = cls._create_engine(parsed.set(drivername=driver, query={}), values)
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f'{scheme}:// needs the package {error.name}: pip install "tokenstore[{cls.extras[driver]}]"'
            ) from None
        return cls(engine, owned=True, **{name: values[name] for name in TABLE_OPTIONS if name in values})

    @classmethod
    @abstractmethod
    def _create_engine(cls, url: URL, options: Mapping[str, Any]) -> AsyncEngine:
        """An engine for a URL without its query, with checked options."""

    @staticmethod
    def lock_timeout_of(options: Mapping[str, Any]) -> float:
        return float(options.get("lock_timeout", LOCK_TIMEOUT))

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.table.fullname} at {self._engine.url.render_as_string(hide_password=True)}>"
        )

    @property
    def lock_timeout(self) -> float:
        return self.dialect.lock_timeout

    async def setup(self) -> None:
        self._check_open()

        async def create() -> None:
            async with self._checkout(transactional=True) as rows:
                await self._create_table(rows.connection)
                await rows.connection.commit()

        await self._retried(lambda: self._mapped([], create))

    async def drop(self) -> None:
        """Drop the table, with every token in it."""
        self._check_open()

        async def drop() -> None:
            async with self._checkout(transactional=False) as rows:
                await rows.connection.run_sync(self.table.drop, checkfirst=True)
                await rows.connection.commit()

        await self._mapped([], drop)

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            await finish(self.dialect.aclose())
            if self._owned:
                self._settle_in()
                await finish(self._engine.dispose())

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[SQLTransaction]:
        self._check_open()
        transaction = SQLTransaction(self)
        try:
            yield transaction
            await transaction._commit()
        finally:
            await finish(transaction._end())

    async def _run(self, keys: Sequence[TokenKey], operation: Callable[[Rows], Awaitable[T]], *, write: bool) -> T:
        self._check_open()
        if write:
            return await self._retried(lambda: self._mapped(keys, lambda: self._write(keys, operation)))

        async def read() -> T:
            async with self._checkout(transactional=False) as rows, self._answered(keys):
                return await self._on(rows, operation)

        return await self._retried(lambda: self._mapped(keys, read))

    async def _write(self, keys: Sequence[TokenKey], operation: Callable[[Rows], Awaitable[T]]) -> T:
        async with AsyncExitStack() as stack:
            await self._enqueue(keys, stack)
            # More than one row is more than one statement, which must hold or fail together.
            rows = await stack.enter_async_context(self._checkout(transactional=len(keys) > 1))
            async with self._bounded(keys):
                result = await self._on(rows, operation)
                await self._on(rows, _commit)
                return result

    async def _on(self, rows: Rows, operation: Callable[[Rows], Awaitable[T]]) -> T:
        """Run an operation, and see to its connection where it fails."""
        try:
            return await operation(rows)
        except DBAPIError as error:
            # A server that became read-only answers pings; its connections are finished all the same.
            kind, _ = self.dialect.classify(error.orig or error)
            if kind is BackendUnavailableError and not rows.connection.invalidated:
                await rows.connection.invalidate()
            raise

    @asynccontextmanager
    async def _checkout(self, *, transactional: bool) -> AsyncIterator[Rows]:
        """A connection: for one statement on its own, or at the isolation level of a transaction that takes locks."""
        self._settle_in()
        connection = self._engine.connect()
        rows = Rows(connection, self.statements, self.dialect, transactional=transactional, borrowed=not self._owned)
        # A lone statement needs no transaction, so it gets none: one round trip, and nothing to leave open.
        level = self.dialect.isolation_level if transactional else None if self._owned else "AUTOCOMMIT"

        async def prepare() -> None:
            _ = await connection.start()
            if level is not None:
                _ = await self._on(rows, lambda _: connection.execution_options(isolation_level=level))

        try:
            async with self._answered([]):
                # One that is cancelled half-way would never return to the pool.
                await finish(prepare())
            yield rows
        finally:
            if connection.sync_connection is not None:
                await finish(connection.close())

    async def _enqueue(self, keys: Sequence[TokenKey], stack: AsyncExitStack) -> None:
        """Wait in this process before taking a connection, so that waiters do not use up the pool."""
        for queue_key in dict.fromkeys(map(self.dialect.queue_key, sorted(keys))):
            try:
                lock = await self._queue.acquire(queue_key, self.dialect.lock_timeout)
            except TimeoutError:
                raise LockTimeoutError(
                    f"{self._about(keys)}: the lock was not free within {self.dialect.lock_timeout:g} s: "
                    "a task of this process holds it"
                ) from None
            stack.callback(lock.release)

    def _bounded(self, keys: Sequence[TokenKey]) -> AbstractAsyncContextManager[None]:
        """The last resort where a server does not end a wait for a lock by itself."""
        limit = self.dialect.lock_timeout + _SERVER_GRACE
        return _within(
            limit,
            LockTimeoutError(
                f"{self._about(keys)}: the statement had no answer within {limit:g} s; a lock is held, or the server "
                "is stuck"
            ),
        )

    def _answered(self, keys: Sequence[TokenKey]) -> AbstractAsyncContextManager[None]:
        """A connection that is dead without a word must not keep its caller for ever."""
        return _within(
            _STUCK, BackendUnavailableError(f"{self._about(keys)}: no answer of the database within {_STUCK:g} s")
        )

    async def _mapped(self, keys: Sequence[TokenKey], operation: Callable[[], Awaitable[T]]) -> T:
        return await mapped(self.dialect, self._about(keys), operation)

    async def _retried(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Send a lone statement again where a dead-lock or serialization failure has undone it whole."""
        for attempt in range(1, _ATTEMPTS):
            try:
                return await operation()
            except ConflictError:
                await asyncio.sleep(random.uniform(0, 0.005 * attempt))
        return await operation()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("this store is closed")

    def _settle_in(self) -> None:
        """Notice a fork or a new event loop: pooled connections serve neither."""
        here = (os.getpid(), asyncio.get_running_loop())
        if self._home == here:
            return
        if self._home is not None and self._owned:
            pid, loop = self._home
            if pid == here[0] and not loop.is_closed():
                raise UnsupportedOperationError(
                    "this store serves another event loop, which still runs; open one store a loop"
                )
            # The connections stay with the parent process, or went with their loop: forget, do not close them.
            self._engine.sync_engine.dispose(close=False)
        self._home = here


class SQLTransaction:
    """One transaction on one connection, taken from the pool by the first call."""

    def __init__(self, backend: SQLBackend) -> None:
        self._backend = backend
        self._stack = AsyncExitStack()
        self._rows: Rows | None = None
        self._queued = False
        self._turn = asyncio.Lock()

    async def get(self, keys: Sequence[TokenKey]) -> list[SealedRecord | None]:
        return await self._run(keys, lambda rows: rows.get(keys), write=False)

    async def lock(self, key: TokenKey) -> SealedRecord | None:
        async def lock(rows: Rows) -> SealedRecord | None:
            if not await self._backend.dialect.holds_locks(rows.connection):
                raise UnsupportedOperationError(
                    "the engine's connections are in autocommit mode, which holds no row lock"
                )
            return await rows.lock(key)

        return await self._run([key], lock, write=True)

    async def put(self, entries: Mapping[TokenKey, SealedTokens]) -> None:
        await self._run(list(entries), lambda rows: rows.put(entries), write=True)

    async def delete(self, key: TokenKey) -> bool:
        return await self._run([key], lambda rows: rows.delete(key), write=True)

    async def rollback(self) -> None:
        async with self._turn:
            await finish(self._end())

    async def _run(self, keys: Sequence[TokenKey], operation: Callable[[Rows], Awaitable[T]], *, write: bool) -> T:
        backend = self._backend
        backend._check_open()

        async def run() -> T:
            if write and not self._queued:
                # For the first lock alone: who waits here with a lock in hand escapes the server's dead-lock detector.
                self._queued = True
                await backend._enqueue(sorted(keys)[:1], self._stack)
            if self._rows is None:
                checkout = backend._checkout(transactional=True)
                self._rows = await self._stack.enter_async_context(checkout)
            async with backend._bounded(keys) if write else backend._answered(keys):
                return await backend._on(self._rows, operation)

        async with self._turn:  # a connection serves one statement at a time, whatever the tasks in the block do
            return await backend._mapped(keys, run)

    async def _commit(self) -> None:
        async def commit(rows: Rows) -> None:
            async with self._backend._answered([]):
                await self._backend._on(rows, _commit)

        if (rows := self._rows) is not None:
            await self._backend._mapped([], lambda: commit(rows))

    async def _end(self) -> None:
        stack, self._rows, self._queued = self._stack.pop_all(), None, False
        # Closing the connection rolls back what was not committed. If even that fails, the connection is lost, and the
        # server rolls back.
        with suppress(BackendError):
            await self._backend._mapped([], stack.aclose)


async def _commit(rows: Rows) -> None:
    await finish(rows.connection.commit())


@asynccontextmanager
async def _within(seconds: float, failure: BackendError) -> AsyncIterator[None]:
    scope = asyncio.timeout(seconds)
    try:
        async with scope:
            yield
    except TimeoutError:
        if scope.expired():
            raise failure from None
        raise


async def finish(action: Coroutine[Any, Any, T]) -> T:
    """Let a commit or clean-up end although its caller is cancelled, for a moment; then cancel it, too."""
    task = asyncio.ensure_future(action)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done():
            await asyncio.wait([task], timeout=_FINISH_GRACE)
            task.cancel()
            await asyncio.wait([task])
        raise


def beside(engine: AsyncEngine) -> AsyncEngine:
    """An engine to the same database with a pool of its own, for when all of the first one's connections wait."""
    return AsyncEngine(Engine(engine.sync_engine.pool.recreate(), engine.dialect, engine.url))


def pool_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``create_async_engine`` that every engine of ours has."""
    return {
        "isolation_level": "AUTOCOMMIT",  # for statements on their own; a transaction asks for its level
        "hide_parameters": True,
        "max_overflow": 0,  # pool_size is the bound
        # The most recently used first, so that what is no longer needed goes idle; a ping, because what is idle may be
        # dead, and a write must not find that out.
        "pool_use_lifo": True,
        "pool_pre_ping": True,
        **{name: options[name] for name in POOL_OPTIONS if name in options},
    }


def backend_for_engine(engine: object, options: Mapping[str, object]) -> SQLBackend:
    """A backend over somebody's ``AsyncEngine``.

    Raises:
        ConfigurationError: It is no ``AsyncEngine``, or an option is not acceptable.
        UnsupportedOperationError: Its database is none of ours.
    """
    if not isinstance(engine, AsyncEngine):
        raise ConfigurationError(f"open_store takes a URL, an AsyncEngine or a backend, not {type(engine).__name__}")
    values: dict[str, Any] = read_options("a store on an engine", TABLE_OPTIONS, {}, options)
    return backend_class(engine.dialect.name)(engine, **values)


def backend_class(name: str) -> type[SQLBackend]:
    """The backend for SQLAlchemy's name of a database."""
    from tokenstore_sql.mysql import MySQLBackend
    from tokenstore_sql.postgres import PostgresBackend
    from tokenstore_sql.sqlite import SQLiteBackend

    classes: Mapping[str, type[SQLBackend]] = {
        "sqlite": SQLiteBackend,
        "postgresql": PostgresBackend,
        "mysql": MySQLBackend,
        "mariadb": MySQLBackend,
    }
    if name not in classes:
        raise UnsupportedOperationError(f"no backend for {name}; there is one for {', '.join(sorted(classes))}")
    return classes[name]
