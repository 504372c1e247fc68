"""The database of a row of the matrix, seen from outside: waiting sessions, open transactions, extra connections."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import parse_qsl

from sqlalchemy import event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from support import servers
from support.matrix import Row
from support.polling import until
from tokenstore import AuthTokenStore
from tokenstore_sql.connections.connection import Connection
from tokenstore_sql.connections.source import Source

# InnoDB updates its lists of transactions only if they were not read for 100 ms, so poll less often than that.
_INNODB_POLL_INTERVAL = 0.11
_WAITING = {
    "postgres": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'",
    # Not from innodb_trx: MySQL 9 cannot show a query that contains binary values.
    "mysql": """SHOW GLOBAL STATUS WHERE variable_name = 'Innodb_row_lock_current_waits'""",
}
_OPEN = {
    "postgres": """SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL""",
    "mysql": """SELECT count(*) FROM information_schema.innodb_trx t JOIN information_schema.processlist p
        ON p.id = t.trx_mysql_thread_id WHERE p.db = database()""",
}

_SETTINGS = {
    "postgres": ["SHOW lock_timeout", "SHOW transaction_isolation", "SHOW statement_timeout"],
    "mysql": [
        "SELECT @@innodb_lock_wait_timeout",
        "SHOW VARIABLES WHERE variable_name RLIKE '^(tx|transaction)_isolation$'",
        "SELECT @@autocommit",
    ],
    "sqlite": ["PRAGMA busy_timeout"],
}


class Place:
    """One table of one row's database.

    Attributes:
        url: The URL for ``open_store``.
        engine_url: The URL for SQLAlchemy.
        table: The table's name.
        options: The options with which a store on an engine or a session uses this table.
    """

    def __init__(self, row: Row, url: str) -> None:
        self.row = row
        self.url = url
        plain, _, query = url.partition("?")
        self.engine_url = plain.replace("sqlite:", "sqlite+aiosqlite:")
        self.options: dict[str, Any] = dict(parse_qsl(query))
        self.table = self.options.get("table", "oauth_tokens")

    def server(self) -> servers.Server:
        found = {
            "postgres": servers.postgres,
            "mysql": servers.mysql if self.row.name.startswith("mysql9") else servers.mariadb,
        }[self.row.mark]()
        assert found is not None
        return found

    def waiting(self) -> int:
        """Return how many sessions wait for a lock; not for SQLite."""
        [[*_, count]] = self.server().execute(_WAITING[self.row.mark])
        return int(count)

    def open_transactions(self) -> int:
        """Return how many transactions are open; for SQLite 1 if one holds the write lock or a snapshot."""
        if self.row.mark == "sqlite":
            connection = sqlite3.connect(make_url(self.url).database or "", timeout=0)
            try:
                [(busy, _, _)] = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                connection.close()
            return int(busy)
        try:
            [[count]] = self.server().execute(_OPEN[self.row.mark])
        except DBAPIError as error:
            if "Cannot convert string" not in str(error.orig):
                raise
            return 1  # MySQL raises this error while a statement with binary values is executed
        return int(count)

    async def until_waiting(self, store: AuthTokenStore | None = None, count: int = 1) -> None:
        """Wait until so many sessions wait for a lock; on SQLite, until ``store`` has so many connections in use."""
        if self.row.mark == "sqlite":
            assert store is not None
            source = source_of(store)
            await until(lambda: source.in_use >= count)
        else:
            await until(lambda: self.waiting() >= count)

    async def until_idle(self) -> None:
        """Wait until no transaction is open."""
        await until(lambda: self.open_transactions() == 0, _INNODB_POLL_INTERVAL if self.row.mark == "mysql" else 0.005)

    @asynccontextmanager
    async def held(self, user_id: str = "u1") -> AsyncIterator[AsyncConnection]:
        """Lock the row in a transaction of another connection, which is rolled back at the end."""
        level = "AUTOCOMMIT" if self.row.mark == "sqlite" else "READ COMMITTED"  # which locks only the row
        async with app_engine(self, isolation_level=level) as engine, engine.connect() as connection:
            if self.row.mark == "sqlite":
                await connection.exec_driver_sql("BEGIN IMMEDIATE")
                await connection.execute(text(f"DELETE FROM {self.table} WHERE user_id = :u"), {"u": user_id})
            else:
                query = f"SELECT 1 FROM {self.table} WHERE provider = 'github' AND user_id = :u FOR UPDATE"
                assert (await connection.execute(text(query), {"u": user_id})).all()
            yield connection
            if self.row.mark == "sqlite":
                await connection.exec_driver_sql("ROLLBACK")
            await connection.rollback()


@contextmanager
def new_database(row: Row, folder: Path) -> Iterator[tuple[str, str]]:
    """Create an empty database; yield its URL for an asynchronous driver and for a synchronous one."""
    if row.mark == "sqlite":
        yield f"sqlite:///{folder}/own.db", f"sqlite:///{folder}/own.db"
        return
    start: dict[str, Callable[[], servers.Server | None]] = {
        "postgresql": servers.postgres,
        "mariadb": servers.mariadb,
        "mysql9": servers.mysql,
    }
    kind, _, driver = row.name.partition("+")
    server = start[kind]()
    assert server is not None
    name = f"own_{token_hex(6)}"
    server.execute(f"CREATE DATABASE {name}")
    try:
        yield server.url(driver, name), server.url("psycopg" if kind == "postgresql" else "pymysql", name)
    finally:
        server.execute(f"DROP DATABASE {name}{' WITH (FORCE)' * (kind == 'postgresql')}")


@asynccontextmanager
async def app_engine(place: Place, **arguments: Any) -> AsyncIterator[AsyncEngine]:
    """Make an engine as an application does; at the end, check that all connections were returned."""
    engine = create_async_engine(place.engine_url, **arguments)
    try:
        yield engine
        pool: Any = engine.sync_engine.pool
        if hasattr(pool, "checkedout"):
            assert pool.checkedout() == 0
    finally:
        await engine.dispose()


def source_of(store: AuthTokenStore) -> Source:
    """Return the source of a store's connections, to count those in use."""
    backend: Any = store._backend
    source: Source = backend._source
    return source


@asynccontextmanager
async def connection_of(store: AuthTokenStore) -> AsyncIterator[Connection]:
    """Take one of a store's own connections, as its next statement would."""
    source = source_of(store)
    connection = await source.acquire(transactional=False, write=False)
    try:
        yield connection
    finally:
        await source.release(connection)


async def connection_settings(engine: AsyncEngine, row: Row, connections: int) -> list[list[list[tuple[object, ...]]]]:
    """Return the settings of that many connections, opened at the same time so that they are different ones."""
    async with AsyncExitStack() as stack:
        queries, found = _SETTINGS[row.mark], []
        for _ in range(connections):
            connection = await stack.enter_async_context(engine.connect())
            found.append([[tuple(row) for row in await connection.exec_driver_sql(query)] for query in queries])
        return found


# ---- Errors


def password_of(place: Place) -> str:
    return make_url(place.engine_url).password or "no password here"


def is_whole(store: AuthTokenStore) -> bool:
    """Whether all connections of a store have been returned."""
    return source_of(store).in_use == 0


def on_connect(engine: AsyncEngine, *statements: str) -> None:
    """Run these statements on each new connection of an engine."""

    @event.listens_for(engine.sync_engine, "connect")
    def prepare(dbapi_connection: Any, _record: object) -> None:
        cursor = dbapi_connection.cursor()
        for statement in statements:
            cursor.execute(statement)
        cursor.close()
