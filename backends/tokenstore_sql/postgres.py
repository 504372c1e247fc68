"""PostgreSQL, through asyncpg or psycopg."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Final, NamedTuple, TypeVar
from urllib.parse import urlencode

from sqlalchemy import (
    URL,
    BigInteger,
    ColumnElement,
    Double,
    Integer,
    Select,
    Table,
    Update,
    and_,
    bindparam,
    cast,
    column,
    func,
    literal_column,
    select,
    table,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY, Insert, insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from tokenstore.errors import (
    BackendError,
    BackendUnavailableError,
    ConflictError,
    LockTimeoutError,
    TableMissingError,
    UnsupportedOperationError,
)
from tokenstore.options import OptionParser, positive_seconds, switch, text
from tokenstore_sql.base import ENGINE_ARGUMENTS, SQLBackend
from tokenstore_sql.connection import Connection, Connector, DriverConnection, Result, descriptor, through_engine
from tokenstore_sql.dialect import Dialect, on_conflict_replace
from tokenstore_sql.ghosts import end_session, without_ghost
from tokenstore_sql.rows import Rows

__all__ = ["PostgresBackend", "PostgresDialect"]

T = TypeVar("T")

# What libpq calls these; asyncpg understands them in a DSN, psycopg everywhere.
_LIBPQ_OPTIONS = ("host", "passfile", "sslcert", "sslcrl", "sslkey", "sslmode", "sslrootcert", "target_session_attrs")
# How long a statement that writes the rows of several callers waits for a lock on one of them.
_BRIEFLY_MS: Final = 100
# In a connection's notes: the server's process behind it.
_SESSION: Final = "tokenstore.session"
# Any number that is always the same: it keeps two processes from creating the table at once.
_SETUP_LOCK = 0x746F6B656E73


class PostgresDialect(Dialect):
    """PostgreSQL's ways."""

    # At a higher level a waiter gets 40001 in place of the row that the holder stored.
    isolation_level = "READ COMMITTED"
    driver_error_names = ("asyncpg.PostgresError", "asyncpg.InterfaceError", "psycopg.Error")
    error_classes: ClassVar[Mapping[str, type[BackendError]]] = {
        "42P01": TableMissingError,
        "3F000": TableMissingError,
        "55P03": LockTimeoutError,
        "57014": LockTimeoutError,  # statement_timeout, where an administrator set one shorter than ours
        "40": ConflictError,
        "0A000": ConflictError,  # a cached plan that another process's DDL made void
        "25006": BackendUnavailableError,  # a primary that became a standby
        "25P03": BackendUnavailableError,
        "08": BackendUnavailableError,
        "28": BackendUnavailableError,
        "3D000": BackendUnavailableError,
        "53": BackendUnavailableError,
        "57P": BackendUnavailableError,
    }

    def now(self) -> ColumnElement[int]:
        # now() is the transaction's start; it stands still while a statement waits.
        seconds: ColumnElement[float] = func.date_part(literal_column("'epoch'"), func.clock_timestamp())
        return cast(seconds * literal_column("1000000"), BigInteger)

    def insert(self, table: Table) -> Insert:
        return insert(table)

    def or_replace(self, insert: Any, *, replaced: Sequence[str], also: Mapping[str, Any]) -> Any:
        return on_conflict_replace(insert, replaced, also)

    # An array for each column: one statement, and one plan.
    any_number = True
    most_at_once = 500

    def among(self, query: Select[Any], table: Table, size: int) -> Select[Any]:
        # A lookup for each, kept as such by the OFFSET: where the table is small, a join of the two reads all of it.
        c = table.c
        wanted = _unnested({"p": c.provider, "u": c.user_id})
        one = query.where(c.provider == wanted.c.p, c.user_id == wanted.c.u).offset(literal_column("0"))
        found = one.lateral("found")
        return select(*found.c).select_from(wanted.join(found, true()))

    def insert_many(self, table: Table, columns: Mapping[str, str], now: ColumnElement[int], size: int) -> Insert:
        rows = _unnested({name: table.c[column] for name, column in columns.items()})
        # Somebody's lock on one of the rows must not keep the others waiting for long.
        briefly = func.set_config("lock_timeout", f"{_BRIEFLY_MS}ms", True).is_not(None)
        return insert(table).from_select(
            [*columns.values(), "created_at", "updated_at"], select(*rows.c, now, now).where(briefly)
        )

    def together(self, names: tuple[str, ...], rows: Sequence[Sequence[Any]]) -> Mapping[str, Any]:
        return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))

    def for_update(self, query: Select[Any]) -> Select[Any]:
        return query.with_for_update(key_share=True)  # NO KEY: the key itself never changes

    def lock_and_read(self, query: Select[Any], clock: ColumnElement[int]) -> Select[Any]:
        # As in lock_first, the clock beside the lock would be read before the wait.
        locked = self.for_update(query).subquery("locked")
        return select(*locked.c, clock)

    def lock_first(self, update: Update, table: Table, this_row: Sequence[ColumnElement[bool]]) -> Update:
        # New values are computed before the wait, and once more only if the row has changed meanwhile. A subquery that
        # locks is done with before anything is computed from its rows.
        key = list(table.primary_key)
        locked = self.for_update(select(*key).where(*this_row)).subquery("locked")
        return update.where(*(column == locked.c[column.name] for column in key))

    async def count_clients(self, connection: Connection) -> int:
        sessions = table("pg_stat_activity", *map(column, ("usename", "datname", "application_name")))
        query = (
            select(func.count())
            .select_from(sessions)
            .where(
                sessions.c.usename == func.session_user(),
                sessions.c.datname == func.current_database(),
                sessions.c.application_name == func.current_setting("application_name"),
            )
        )
        ((count,),), _ = await connection.run(query)
        return int(count)

    async def patiently(self, rows: Rows, action: Callable[[], Awaitable[T]], *, brief: bool = False) -> T:
        # SET LOCAL ends with the transaction, which also is all that a pooler in transaction mode allows. A statement
        # on its own has no transaction to set it in; there the client's own limit holds. Where the transaction is
        # ours, it began with this.
        if not rows.transactional or not rows.connection.borrowed:
            return await self._without_ghosts(rows.connection, action)
        setting = f"{milliseconds(self.lock_timeout)}ms"
        query = select(func.current_setting("lock_timeout"), func.set_config("lock_timeout", setting, True))
        ((found, _),), _ = await rows.connection.run(query)
        result = await action()
        _ = await rows.connection.run(select(func.set_config("lock_timeout", found, True)))
        return result

    async def _without_ghosts(self, connection: Connection, action: Callable[[], Awaitable[T]]) -> T:
        """Carry out a write; if its connection is lost, see that the server does not carry it out later."""
        session = await _session(connection)
        if session is None:
            return await action()
        return await without_ghost(connection, action, lambda: _terminate(connection, session))

    @asynccontextmanager
    async def exclusive_setup(self, connection: AsyncConnection) -> AsyncIterator[None]:
        # IF NOT EXISTS is no protection: two that create at once collide in the system catalog.
        await connection.execute(select(func.pg_advisory_xact_lock(_SETUP_LOCK)))
        yield

    async def check(self, connection: AsyncConnection) -> None:
        encoding = (await connection.execute(select(func.current_setting("server_encoding")))).scalar_one()
        if encoding != "UTF8":
            raise UnsupportedOperationError(f"the database's encoding is {encoding}; create one with ENCODING 'UTF8'")

    def error_code(self, error: BaseException) -> str | None:
        code = getattr(error, "sqlstate", None)
        if code is None and type(error).__name__ == "InvalidCachedStatementError":
            return "0A000"  # asyncpg's adapter drops it
        if code is None and any(cls.__name__ == "OperationalError" for cls in type(error).__mro__):
            return "08000"  # libpq has none where it cannot connect, or loses the connection
        return code if isinstance(code, str) else None

    def error_text(self, error: BaseException, code: str) -> str:
        # The first line is the server's primary message; DETAIL, which can quote a row, follows. Class 22 (data) and
        # 23 (constraints) quote values in the first line, too.
        if code.startswith(("22", "23")):
            return ""
        return str(error).partition("\n")[0].rpartition(">: ")[2]


