"""MySQL and MariaDB, through aiomysql or asyncmy."""

from __future__ import annotations

import math
import ssl
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

from sqlalchemy import (
    URL,
    BigInteger,
    ColumnElement,
    Select,
    Table,
    bindparam,
    cast,
    column,
    func,
    literal_column,
    select,
    table,
    tuple_,
)
from sqlalchemy import text as sql
from sqlalchemy.dialects.mysql import Insert, insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from tokenstore.cancellation import finish
from tokenstore.errors import (
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    ConflictError,
    LockTimeoutError,
    TableMissingError,
)
from tokenstore.options import OptionParser, positive_seconds, switch, text
from tokenstore_sql.base import ENGINE_ARGUMENTS, SQLBackend
from tokenstore_sql.connection import Connection, Connector, DriverConnection, Result, descriptor, through_engine
from tokenstore_sql.dialect import Dialect
from tokenstore_sql.ghosts import end_session, without_ghost
from tokenstore_sql.rows import Rows

__all__ = ["MySQLBackend", "MySQLDialect"]

T = TypeVar("T")

# Also, in the notes of a connection of our own: what it is set to.
_WAIT: Final = "innodb_lock_wait_timeout"
_GET_WAIT: Final = sql(f"SELECT @@SESSION.{_WAIT}")
_SET_WAIT: Final = sql(f"SET SESSION {_WAIT} = :seconds")
_WHO: Final = sql("SELECT CONNECTION_ID(), @@hostname, @@port")
_SHOW_THREADS: Final = sql("SHOW PROCESSLIST")
_KILL: Final = sql("KILL :id")
# How many statements asyncmy keeps prepared on a connection: the numbers of rows that go together make many of some.
_PREPARED: Final = 100
# The least that InnoDB knows, in seconds.
_BRIEFLY: Final = 1
# In a pooled connection's info: which thread of which server it is.
_THREAD: Final = "tokenstore.thread"


class _Thread(NamedTuple):
    """A connection as its server knows it."""

    id: int
    hostname: str
    port: int


