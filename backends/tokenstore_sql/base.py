"""The SQL backend over an engine, whether it made the engine from a URL or was given it."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext, suppress
from copy import copy
from typing import Any, ClassVar, Final, Self, TypeVar, cast

from sqlalchemy import URL, MetaData, NullPool, inspect, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tokenstore.cancellation import finish
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
from tokenstore_sql.batching import Alone, Batches, Take
from tokenstore_sql.connection import AlchemyConnection, Connector, forks
from tokenstore_sql.dialect import Dialect
from tokenstore_sql.failures import mapped
from tokenstore_sql.pace import Clients, Pace
from tokenstore_sql.patience import Patience
from tokenstore_sql.pool import EngineSource, Pool, Source
from tokenstore_sql.rows import Rows, record_of
from tokenstore_sql.schema import DEFAULT_TABLE, token_table
from tokenstore_sql.statements import Statements

__all__ = [
    "ENGINE_ARGUMENTS",
    "POOL_OPTIONS",
    "TABLE_OPTIONS",
    "SQLBackend",
    "SQLOperations",
    "SQLTransaction",
    "backend_for_engine",
]

T = TypeVar("T")
Entry = tuple[TokenKey, SealedTokens]

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

ENGINE_ARGUMENTS: Final[Mapping[str, Any]] = {
    "poolclass": NullPool,
    "isolation_level": "AUTOCOMMIT",  # for statements on their own; what creates the table asks for its level
    "hide_parameters": True,
}
"""Arguments of ``create_async_engine`` that every engine of ours has."""

# Beyond lock_timeout, before the client gives up on a server that should have given up by itself.
_SERVER_GRACE: Final = 1.0
# How long the statement of a cancelled caller may go on, in seconds: longer than a write takes that waits for no lock.
_WRITE_GRACE: Final = 0.1
# How often a lone statement that a concurrent transaction undid is sent again.
_ATTEMPTS: Final = 10
# How long a connection may stay silent where no lock is waited for.
_STUCK: Final = 30.0
# What a write locks where there are no locks on rows, and what waits for nobody.
_WHOLE_DATABASE: Final = None
_NO_LOCK: Final = nullcontext()
# How many sealed bytes weigh as much as another row where rows go together: servers bound a statement's size.
_ROW_BYTES: Final = 16 * 1024


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

    async def get(self, key: TokenKey) -> SealedRecord | None:
        return await self._run([key], lambda rows: rows.get(key), write=False)

    async def put(self, key: TokenKey, tokens: SealedTokens) -> None:
        await self._run([key], lambda rows: rows.put(key, tokens), write=True)

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
        found = await self._run([], lambda rows: rows.count_clients(), write=False)
        return Clients(found, self._own_clients())

    @abstractmethod
    def _own_clients(self) -> int:
        """How many connections this process has, as far as this object knows."""

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
    """A store's rows in one table of a database.

    Args:
        engine: The engine, which creates the table.
        source: Where connections come from; default: the engine, whose pool is its owner's.
        table: The table's name.
        schema: Its schema.
        lock_timeout: The longest wait for a lock, in seconds.
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
        connect: Callable[[Dialect], Pool] | None = None,
        *,
        table: str = DEFAULT_TABLE,
        schema: str | None = None,
        lock_timeout: float = LOCK_TIMEOUT,
    ) -> None:
        super().__init__(self.dialect_class(lock_timeout), engine.url, table, schema)
        self.dialect.check_url(engine.url)
        self._engine = engine
        self._creating = EngineSource(engine, self.dialect)
        self._source: Source = self._creating if connect is None else connect(self.dialect)
        self._owned = connect is not None
        self._closed = False
        self._home: tuple[int, asyncio.AbstractEventLoop | None] = (0, None)
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Nothing that waits or is under way belongs to this process and event loop."""
        self._queue = KeyedLocks()
        width, most = self.dialect.statements_at_once, self.dialect.most_at_once
        self._waits = Patience(_STUCK)
        self._lock_waits = Patience(self.dialect.lock_timeout + _SERVER_GRACE)
        self._loads = Batches(self._load, alone=self._load_one, width=width, most=most, restate=self._restated)
        self._stores = Batches(
            self._store,
            width=width,
            most=most,
            weight=_weight,
            writes=True,
            restate=lambda error, entry: self._restated(error, entry[0]),
        )

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, object]) -> Self:
        """Make a backend with connections of its own; see :class:`tokenstore.protocol.BackendFactory`."""
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
        values: dict[str, Any] = {**_DEFAULTS, **read_options(f"{scheme}://", parsers, parsed.query, options)}
        driver = cls.drivers[scheme]
        try:
            engine = cls._create_engine(parsed.set(drivername=driver, query={}), values)
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f'{scheme}:// needs the package {error.name}: pip install "tokenstore[{cls.extras[driver]}]"'
            ) from None

        def pool(dialect: Dialect) -> Pool:
            return Pool(
                cls._connector(engine, dialect, values),
                size=values["pool_size"],
                timeout=values["pool_timeout"],
                recycle=values["pool_recycle"],
            )

        return cls(engine, pool, **{name: values[name] for name in TABLE_OPTIONS if name in values})

    @classmethod
    @abstractmethod
    def _create_engine(cls, url: URL, options: Mapping[str, Any]) -> AsyncEngine:
        """An engine without a pool, for a URL without its query, with checked options."""

    @classmethod
    @abstractmethod
    def _connector(cls, engine: AsyncEngine, dialect: Dialect, options: Mapping[str, Any]) -> Connector:
        """What opens the driver connections of a store that owns them."""

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
            async with _Checkout(self, self._creating, transactional=True) as rows:
                alchemy = cast(AlchemyConnection, rows.connection).alchemy
                await self._create_table(alchemy)
                await alchemy.commit()

        await self._retried(lambda: self._mapped([], create))

    async def drop(self) -> None:
        """Drop the table, with every token in it."""
        self._check_open()

        async def drop() -> None:
            async with _Checkout(self, self._creating, transactional=False) as rows:
                alchemy = cast(AlchemyConnection, rows.connection).alchemy
                await alchemy.run_sync(self.table.drop, checkfirst=True)
                await alchemy.commit()

        await self._mapped([], drop)

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._settle_in()
            await finish(self._close())

    async def _close(self) -> None:
        await self._loads.aclose()
        await self._stores.aclose()
        await self._source.aclose()

    async def get(self, key: TokenKey) -> SealedRecord | None:
        self._check_open()
        self._settle_in()
        return await self._loads.ask(key)

    async def put(self, key: TokenKey, tokens: SealedTokens) -> None:
        self._check_open()
        self._settle_in()
        entry = (key, tokens)
        # Who waits for the row's lock must not keep those waiting who would go along.
        async with self._turn([key]) if self.dialect.locks_rows else _NO_LOCK:
            try:
                await self._stores.ask(entry)
            except Alone:
                await self._retried(lambda: self._mapped([key], lambda: self._store_entries([entry])))

    async def _load_one(self, key: TokenKey) -> SealedRecord | None:
        """Read one row for one caller: what most calls are, so there is no layer that it can do without."""
        if (connection := self._source.take()) is not None:
            try:
                with self._waits.wait(TimeoutError):
                    rows, _ = await connection.run(self.statements.get, {"p": key.provider, "u": key.user_id})
                return record_of(rows)
            except Exception:  # noqa: BLE001, S110 - it is sent again, where errors are told apart
                pass
            finally:
                _ = self._source.put_back(connection)
            if connection.lost:
                self._source.discard_idle()
            (row,) = await self._load(lambda: (key,), again=False)
        else:
            (row,) = await self._load(lambda: (key,))
        return row

    async def _load(self, take: Take[TokenKey], *, again: bool = True) -> Sequence[SealedRecord | None]:
        """Read the rows of one caller or of several."""
        keys: list[TokenKey] = []

        async def load(rows: Rows) -> Sequence[SealedRecord | None]:
            if not keys:
                keys.extend(take())
            return await rows.get_many(keys)

        return await self._read(keys, load, again=again)

    async def _read(
        self, keys: Sequence[TokenKey], operation: Callable[[Rows], Awaitable[T]], *, again: bool = True
    ) -> T:
        """Read rows; once more, over a new connection, if the first connection turned out to be dead.

        Args:
            keys: Which rows the errors are about.
            operation: The read.
            again: Whether it may be sent again.
        """
        connected = False

        async def read() -> T:
            nonlocal connected
            connection = await self._source.acquire(transactional=False, write=False)
            connected = True
            try:
                with self._answered(keys):
                    return await operation(Rows(connection, self.statements, self.dialect, transactional=False))
            finally:
                await self._source.release(connection)

        try:
            return await self._mapped(keys, read)
        except (BackendUnavailableError, ConflictError):
            # One dead connection of a pool is no outage. A caller that could not connect has been told already.
            if not connected or not again:
                raise
        self._source.discard_idle()
        return await self._mapped(keys, read)

    async def _store(self, take: Take[Entry]) -> Sequence[None]:
        """Write the rows of one caller or of several, which the database takes or refuses together."""
        entries: list[Entry] = []
        try:
            await self._retried(
                lambda: mapped(
                    self.dialect,
                    lambda: self._about([key for key, _ in entries]),
                    lambda: self._store_entries(entries, take),
                )
            )
        except BackendUnavailableError:
            raise
        except BackendError:
            if len(entries) > 1:
                raise Alone from None
            raise
        return [None] * len(entries)

    async def _store_entries(self, entries: list[Entry], take: Take[Entry] | None = None) -> None:
        async with _NO_LOCK if self.dialect.locks_rows else self._turn([key for key, _ in entries]):
            connection = await self._source.acquire(transactional=False, write=True)
            try:
                if take is not None and not entries:
                    entries += take()
                rows = Rows(connection, self.statements, self.dialect, transactional=False)
                with self._bounded([key for key, _ in entries]):
                    await finish(_written(rows, rows.put_many(entries)), _WRITE_GRACE)
            finally:
                await self._source.release(connection)

    def _restated(self, error: Exception, key: TokenKey) -> Exception:
        """What one caller gets of an error that is about several rows, or about the table."""
        if not isinstance(error, BackendError):
            return copy(error)
        whole = f"the table {self.table.fullname}: "
        if not str(error).startswith(whole):
            return error
        return type(error)(f"{key}: {str(error).removeprefix(whole)}", code=error.code)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[SQLTransaction]:
        self._check_open()
        self._settle_in()
        transaction = SQLTransaction(self)
        try:
            yield transaction
            await transaction._commit()
        finally:
            await finish(transaction._end())

    async def _run(self, keys: Sequence[TokenKey], operation: Callable[[Rows], Awaitable[T]], *, write: bool) -> T:
        self._check_open()
        self._settle_in()
        if not write:
            return await self._read(keys, operation)

        async def run() -> T:
            async with self._turn(keys), _Checkout(self, self._source, transactional=False) as rows:
                with self._bounded(keys):
                    return await finish(_written(rows, operation(rows)), _WRITE_GRACE)

        return await self._retried(lambda: self._mapped(keys, run))

    def _turn(self, keys: Sequence[TokenKey]) -> _Turn:
        """This process's line for the locks that a write of these rows takes, in an order that is always the same."""
        return _Turn(self, sorted(set(keys)) if self.dialect.locks_rows else [_WHOLE_DATABASE], keys)

    def _bounded(self, keys: Sequence[TokenKey]) -> AbstractContextManager[None]:
        """The last resort where a server does not end a wait for a lock by itself."""
        return self._lock_waits.wait(
            lambda: LockTimeoutError(
                f"{self._about(keys)}: the statement had no answer within {self._lock_waits.limit:g} s; "
                "a lock is held, or the server is stuck"
            )
        )

    def _answered(self, keys: Sequence[TokenKey]) -> AbstractContextManager[None]:
        """A connection that is dead without a word must not keep its caller for ever."""
        return self._waits.wait(
            lambda: BackendUnavailableError(f"{self._about(keys)}: no answer of the database within {_STUCK:g} s")
        )

    async def _mapped(self, keys: Sequence[TokenKey], operation: Callable[[], Awaitable[T]]) -> T:
        return await mapped(self.dialect, lambda: self._about(keys), operation)

    def _own_clients(self) -> int:
        return self._source.open

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
        loop = asyncio.get_running_loop()
        if loop is self._home[1] and self._home[0] == forks():
            return
        here = (forks(), loop)
        process, former = self._home
        if former is not None:
            if self._owned and process == here[0] and not former.is_closed():
                raise UnsupportedOperationError(
                    "this store serves another event loop, which still runs; open one store a loop"
                )
            # The connections stay with the parent process, or went with their loop: forget, do not close them.
            self._source.forget()
            self._begin_anew()
        self._home = here