class _Session(NamedTuple):
    """The server's side of a connection.

    Attributes:
        pid: The number of the server's process.
        seen_at: When it was already there, in seconds of :func:`time.monotonic`.
    """

    pid: int
    seen_at: float


async def _session(connection: Connection) -> _Session | None:
    """The server's process behind a connection, as the server told when greeting; None where it told none."""
    if _SESSION not in connection.info:
        driver = await connection.driver_connection()
        pid = driver.get_server_pid() if hasattr(driver, "get_server_pid") else driver.info.backend_pid
        connection.info[_SESSION] = _Session(pid, time.monotonic()) if pid else None
    session: _Session | None = connection.info[_SESSION]
    return session


async def _terminate(connection: Connection, session: _Session) -> None:
    """End a server process whose connection was lost in the middle of a statement, and wait until it is gone."""
    processes = table(
        "pg_stat_activity", *map(column, ("pid", "usename", "datname", "backend_start")), schema="pg_catalog"
    )
    # A process with that number which began later is another connection's. A pooler tells numbers that no process has.
    this_process = and_(
        processes.c.pid == bindparam("pid", type_=Integer()),
        processes.c.usename == func.session_user(),
        processes.c.datname == func.current_database(),
        func.date_part(literal_column("'epoch'"), func.clock_timestamp() - processes.c.backend_start)
        >= bindparam("age", type_=Double()),
    )

    def parameters() -> dict[str, Any]:
        return {"pid": session.pid, "age": time.monotonic() - session.seen_at}

    async def exists(aside: Connection) -> bool:
        found, _ = await aside.run(select(processes.c.pid).where(this_process), parameters())
        return len(found) > 0

    async def end(aside: Connection) -> None:
        _ = await aside.run(select(func.pg_terminate_backend(processes.c.pid)).where(this_process), parameters())

    await end_session(connection, exists, end)


