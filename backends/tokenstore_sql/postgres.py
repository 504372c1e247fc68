"""PostgreSQL, through asyncpg or psycopg."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar
from urllib.parse import urlencode

from sqlalchemy import URL, BigInteger, ColumnElement, Select, Table, Update, cast, column, func, select, table
from sqlalchemy.dialects.postgresql import insert
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
from tokenstore_sql.base import SQLBackend, pool_arguments
from tokenstore_sql.dialect import Dialect, Upsert
from tokenstore_sql.rows import Rows

__all__ = ["PostgresBackend", "PostgresDialect"]

# What libpq calls these; asyncpg understands them in a DSN, psycopg everywhere.
_LIBPQ_OPTIONS = ("host", "passfile", "sslcert", "sslcrl", "sslkey", "sslmode", "sslrootcert", "target_session_attrs")
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
        return cast(func.extract("epoch", func.clock_timestamp()) * 1_000_000, BigInteger)

    def upsert(
        self, table: Table, values: Mapping[str, Any], *, replaced: Sequence[str], also: Mapping[str, Any]
    ) -> Upsert:
        statement = insert(table).values(**values)
        return statement.on_conflict_do_update(
            index_elements=list(table.primary_key),
            set_={**{name: statement.excluded[name] for name in replaced}, **also},
        )

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

    async def count_clients(self, connection: AsyncConnection) -> int:
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
        return int((await connection.execute(query)).scalar_one())

    @asynccontextmanager
    async def waiting(self, rows: Rows) -> AsyncIterator[None]:
        # SET LOCAL ends with the transaction, which also is all that a pooler in transaction mode allows. A statement
        # on its own has no transaction to set it in; there the client's own limit holds.
        if not rows.transactional or rows.wait_is_bounded:
            yield
            return
        setting = f"{max(1, round(self.lock_timeout * 1000))}ms"
        query = select(func.current_setting("lock_timeout"), func.set_config("lock_timeout", setting, True))
        found = (await rows.connection.execute(query)).one()[0]
        rows.wait_is_bounded = not rows.borrowed
        yield
        if rows.borrowed:
            await rows.connection.execute(select(func.set_config("lock_timeout", found, True)))

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
        return create_async_engine(url, connect_args=connect, **pool_arguments(options))


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
