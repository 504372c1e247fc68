"""MySQL and MariaDB, through aiomysql or asyncmy."""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar, Final, NamedTuple

from sqlalchemy import (
    URL,
    BigInteger,
    ColumnElement,
    Table,
    cast,
    column,
    event,
    func,
    literal_column,
    select,
    table,
)
from sqlalchemy import text as sql
from sqlalchemy.dialects.mysql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from tokenstore.errors import (
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    ConflictError,
    LockTimeoutError,
    TableMissingError,
)
from tokenstore.options import OptionParser, positive_seconds, switch, text
from tokenstore_sql.base import SQLBackend, beside, pool_arguments
from tokenstore_sql.dialect import Dialect, Upsert
from tokenstore_sql.rows import Rows

__all__ = ["MySQLBackend", "MySQLDialect"]

_WAIT: Final = "innodb_lock_wait_timeout"
# In a pooled connection's info: which thread of which server it is.
_THREAD: Final = "tokenstore.thread"
# How long to try to reach a server on which a cancelled statement goes on.
_KILL_TIMEOUT: Final = 5.0


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

    def __init__(self, lock_timeout: float) -> None:
        super().__init__(lock_timeout)
        self._kills: set[asyncio.Task[None]] = set()

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

    def upsert(
        self, table: Table, values: Mapping[str, Any], *, replaced: Sequence[str], also: Mapping[str, Any]
    ) -> Upsert:
        statement = insert(table).values(**values)
        return statement.on_duplicate_key_update({**{name: statement.inserted[name] for name in replaced}, **also})

    async def count_clients(self, connection: AsyncConnection) -> int:
        # Without the privilege PROCESS they show the user's own threads alone, which are those that count. MySQL warns
        # of the one table, and MariaDB lacks the other.
        home = "information_schema" if getattr(connection.dialect, "is_mariadb", False) else "performance_schema"
        threads = table("processlist", column("user"), column("db"), schema=home)
        query = (
            select(func.count())
            .select_from(threads)
            .where(threads.c.user == func.substring_index(func.user(), "@", 1), threads.c.db == func.database())
        )
        found = int((await connection.execute(query)).scalar_one())
        if found == 0:  # performance_schema is off: then those of all users
            found = int((await connection.execute(sql("SHOW GLOBAL STATUS LIKE 'Threads_connected'"))).one()[1])
        return found

    async def may_look(self, connection: AsyncConnection) -> bool:
        # At REPEATABLE READ, the default, the first plain read decides what all later ones see, and locks do not; at
        # SERIALIZABLE it locks.
        return await connection.get_isolation_level() not in ("REPEATABLE READ", "SERIALIZABLE")

    @asynccontextmanager
    async def waiting(self, rows: Rows) -> AsyncIterator[None]:
        connection = rows.connection
        thread = await _thread(connection)
        # Connections of our own got the setting when they were made.
        found = await self._set_patience(connection, _whole_seconds(self.lock_timeout)) if rows.borrowed else None
        try:
            yield
        finally:
            if connection.invalidated:
                self._kill(connection.engine, thread)
            elif found is not None:
                await self._set_patience(connection, found)

    async def _set_patience(self, connection: AsyncConnection, seconds: int) -> int:
        """Set how long the session waits for a lock; returns what it was."""
        found = (await connection.execute(sql(f"SELECT @@SESSION.{_WAIT}"))).scalar_one()
        if found != seconds:
            await connection.execute(sql(f"SET SESSION {_WAIT} = :seconds"), {"seconds": seconds})
        return int(found)

    def _kill(self, engine: AsyncEngine, thread: _Thread | None) -> None:
        """End a thread whose connection was given up in the middle of a statement: cancelled, that is, or cut.

        The drivers just close the socket, which the server does not notice while it waits for a lock: when it gets the
        lock it would still write what nobody waits for any more, over whatever was stored meanwhile.
        """
        if thread is not None:
            task = asyncio.create_task(_kill_thread(engine, thread))
            self._kills.add(task)
            task.add_done_callback(self._kills.discard)

    async def aclose(self) -> None:
        # A forked child, or a second event loop, finds those of its predecessor.
        here = asyncio.get_running_loop()
        if kills := [task for task in self._kills if task.get_loop() is here]:
            await asyncio.wait(kills)

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


async def _thread(connection: AsyncConnection) -> _Thread | None:
    """The server's thread behind a connection; None where something between us hides it."""
    raw = await connection.get_raw_connection()
    if _THREAD not in raw.info:
        found = (await connection.execute(sql("SELECT CONNECTION_ID(), @@hostname, @@port"))).one()
        # A proxy greets us with a number of its own, and may give the server's thread to somebody else.
        driver_connection: Any = raw.driver_connection
        raw.info[_THREAD] = _Thread(*found) if found[0] == driver_connection.thread_id() else None
    thread: _Thread | None = raw.info[_THREAD]
    return thread


async def _kill_thread(engine: AsyncEngine, thread: _Thread) -> None:
    """Over a connection beside the pool, all of whose connections may be waiting."""
    aside = beside(engine)
    # Whatever goes wrong here: what is not killed ends with its own lock wait timeout.
    with suppress(Exception):
        try:
            async with asyncio.timeout(_KILL_TIMEOUT), aside.connect() as connection:
                here = await _thread(connection)
                # Not on another server behind the same address, nor after a restart, when numbers begin anew.
                if here is not None and here[1:] == thread[1:] and here.id > thread.id:
                    await connection.execute(sql("KILL :id"), {"id": thread.id})
        finally:
            await aside.dispose()


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
        if "unix_socket" in options:
            connect["unix_socket"] = options["unix_socket"]
        if context := _tls(options):
            connect["ssl"] = context
        engine = create_async_engine(url, connect_args=connect, **pool_arguments(options))
        patience = _whole_seconds(cls.lock_timeout_of(options))

        @event.listens_for(engine.sync_engine, "connect")
        def bound_waits(dbapi_connection: Any, _record: object) -> None:
            cursor = dbapi_connection.cursor()
            cursor.execute(f"SET SESSION {_WAIT} = {patience}")
            cursor.close()

        return engine


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