class MySQLDialect(Dialect):
    """The ways of MySQL and MariaDB."""

    # At REPEATABLE READ, locking a row that does not exist takes a gap lock: two first inserts dead-lock.
    isolation_level = "READ COMMITTED"
    driver_error_names = ("pymysql.err.Error", "asyncmy.errors.Error")
    error_classes: ClassVar[Mapping[str, type[BackendError]]] = {
        "0": BackendUnavailableError,  # the driver's own: the connection is closed
        "1146": TableMissingError,
        "1205": LockTimeoutError,
        "3572": LockTimeoutError,
        "1213": ConflictError,
        "1020": ConflictError,  # MariaDB since 11.6.2: the row changed since this snapshot
        "1290": BackendUnavailableError,
        "1792": BackendUnavailableError,
        "1836": BackendUnavailableError,
        "1040": BackendUnavailableError,
        "1044": BackendUnavailableError,
        "1045": BackendUnavailableError,
        "1049": BackendUnavailableError,
        "1053": BackendUnavailableError,
        "1152": BackendUnavailableError,
        "1184": BackendUnavailableError,
        "1203": BackendUnavailableError,
        "1317": BackendUnavailableError,
        "1927": BackendUnavailableError,
        "2002": BackendUnavailableError,
        "2003": BackendUnavailableError,
        "2006": BackendUnavailableError,
        "2013": BackendUnavailableError,
        "2014": BackendUnavailableError,
        "2055": BackendUnavailableError,
        "4031": BackendUnavailableError,
    }

    def now(self) -> ColumnElement[int]:
        # UTC_TIMESTAMP stands still while a statement waits for a lock; SYSDATE goes on, but in the session's time
        # zone. So: the one, plus how far the other is ahead of NOW.
        since_epoch, waited = (
            func.timestampdiff(literal_column("MICROSECOND"), start, end)
            for start, end in (
                (literal_column("TIMESTAMP'1970-01-01 00:00:00'"), func.utc_timestamp(literal_column("6"))),
                # Not func.sysdate, which SQLAlchemy renders without its argument: whole seconds.
                (func.now(literal_column("6")), literal_column("SYSDATE(6)")),
            )
        )
        return cast(since_epoch + waited, BigInteger)

    def insert(self, table: Table) -> Insert:
        return insert(table)

    def or_replace(self, insert: Any, *, replaced: Sequence[str], also: Mapping[str, Any]) -> Any:
        return insert.on_duplicate_key_update({**{name: insert.inserted[name] for name in replaced}, **also})

    # A statement for each number of rows: they must not be too many.
    most_at_once = 64

    def among(self, query: Select[Any], table: Table, size: int) -> Select[Any]:
        # Alternatives between pairs, as elsewhere, make the optimizers think for longer than the server reads.
        c = table.c
        named = (
            tuple_(*(bindparam(f"{p}_{n}", type_=column.type) for p, column in (("p", c.provider), ("u", c.user_id))))
            for n in range(size)
        )
        return query.where(tuple_(c.provider, c.user_id).in_(named))

    async def count_clients(self, connection: Connection) -> int:
        # Without the privilege PROCESS they show the user's own threads alone, which are those that count. MySQL warns
        # of the one table, and MariaDB lacks the other.
        home = "information_schema" if getattr(connection.sql_dialect, "is_mariadb", False) else "performance_schema"
        threads = table("processlist", column("user"), column("db"), schema=home)
        query = (
            select(func.count())
            .select_from(threads)
            .where(threads.c.user == func.substring_index(func.user(), "@", 1), threads.c.db == func.database())
        )
        ((found,),), _ = await connection.run(query)
        if found == 0:  # performance_schema is off: then those of all users
            ((_, found),), _ = await connection.run(sql("SHOW GLOBAL STATUS LIKE 'Threads_connected'"))
        return int(found)

    async def may_look(self, connection: AsyncConnection) -> bool:
        # At REPEATABLE READ, the default, the first plain read decides what all later ones see, and locks do not; at
        # SERIALIZABLE it locks.
        return await connection.get_isolation_level() not in ("REPEATABLE READ", "SERIALIZABLE")

    async def patiently(self, rows: Rows, action: Callable[[], Awaitable[T]], *, brief: bool = False) -> T:
        connection = rows.connection
        thread = await _thread(connection)
        found = None
        if connection.borrowed:
            found = await self._set_patience(connection, _whole_seconds(self.lock_timeout))
        else:
            # One that stands on its own is undone whole when its time is up, and sent again. So it need not be told
            # from those that must not wait long, and the setting seldom changes.
            patience = _whole_seconds(self.lock_timeout) if rows.transactional else _BRIEFLY
            if connection.info.get(_WAIT) != patience:
                _ = await connection.run(_SET_WAIT, {"seconds": patience})
                connection.info[_WAIT] = patience
        alone = not (connection.borrowed or rows.transactional or brief)
        waiting = partial(self._until_free, action) if alone else action
        try:
            if thread is None:
                return await waiting()
            return await without_ghost(connection, waiting, lambda: _kill_thread(connection, thread))
        finally:
            if found is not None and not connection.lost:
                _ = await self._set_patience(connection, found)

    async def _until_free(self, action: Callable[[], Awaitable[T]]) -> T:
        deadline = time.monotonic() + self.lock_timeout
        while True:
            try:
                return await action()
            except self.driver_errors() as error:
                if self.error_code(error) != "1205" or time.monotonic() >= deadline:
                    raise

    async def _set_patience(self, connection: Connection, seconds: int) -> int:
        """Set how long the session waits for a lock; returns what it was."""
        ((found,),), _ = await connection.run(_GET_WAIT)
        if found != seconds:
            _ = await connection.run(_SET_WAIT, {"seconds": seconds})
        return int(found)

    @asynccontextmanager
    async def exclusive_setup(self, connection: AsyncConnection) -> AsyncIterator[None]:
        granted = await connection.execute(sql("SELECT GET_LOCK('tokenstore.setup', :seconds)"), {"seconds": 60})
        if granted.scalar_one() != 1:
            raise LockTimeoutError("another process has been setting up a token table for 60 s")
        try:
            yield
        finally:
            if not connection.invalidated:
                await connection.execute(sql("SELECT RELEASE_LOCK('tokenstore.setup')"))

    def error_code(self, error: BaseException) -> str | None:
        number = error.args[0] if error.args else None
        return str(number) if isinstance(number, int) else None

    def error_text(self, error: BaseException, code: str) -> str:
        # Access, names and the server's state; other messages can quote a value.
        quotable = self.error_classes.get(code) is not None or code in ("1142", "1143", "1227")
        return str(error.args[1]) if quotable and len(error.args) > 1 else ""


def _whole_seconds(lock_timeout: float) -> int:
    """As InnoDB counts them."""
    return max(1, math.ceil(lock_timeout))


async def _thread(connection: Connection) -> _Thread | None:
    """The server's thread behind a connection; None where something between us hides it."""
    if _THREAD not in connection.info:
        (found,), _ = await connection.run(_WHO)
        # A proxy greets us with a number of its own, and may give the server's thread to somebody else.
        greeted = (await connection.driver_connection()).thread_id()
        connection.info[_THREAD] = _Thread(*found) if found[0] == greeted else None
    thread: _Thread | None = connection.info[_THREAD]
    return thread


