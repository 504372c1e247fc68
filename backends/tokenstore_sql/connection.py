"""A connection as the table's operations see it: SQLAlchemy's, or a driver's own with compiled statements."""

from __future__ import annotations

import os
import select
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from operator import itemgetter
from time import monotonic
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from sqlalchemy import ARRAY, Engine, Executable, LargeBinary, Select
from sqlalchemy.engine.interfaces import Dialect as SQLAlchemyDialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.sql.compiler import SQLCompiler

from tokenstore.errors import BackendUnavailableError

if TYPE_CHECKING:
    from tokenstore_sql.dialect import Dialect

__all__ = [
    "AlchemyConnection",
    "Compiler",
    "Connection",
    "ConnectionLostError",
    "Connector",
    "DriverConnection",
    "OneTripConnection",
    "Result",
    "beside",
    "descriptor",
    "forks",
    "through_engine",
]

T = TypeVar("T")
Parameters = Mapping[str, Any]


class _Process:
    """Tells a process from the one that it was forked from, without asking the kernel at each call."""

    forks = 0

    @classmethod
    def note_fork(cls) -> None:
        cls.forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Process.note_fork)


def forks() -> int:
    """How many forks there are between the first process and this one."""
    return _Process.forks


# Connections of the parent process: when the last reference goes, drivers close what the two processes share, and
# SQLite clears files away.
_LEFT_ALONE: list[object] = []
_NONE: Parameters = MappingProxyType({})
Connector = Callable[[], Awaitable["DriverConnection"]]


class Result(NamedTuple):
    """What a statement gave.

    Attributes:
        rows: The rows that it returned.
        changed: How many rows it changed, as the driver counts; of a query, how many it returned.
    """

    rows: Sequence[Sequence[Any]]
    changed: int


class ConnectionLostError(Exception):
    """A driver's error that ends its connection.

    Args:
        orig: That error.
    """

    def __init__(self, orig: Exception) -> None:
        super().__init__(orig)
        self.orig = orig


class Connection(ABC):
    """One connection.

    Attributes:
        borrowed: Whether its settings belong to somebody else and must be left as found.
        info: Notes of the dialect's, which live as long as the connection to the server does.
    """

    borrowed: bool
    info: dict[str, Any]

    sql_dialect: SQLAlchemyDialect
    """SQLAlchemy's own dialect, which knows the server's version."""

    is_foreign: bool = False
    """Whether it belongs to the process that this one was forked from."""

    @property
    @abstractmethod
    def lost(self) -> bool:
        """Whether it is finished: closed, broken, or cut off in the middle of a statement."""

    @property
    @abstractmethod
    def in_transaction(self) -> bool:
        """Whether there is, or may be, something to commit or to roll back."""

    @abstractmethod
    async def run(self, statement: Executable, parameters: Parameters = _NONE) -> Result:
        """Run one statement."""

    @abstractmethod
    async def begin(self) -> None:
        """Begin a transaction that takes locks, where the first statement does not begin it."""

    @abstractmethod
    async def commit(self) -> None:
        """End the transaction, if there is one."""

    @abstractmethod
    def beside(self) -> AbstractAsyncContextManager[Connection]:
        """Another connection to the same server, outside of any pool: all of one's connections may be waiting."""

    def savepoint(self) -> AbstractAsyncContextManager[Any]:
        """Around statements whose failure must not end the transaction."""
        return nullcontext()

    @abstractmethod
    async def driver_connection(self) -> Any:
        """The driver's own object."""


class AlchemyConnection(Connection):
    """SQLAlchemy's, of somebody's engine or session.

    Args:
        alchemy: The connection.
        dialect: The database's ways.
        info: The connection's notes.
        pooled: Whether it was taken from an engine's pool for this.
    """

    borrowed = True

    def __init__(self, alchemy: AsyncConnection, dialect: Dialect, info: dict[str, Any], *, pooled: bool) -> None:
        self.alchemy = alchemy
        self.sql_dialect = alchemy.dialect
        self.info = info
        self._dialect = dialect
        self._pooled = pooled

    @classmethod
    async def of(cls, alchemy: AsyncConnection, dialect: Dialect, *, pooled: bool = False) -> AlchemyConnection:
        """Wrap a connection that is open."""
        return cls(alchemy, dialect, (await alchemy.get_raw_connection()).info, pooled=pooled)

    @property
    def lost(self) -> bool:
        return self.alchemy.invalidated

    @property
    def in_transaction(self) -> bool:
        return True  # SQLAlchemy begins by itself

    async def run(self, statement: Executable, parameters: Parameters = _NONE) -> Result:
        try:
            found = await self._dialect.execute(self.alchemy, statement, parameters)
        except DBAPIError as error:
            # A server that became read-only answers pings; its connections are finished all the same.
            kind, _ = self._dialect.classify(error.orig or error)
            if kind is BackendUnavailableError and self._pooled and not self.lost:
                await self.alchemy.invalidate()
            raise
        if found.returns_rows:
            rows = found.all()
            return Result(cast(Sequence[Sequence[Any]], rows), len(rows))
        return Result((), found.rowcount)

    async def begin(self) -> None:
        """Nothing: SQLAlchemy begins by itself."""

    async def commit(self) -> None:
        await self.alchemy.commit()

    @asynccontextmanager
    async def beside(self) -> AsyncIterator[Connection]:
        engine = beside(self.alchemy.engine)
        try:
            async with engine.connect() as connection:
                yield await AlchemyConnection.of(connection, self._dialect)
        finally:
            await engine.dispose()

    def savepoint(self) -> AbstractAsyncContextManager[Any]:
        return self.alchemy.begin_nested()

    async def driver_connection(self) -> Any:
        return (await self.alchemy.get_raw_connection()).driver_connection