class PostgresBackend(SQLBackend):
    """``postgresql://user:password@host:5432/database``, also ``postgres://``, ``+asyncpg`` and ``+psycopg``."""

    dialect_class = PostgresDialect
    drivers: ClassVar[Mapping[str, str]] = {
        "postgresql": "postgresql+asyncpg",
        "postgres": "postgresql+asyncpg",
        "postgresql+asyncpg": "postgresql+asyncpg",
        "postgresql+psycopg": "postgresql+psycopg",
    }
    extras: ClassVar[Mapping[str, str]] = {"postgresql+asyncpg": "postgres", "postgresql+psycopg": "psycopg"}
    driver_options: ClassVar[Mapping[str, OptionParser]] = {
        "application_name": text,
        "connect_timeout": positive_seconds,
        "prepared_statements": switch,
        **dict.fromkeys(_LIBPQ_OPTIONS, text),
    }

    @classmethod
    def _create_engine(cls, url: URL, options: Mapping[str, Any]) -> AsyncEngine:
        connect = {
            "postgresql+asyncpg": _asyncpg_arguments,
            "postgresql+psycopg": _psycopg_arguments,
        }[url.drivername](options)
        return create_async_engine(url, connect_args=connect, **ENGINE_ARGUMENTS)

    @classmethod
    def _connector(cls, engine: AsyncEngine, dialect: Dialect, options: Mapping[str, Any]) -> Connector:
        prepares = options.get("prepared_statements", True)
        connection_class = {
            "asyncpg": _PreparingAsyncpgConnection if prepares else _AsyncpgConnection,
            "psycopg": _PsycopgConnection,
        }[engine.driver]
        return through_engine(engine, dialect, connection_class)