class _Turn:
    """Waits in this process before there is a connection, so that those who wait for locks do not use up the pool."""

    def __init__(self, backend: SQLBackend, locks: Sequence[Hashable], keys: Sequence[TokenKey]) -> None:
        self._backend = backend
        self._locks = locks
        self._keys = keys
        self._queue = backend._queue
        self._held: list[Hashable] = []

    async def __aenter__(self) -> None:
        patience = self._backend.lock_timeout
        try:
            for lock in self._locks:
                await self._queue.acquire(lock, patience)
                self._held.append(lock)
        except BaseException as error:
            self._release()
            if not isinstance(error, TimeoutError):
                raise
        else:
            return
        raise LockTimeoutError(
            f"{self._backend._about(self._keys)}: the lock was not free within {patience:g} s: "
            "a task of this process holds it"
        )

    async def __aexit__(self, *exc_info: object) -> None:
        self._release()

    def _release(self) -> None:
        while self._held:
            self._queue.release(self._held.pop())


class _Checkout:
    """A connection: for one statement on its own, or at the isolation level of a transaction that takes locks."""

    def __init__(self, backend: SQLBackend, source: Source, *, transactional: bool) -> None:
        self._backend = backend
        self._source = source
        self._transactional = transactional

    async def __aenter__(self) -> Rows:
        backend = self._backend
        self._connection = await self._source.acquire(transactional=self._transactional, write=True)
        return Rows(self._connection, backend.statements, backend.dialect, transactional=self._transactional)

    async def __aexit__(self, *exc_info: object) -> None:
        await self._source.release(self._connection)


