"""A driver's own connection, which runs compiled statements."""

from __future__ import annotations

import os
import select
import socket
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any, Final

from sqlalchemy import Executable
from sqlalchemy.ext.asyncio import AsyncEngine

from tokenstore.event_loops import forks
from tokenstore_sql.connections.compiler import Compiler
from tokenstore_sql.connections.connection import NO_PARAMETERS, Connection, Parameters, StatementResult
from tokenstore_sql.errors import ConnectionLostError, ErrorTable, NoFreeSlotError, cause_of

__all__ = ["Connector", "DriverConnection", "OneTripConnection", "descriptor", "through_engine"]

Connector = Callable[[], Awaitable["DriverConnection"]]

# The kernel gives up a connection after 30 s without an answer to what was sent, or to a probe on an idle connection.
_TCP_OPTIONS: Final = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}
# An idle time so short that asking the kernel whether the server closed the connection is not worth it, in seconds.
_JUST_NOW: Final = 0.005
# References to connections of the parent process. Without them a driver would close, in this process, a socket that
# the parent still uses, and SQLite would delete files that the parent still uses.
_KEPT_FROM_CLOSING: list[object] = []


class DriverConnection(Connection):
    """A driver's own connection, in autocommit mode unless a transaction was begun.

    Args:
        driver: The driver's connection object.
        compiler: Compiles statements for this driver.
        errors: What the database's errors mean.
        begin: The SQL that begins a transaction that takes locks.
        connect: Opens another connection of this kind.
    """

    borrowed = False

    def __init__(self, driver: Any, compiler: Compiler, errors: ErrorTable, begin: str, connect: Connector) -> None:
        self.driver = driver
        self.info = {}
        self.opened_at = self.used_at = monotonic()
        self.sql_dialect = compiler.dialect
        self._forks = forks()
        self._incoming = _readable(self.socket())
        _watch_peer(self.socket())
        self._compiler = compiler
        self._errors = errors
        self._begin_sql = begin
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
        return self._forks != forks()

    def is_alive(self, idle: float) -> bool:
        """Whether a connection that has been idle for so many seconds looks usable.

        A server that ends a connection sends a message, unless it crashes. Asks the kernel whether there is something
        to read, because the event loop may not have read it yet.
        """
        if self.lost:
            return False
        return idle < _JUST_NOW or self._incoming is None or not self._incoming.poll(0)

    @abstractmethod
    def is_closed(self) -> bool:
        """Whether the driver knows that the connection is closed."""

    @abstractmethod
    def socket(self) -> int | None:
        """The socket's file descriptor; None if there is none, or the driver hides it."""

    @abstractmethod
    async def send(self, sql: str, arguments: Any, returns_rows: bool) -> StatementResult:
        """Send one statement and wait for its answer."""

    @abstractmethod
    async def close(self) -> None:
        """Say goodbye to the server, for a bounded time, and close the socket."""

    async def ping(self) -> None:
        """Ask the server for an answer."""
        await self.send_text("SELECT 1")

    def forget(self) -> None:
        """Drop the connection without using it: it belongs to another process, or its event loop is gone."""
        if self.is_foreign:
            _KEPT_FROM_CLOSING.append(self)

    async def run(self, statement: Executable, parameters: Parameters = NO_PARAMETERS) -> StatementResult:
        compiled = self._compiler(statement)
        self._unanswered = True
        try:
            found = await self.send(compiled.sql, compiled.arguments(parameters), compiled.returns_rows)
        except BaseException as error:
            self._after_error(error)
            raise
        self._unanswered = False
        return compiled.decoded(found)

    async def send_text(self, sql: str) -> None:
        """Send a statement without parameters and rows."""
        self._unanswered = True
        try:
            _ = await self.send(sql, (), False)
        except BaseException as error:
            self._after_error(error)
            raise
        self._unanswered = False

    def _after_error(self, error: BaseException) -> None:
        """Decide whether the connection can be used after an error.

        Raises:
            ConnectionLostError: The error means that the connection is lost.
        """
        if not isinstance(error, Exception):
            self._unanswered = not self.has_ended()
            return
        # An error with a code is the server's answer.
        if self._errors.code(error) is not None and not self._errors.ends_connection(error):
            self._unanswered = False
        elif isinstance(error, (OSError, *self._errors.driver_errors())):
            raise ConnectionLostError(error) from None

    def has_ended(self) -> bool:
        """Whether a statement whose caller was cancelled has ended all the same."""
        return False

    async def begin(self) -> None:
        """Begin a transaction that takes locks, unless the first statement begins it."""
        await self.send_text(self._begin_sql)
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
    """A connection for which a trip to its thread costs more than a statement, so that one trip takes several."""

    @abstractmethod
    async def run_each(self, statement: Executable, parameters: Sequence[Parameters]) -> list[StatementResult]:
        """Run a statement that writes, once for each set of parameters, in one trip; all of them or none."""


def through_engine(
    engine: AsyncEngine, errors: ErrorTable, begin: str, connection_class: Callable[..., DriverConnection]
) -> Connector:
    """Open connections with an engine's arguments and events, and take them out of the engine.

    Args:
        engine: The engine, which has no pool.
        errors: What the database's errors mean.
        begin: The SQL that begins a transaction that takes locks.
        connection_class: The class for the engine's driver.
    """
    compiler = Compiler(engine.dialect)
    dbapi_error = engine.dialect.loaded_dbapi.Error

    async def connect() -> DriverConnection:
        try:
            raw = await engine.raw_connection()
        except Exception as error:
            if errors.has_no_free_slot(cause_of(error)):
                raise NoFreeSlotError(error) from None
            if isinstance(error, dbapi_error):
                raise ConnectionLostError(error) from None
            raise
        driver = raw.driver_connection
        raw.detach()
        return connection_class(driver, compiler, errors, begin, connect)

    return connect


def descriptor(transport: Any) -> int | None:
    """The file descriptor of an asyncio transport; the drivers have no public way to theirs."""
    found = transport and transport.get_extra_info("socket")
    return int(found.fileno()) if found else None


def _watch_peer(descriptor: int | None) -> None:
    """Let the kernel notice that the server's machine is gone: a connection that only waits would never notice it."""
    if descriptor is None:
        return
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as peer:
        if peer.family not in (socket.AF_INET, socket.AF_INET6):
            return
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _TCP_OPTIONS.items():
            if hasattr(socket, name):  # not all of them on every system
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _readable(descriptor: int | None) -> Any:
    if descriptor is None or not hasattr(select, "poll"):  # Windows has none
        return None
    incoming = select.poll()
    incoming.register(descriptor, select.POLLIN)
    return incoming