def milliseconds(lock_timeout: float) -> int:
    """As PostgreSQL counts."""
    return max(1, round(lock_timeout * 1000))


def _unnested(columns: Mapping[str, ColumnElement[Any]]) -> Any:
    """A table of parameters: an array for each column."""
    arrays = [bindparam(name, type_=ARRAY(column.type)) for name, column in columns.items()]
    return func.unnest(*arrays).table_valued(*columns, name="given").render_derived()


class _PostgresConnection(DriverConnection):
    def begin_statement(self) -> str:
        # One trip. The level may have another default here; the limit ends with the transaction.
        return (
            f"BEGIN ISOLATION LEVEL {self._dialect.isolation_level}; "
            f"SET LOCAL lock_timeout = {milliseconds(self._dialect.lock_timeout)}"
        )


class _AsyncpgConnection(_PostgresConnection):
    def is_closed(self) -> bool:
        return bool(self.driver.is_closed())

    def socket(self) -> int | None:
        return descriptor(getattr(self.driver, "_transport", None))

    async def send(self, sql: str, arguments: Any, returns_rows: bool) -> Result:
        if returns_rows:
            rows = await self.driver.fetch(sql, *arguments)
            return Result(rows, len(rows))
        return Result((), _changed(await self.driver.execute(sql, *arguments)))

    async def close(self) -> None:
        await self.driver.close()


class _PreparingAsyncpgConnection(_AsyncpgConnection):
    """Has its prepared statements at hand, where the driver would look up each text anew."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._prepared: dict[str, Any] = {}

    async def send(self, sql: str, arguments: Any, returns_rows: bool) -> Result:
        if not arguments:
            return await super().send(sql, arguments, returns_rows)
        try:
            if (statement := self._prepared.get(sql)) is None:
                statement = self._prepared[sql] = await self.driver.prepare(sql)
            rows = await statement.fetch(*arguments)
        except Exception:
            self._prepared.pop(sql, None)  # another process's DDL may have made it void
            raise
        return Result(rows, len(rows) if returns_rows else _changed(statement.get_statusmsg()))


def _changed(status: str) -> int:
    """How many rows: "UPDATE 1", "INSERT 0 1", "BEGIN"."""
    last = status.rpartition(" ")[2]
    return int(last) if last.isdigit() else 0


class _PsycopgConnection(_PostgresConnection):
    def is_closed(self) -> bool:
        return bool(self.driver.closed)

    def socket(self) -> int | None:
        return int(self.driver.fileno())

    async def send(self, sql: str, arguments: Any, returns_rows: bool) -> Result:
        cursor = await self.driver.execute(sql, arguments or None)
        rows = await cursor.fetchall() if returns_rows else ()
        return Result(rows, cursor.rowcount)

    async def close(self) -> None:
        await self.driver.close()


def _libpq(options: Mapping[str, Any]) -> dict[str, str]:
    return {name: options[name] for name in _LIBPQ_OPTIONS if name in options}


def _asyncpg_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {"timeout": options.get("connect_timeout", 10.0)}
    if "application_name" in options:
        arguments["server_settings"] = {"application_name": options["application_name"]}
    if libpq := _libpq(options):
        # Keyword arguments win over the DSN, so this one carries nothing but these options.
        arguments["dsn"] = f"postgresql://?{urlencode(libpq)}"
    if not options.get("prepared_statements", True):
        # A pooler in transaction mode hands each transaction another server, which knows nothing of our statements.
        arguments |= {
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": lambda: "",
        }
    return arguments


def _psycopg_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "connect_timeout": max(1, round(options.get("connect_timeout", 10.0))),
        **_libpq(options),
    }
    if "application_name" in options:
        arguments["application_name"] = options["application_name"]
    if not options.get("prepared_statements", True):
        arguments["prepare_threshold"] = None
    return arguments