class SQLTransaction:
    """One transaction on one connection, taken from the pool by the first call."""

    def __init__(self, backend: SQLBackend) -> None:
        self._backend = backend
        self._stack = AsyncExitStack()
        self._rows: Rows | None = None
        self._queued = False
        self._turn = asyncio.Lock()

    async def get(self, key: TokenKey) -> SealedRecord | None:
        return await self._run([key], lambda rows: rows.get(key), write=False)

    async def lock(self, key: TokenKey) -> SealedRecord | None:
        async def lock(rows: Rows) -> SealedRecord | None:
            connection = rows.connection
            if isinstance(connection, AlchemyConnection) and not await self._backend.dialect.holds_locks(
                connection.alchemy
            ):
                raise UnsupportedOperationError(
                    "the engine's connections are in autocommit mode, which holds no row lock"
                )
            return await rows.lock(key)

        return await self._run([key], lock, write=True)

    async def put(self, key: TokenKey, tokens: SealedTokens) -> None:
        await self._run([key], lambda rows: rows.put(key, tokens), write=True)

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
                await self._stack.enter_async_context(backend._turn(sorted(keys)[:1]))
            if self._rows is None:
                checkout = _Checkout(backend, backend._source, transactional=True)
                self._rows = await self._stack.enter_async_context(checkout)
            with backend._bounded(keys) if write else backend._answered(keys):
                return await operation(self._rows)

        async with self._turn:  # a connection serves one statement at a time, whatever the tasks in the block do
            return await backend._mapped(keys, run)

    async def _commit(self) -> None:
        async def commit(rows: Rows) -> None:
            with self._backend._answered([]):
                await finish(_commit(rows))

        if (rows := self._rows) is not None:
            await self._backend._mapped([], lambda: commit(rows))

    async def _end(self) -> None:
        stack, self._rows, self._queued = self._stack.pop_all(), None, False
        # Closing the connection rolls back what was not committed. If even that fails, the connection is lost, and the
        # server rolls back.
        with suppress(BackendError):
            await self._backend._mapped([], stack.aclose)


def _weight(entry: Entry) -> int:
    tokens = entry[1]
    size = sum(map(len, filter(None, (tokens.access_token, tokens.refresh_token, tokens.extra))))
    return 1 + size // _ROW_BYTES


async def _written(rows: Rows, operation: Awaitable[T]) -> T:
    """Carry out a write and commit it.

    Run it by :func:`tokenstore.cancellation.finish`. The statement of a caller that is cancelled comes to its end, as a
    rule: cut off, it could still be on its way to the server, and be carried out after a later write of the same row.
    """
    result = await operation
    await _commit(rows)
    return result


async def _commit(rows: Rows) -> None:
    # A statement on its own leaves nothing to commit.
    if rows.connection.in_transaction:
        await rows.connection.commit()


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