async def _kill_thread(connection: Connection, thread: _Thread) -> None:
    """End a thread whose connection was lost in the middle of a statement, and wait until it is gone."""

    async def exists(aside: Connection) -> bool:
        here = await _thread(aside)
        # Not on another server behind the same address, nor after a restart, when numbers begin anew.
        if here is None or here[1:] != thread[1:] or here.id <= thread.id:
            return False
        # Not the tables that this shows: MySQL warns of the one, and the other is empty without performance_schema.
        threads, _ = await aside.run(_SHOW_THREADS)
        return any(row[0] == thread.id for row in threads)

    await end_session(connection, exists, lambda aside: aside.run(_KILL, {"id": thread.id}))


class MySQLBackend(SQLBackend):
    """``mysql://user:password@host:3306/database``, also ``mariadb://``, ``+aiomysql`` and ``+asyncmy``."""

    dialect_class = MySQLDialect
    drivers: ClassVar[Mapping[str, str]] = {
        "mysql": "mysql+aiomysql",
        "mysql+aiomysql": "mysql+aiomysql",
        "mysql+asyncmy": "mysql+asyncmy",
        "mariadb": "mysql+aiomysql",
        "mariadb+aiomysql": "mysql+aiomysql",
        "mariadb+asyncmy": "mysql+asyncmy",
    }
    extras: ClassVar[Mapping[str, str]] = {"mysql+aiomysql": "mysql", "mysql+asyncmy": "asyncmy"}
    driver_options: ClassVar[Mapping[str, OptionParser]] = {
        "connect_timeout": positive_seconds,
        "ssl": switch,
        "ssl_ca": text,
        "ssl_cert": text,
        "ssl_key": text,
        "unix_socket": text,
    }

    @classmethod
    def _create_engine(cls, url: URL, options: Mapping[str, Any]) -> AsyncEngine:
        connect: dict[str, Any] = {
            "charset": "utf8mb4",
            "connect_timeout": max(1, round(options.get("connect_timeout", 10.0))),
        }
        if url.get_driver_name() == "asyncmy":
            connect["stmt_cache_size"] = _PREPARED
        if "unix_socket" in options:
            connect["unix_socket"] = options["unix_socket"]
        if context := _tls(options):
            connect["ssl"] = context
        return create_async_engine(url, connect_args=connect, **ENGINE_ARGUMENTS)

    @classmethod
    def _connector(cls, engine: AsyncEngine, dialect: Dialect, options: Mapping[str, Any]) -> Connector:
        connection_class = {"aiomysql": _AiomysqlConnection, "asyncmy": _AsyncmyConnection}[engine.driver]
        connect = through_engine(engine, dialect, connection_class)

        async def ready() -> DriverConnection:
            connection = await connect()
            try:
                await connection.send_text(f"SET SESSION TRANSACTION ISOLATION LEVEL {dialect.isolation_level}")
            except BaseException:
                await finish(connection.close())
                raise
            return connection

        return ready


class _MySQLConnection(DriverConnection):
    def begin_statement(self) -> str:
        return "START TRANSACTION"

    async def send(self, sql: str, arguments: Any, returns_rows: bool) -> Result:
        cursor = await self.cursor()
        _ = await cursor.execute(sql, arguments or None)
        return Result(await cursor.fetchall(), cursor.rowcount)

    @abstractmethod
    async def cursor(self) -> Any:
        """A cursor of the driver's; nothing has to close it once everything is read."""


class _AiomysqlConnection(_MySQLConnection):
    async def cursor(self) -> Any:
        return await self.driver.cursor()

    def is_closed(self) -> bool:
        # When the server has closed it, the stream is at its end.
        return bool(self.driver.closed or self.driver._reader.at_eof())

    def socket(self) -> int | None:
        return descriptor(getattr(self.driver, "_writer", None))

    async def close(self) -> None:
        if self.lost:
            self.driver.close()
        else:
            await self.driver.ensure_closed()


class _AsyncmyConnection(_MySQLConnection):
    async def cursor(self) -> Any:
        return self.driver.cursor()

    def is_closed(self) -> bool:
        transport = self._transport()
        return not self.driver.connected or (transport is not None and transport.is_closing())

    def socket(self) -> int | None:
        return descriptor(self._transport())

    def _transport(self) -> Any:
        return getattr(self.driver, "_transport", None)  # since 0.2.14

    async def close(self) -> None:
        if self.lost:
            self.driver.close()
        else:
            await self.driver.ensure_closed()


def _tls(options: Mapping[str, Any]) -> ssl.SSLContext | None:
    if not (options.get("ssl") or options.keys() & {"ssl_ca", "ssl_cert", "ssl_key"}):
        return None
    try:
        context = ssl.create_default_context(cafile=options.get("ssl_ca"))
        if "ssl_cert" in options:
            context.load_cert_chain(options["ssl_cert"], options.get("ssl_key"))
    except OSError as error:
        raise ConfigurationError(f"ssl_ca, ssl_cert or ssl_key cannot be loaded: {error.strerror or error}") from None
    return context