class _Compiled:
    """A statement as one driver takes it."""

    __slots__ = ("_constants", "_decoders", "_encoders", "_in_order", "returns_rows", "sql")

    def __init__(self, statement: Executable, dialect: SQLAlchemyDialect) -> None:
        compiled = cast(SQLCompiler, statement.compile(dialect=dialect))  # type: ignore[attr-defined]
        self.sql = str(compiled)
        self.returns_rows = isinstance(statement, Select)
        names = compiled.positiontup if compiled.positiontup is not None else list(compiled.bind_names.values())
        self._in_order = None if compiled.positiontup is None else _in_order(names)
        self._constants: dict[str, Any] = {}
        self._encoders: list[tuple[str, Callable[[Any], Any]]] = []
        for name in dict.fromkeys(names):
            bind = compiled.binds[name]
            if not bind.required:
                self._constants[name] = bind.value
            # Drivers take bytes, and lists of what they take, as they are.
            if isinstance(bind.type, LargeBinary | ARRAY):
                continue
            if encode := bind.type.dialect_impl(dialect).bind_processor(dialect):
                self._encoders.append((name, encode))
        self._decoders: list[tuple[int, Callable[[Any], Any]]] = []
        for at, entry in enumerate(getattr(compiled, "_result_columns", ())):
            if decode := entry.type.dialect_impl(dialect).result_processor(dialect, None):
                self._decoders.append((at, decode))

    def arguments(self, parameters: Parameters) -> Any:
        """The parameters in the driver's order, or by the driver's names."""
        if self._constants or self._encoders:
            parameters = {**self._constants, **parameters}
            for name, encode in self._encoders:
                parameters[name] = encode(parameters[name])
        return parameters if self._in_order is None else self._in_order(parameters)

    def decoded(self, found: Result) -> Result:
        """What was found as SQLAlchemy would give it."""
        if not self._decoders or not found.rows:
            return found
        columns = list(zip(*found.rows, strict=True))
        for at, decode in self._decoders:
            columns[at] = tuple(map(decode, columns[at]))
        return Result(list(zip(*columns, strict=True)), found.changed)


def _in_order(names: Sequence[str]) -> Callable[[Parameters], Any]:
    if len(names) > 1:
        return itemgetter(*names)
    return lambda parameters: tuple(parameters[name] for name in names)


class Compiler:
    """Compiles each statement once for one driver.

    Args:
        dialect: SQLAlchemy's dialect for the driver, which has seen the server, as some SQL depends on its version.
    """

    def __init__(self, dialect: SQLAlchemyDialect) -> None:
        self.dialect = dialect
        # By identity: these statements live as long as the store does, and what is compiled keeps others alive.
        self._compiled: dict[int, tuple[Executable, _Compiled]] = {}

    def __call__(self, statement: Executable) -> _Compiled:
        found = self._compiled.get(id(statement))
        if found is None:
            found = self._compiled[id(statement)] = (statement, _Compiled(statement, self.dialect))
        return found[1]


class DriverConnection(Connection):
    """A driver's own connection, in autocommit mode unless a transaction was begun.

    Args:
        driver: The driver's object.
        compiler: What compiles for this driver.
        dialect: The database's ways.
        connect: Opens another one.
    """

    borrowed = False

    def __init__(self, driver: Any, compiler: Compiler, dialect: Dialect, connect: Connector) -> None:
        self.driver = driver
        self.info = {}
        self.opened_at = self.used_at = monotonic()
        self._home = _Process.forks
        self._news = _watched(self.socket())
        self._compiler = compiler
        self.sql_dialect = compiler.dialect
        self._dialect = dialect
        self._connect = connect
        self._in_transaction = False
        self._unanswered = False

    @property
    def in_transaction(self) -> bool:
        return self._in_transaction

    @property
    def lost(self) -> bool:
        return self._unanswered or self.is_closed()

    @property
    def is_foreign(self) -> bool:  # type: ignore[override]
        return self._home != _Process.forks

    def is_alive(self) -> bool:
        """Whether an idle connection looks as if it could be used: a server that goes away says so, unless it crashes.

        Asks the kernel, as the event loop may not have come to reading what there is to read.
        """
        return not self.lost and not (self._news is not None and self._news.poll(0))

    @abstractmethod
    def is_closed(self) -> bool:
        """Whether the driver knows by now that the connection is closed."""

    @abstractmethod
    def socket(self) -> int | None:
        """Its file descriptor; None where there is none to be had."""

    @abstractmethod
    def begin_statement(self) -> str:
        """What begins a transaction that takes locks."""

    @abstractmethod
    async def send(self, sql: str, arguments: Any, returns_rows: bool) -> Result:
        """Send one statement and wait for its answer."""

    @abstractmethod
    async def close(self) -> None:
        """Take leave of the server, for a bounded time, and close the socket."""

    async def ping(self) -> None:
        """Ask the server for a sign of life."""
        await self.send_text("SELECT 1")

    def forget(self) -> None:
        """Let go of it without a word: it is another process's, or its event loop is gone."""
        if self.is_foreign:
            _LEFT_ALONE.append(self)

    async def run(self, statement: Executable, parameters: Parameters = _NONE) -> Result:
        compiled = self._compiler(statement)
        self._unanswered = True
        try:
            found = await self.send(compiled.sql, compiled.arguments(parameters), compiled.returns_rows)
        except BaseException as error:
            self._judge(error)
            raise
        self._unanswered = False
        return compiled.decoded(found)

    async def send_text(self, sql: str) -> None:
        """Send a statement without parameters or rows."""
        self._unanswered = True
        try:
            _ = await self.send(sql, (), False)
        except BaseException as error:
            self._judge(error)
            raise
        self._unanswered = False

    def _judge(self, error: BaseException) -> None:
        """See what an error has left of the connection.

        Raises:
            ConnectionLostError: Nothing.
        """
        if not isinstance(error, Exception):
            self._unanswered = not self.has_ended()
            return
        kind, code = self._dialect.classify(error)
        # An answer of the server has a code; one that became read-only answers, and is of no more use.
        if code is not None and kind is not BackendUnavailableError:
            self._unanswered = False
        elif isinstance(error, (OSError, *self._dialect.driver_errors())):
            raise ConnectionLostError(error) from None

    def has_ended(self) -> bool:
        """Whether a cancelled statement has come to its end all the same."""
        return False

    async def begin(self) -> None:
        await self.send_text(self.begin_statement())
        self._in_transaction = True

    async def commit(self) -> None:
        if self.in_transaction:
            await self.send_text("COMMIT")
            self._in_transaction = False

    @asynccontextmanager
    async def beside(self) -> AsyncIterator[Connection]:
        connection = await self._connect()
        try:
            yield connection
        finally:
            await connection.close()

    async def driver_connection(self) -> Any:
        return self.driver

    async def rollback(self) -> None:
        """Undo what was not committed."""
        if self.in_transaction:
            await self.send_text("ROLLBACK")
            self._in_transaction = False


class OneTripConnection(DriverConnection):
    """One for which a trip costs more than a statement, so that several go along."""

    @abstractmethod
    async def run_each(self, statement: Executable, parameters: Sequence[Parameters]) -> list[Result]:
        """Run a statement that writes, several times in one trip; it does so for all or for none."""


def through_engine(
    engine: AsyncEngine, dialect: Dialect, connection_class: Callable[..., DriverConnection]
) -> Connector:
    """Open connections as an engine without a pool does, with its arguments and events, and take them from it."""
    compiler = Compiler(engine.dialect)
    dbapi_error = engine.dialect.loaded_dbapi.Error

    async def connect() -> DriverConnection:
        try:
            raw = await engine.raw_connection()
        except dbapi_error as error:
            raise ConnectionLostError(error) from None
        driver = raw.driver_connection
        raw.detach()
        return connection_class(driver, compiler, dialect, connect)

    return connect


def descriptor(transport: Any) -> int | None:
    """The file descriptor of a transport of asyncio's; the drivers have no public way to theirs."""
    socket = transport and transport.get_extra_info("socket")
    return int(socket.fileno()) if socket else None


def _watched(socket: int | None) -> Any:
    if socket is None or not hasattr(select, "poll"):  # Windows has none
        return None
    news = select.poll()
    news.register(socket, select.POLLIN)
    return news


def beside(engine: AsyncEngine) -> AsyncEngine:
    """An engine to the same database with a pool of its own, for when all of the first one's connections wait."""
    return AsyncEngine(Engine(engine.sync_engine.pool.recreate(), engine.dialect, engine.url))
