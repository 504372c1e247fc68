"""How PostgreSQL locks, waits and is set up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar, cast

from sqlalchemy import Index, Integer, Select, Table, column, func, literal_column, select, table
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import CreateIndex, DropIndex, ExecutableDDLElement

from tokenstore.cancellation import finish
from tokenstore.errors import LockTimeoutError, UnsupportedOperationError
from tokenstore.escaping import escaped
from tokenstore_sql.connections.connection import Connection
from tokenstore_sql.dialect import Dialect, LockScope
from tokenstore_sql.polling import jittered
from tokenstore_sql.postgres.connections import PostgresAlchemyConnection
from tokenstore_sql.postgres.errors import PostgresErrors
from tokenstore_sql.postgres.grammar import PostgresGrammar
from tokenstore_sql.postgres.sessions import session_of, terminate
from tokenstore_sql.termination import ending_lost_session

__all__ = ["PostgresDialect"]

T = TypeVar("T")

# Any number that is always the same: the advisory lock that keeps two processes from creating the table at once.
_SETUP_LOCK: Final = 0x746F6B656E73
# Another one, which keeps two processes from changing the tables at once; how long it is waited for, in seconds.
_MIGRATION_LOCK: Final = _SETUP_LOCK + 1
_SETUP_TIMEOUT: Final = 60
_SETUP_PAUSE: Final = 0.2
_BRIEF_WAIT: Final = "1s"


class PostgresDialect(Dialect):
    """See :class:`tokenstore_sql.dialect.Dialect`."""

    grammar = PostgresGrammar()
    errors = PostgresErrors()
    alchemy_class = PostgresAlchemyConnection
    # At a higher level a waiting caller gets 40001 in place of the row that the lock holder stored.
    isolation_level = "READ COMMITTED"

    @property
    def lock_timeout_ms(self) -> int:
        """``lock_timeout`` in whole milliseconds, as PostgreSQL counts."""
        return max(1, round(self.lock_timeout * 1000))

    @property
    def begin(self) -> str:
        # Two statements in one trip. The server may have another default level; the lock timeout ends with the
        # transaction.
        return f"BEGIN ISOLATION LEVEL {self.isolation_level}; SET LOCAL lock_timeout = {self.lock_timeout_ms}"

    async def run_locking(self, scope: LockScope, action: Callable[[], Awaitable[T]], *, brief: bool = False) -> T:
        connection = scope.connection
        if not scope.transactional or not connection.borrowed:
            # A statement on its own has no transaction in which to set the timeout; there the client's own limit
            # holds. A transaction of our own began with it.
            session = await session_of(connection)
            if session is None:
                return await action()
            return await ending_lost_session(connection, action, lambda: terminate(connection, session))
        # SET LOCAL ends with the transaction, which is also all that a pooler in transaction mode allows.
        setting = f"{self.lock_timeout_ms}ms"
        catalog = func.pg_catalog
        query = select(catalog.current_setting("lock_timeout"), catalog.set_config("lock_timeout", setting, True))
        ((found, _),), _ = await connection.run(query)
        result = await action()
        _ = await connection.run(select(catalog.set_config("lock_timeout", found, True)))
        return result

    async def count_clients(self, connection: Connection) -> int:
        catalog = func.pg_catalog
        columns = ("usename", "datname", "application_name")
        sessions = table("pg_stat_activity", *map(column, columns), schema="pg_catalog")
        query = (
            select(catalog.count(literal_column("*"), type_=Integer()))
            .select_from(sessions)
            .where(
                sessions.c.usename == func.session_user(),  # a keyword, not a function in a schema
                sessions.c.datname == catalog.current_database(),
                sessions.c.application_name == catalog.current_setting("application_name"),
            )
        )
        ((count,),), _ = await connection.run(query)
        return int(count)

    @asynccontextmanager
    async def exclusive_setup(self, connection: AsyncConnection) -> AsyncIterator[None]:
        # IF NOT EXISTS is no protection: two processes that create a table at once collide in the system catalog.
        await connection.execute(select(func.pg_catalog.pg_advisory_xact_lock(_SETUP_LOCK)))
        yield

    @asynccontextmanager
    async def exclusive_migration(self, connection: AsyncConnection) -> AsyncIterator[None]:
        # A lock of the session, tried again and again: an index is built beside the traffic in no transaction, and its
        # build would wait for the transaction of another process that waits for this lock.
        deadline = time.monotonic() + _SETUP_TIMEOUT
        try_lock = select(func.pg_catalog.pg_try_advisory_lock(_MIGRATION_LOCK))
        while not (await connection.execute(try_lock)).scalar_one():
            if time.monotonic() > deadline:
                raise LockTimeoutError(f"another process has been migrating token tables for {_SETUP_TIMEOUT} s")
            await asyncio.sleep(jittered(_SETUP_PAUSE))
        try:
            yield
        finally:
            if not connection.invalidated:
                await finish(connection.execute(select(func.pg_catalog.pg_advisory_unlock(_MIGRATION_LOCK))))

    async def change_table(self, connection: AsyncConnection, change: ExecutableDDLElement) -> None:
        async with _settings(connection, lock_timeout=_BRIEF_WAIT):
            await connection.execute(change)

    async def add_index(self, connection: AsyncConnection, index: Index) -> None:
        index.dialect_options["postgresql"]["concurrently"] = True
        # The build waits for all transactions that began before it. Nobody waits behind it.
        async with _settings(connection, lock_timeout="0", statement_timeout="0"):
            if (await connection.execute(_invalid(connection, index))).first():
                # A build that was killed leaves an index that is of no use, and yet takes time with every write.
                await connection.execute(DropIndex(index))
            await connection.execute(CreateIndex(index, if_not_exists=True))

    async def check(self, connection: AsyncConnection) -> None:
        encoding = (await connection.execute(select(func.pg_catalog.current_setting("server_encoding")))).scalar_one()
        if encoding != "UTF8":
            raise UnsupportedOperationError(
                f"the database's encoding is {escaped(encoding)}; create one with ENCODING 'UTF8'"
            )


@asynccontextmanager
async def _settings(connection: AsyncConnection, **settings: str) -> AsyncIterator[None]:
    """Change settings of the session for a while."""
    catalog = func.pg_catalog
    found = {name: (await connection.execute(select(catalog.current_setting(name)))).scalar_one() for name in settings}
    try:
        for name, value in settings.items():
            await connection.execute(select(catalog.set_config(name, value, False)))
        yield
    finally:
        for name, value in found.items():
            if not connection.invalidated:
                await finish(connection.execute(select(catalog.set_config(name, value, False))))


def _invalid(connection: AsyncConnection, index: Index) -> Select[Any]:
    """The query for an index of this name whose build did not end."""
    catalog = func.pg_catalog
    relations = table("pg_class", column("oid"), column("relname"), schema="pg_catalog")
    indexes = table("pg_index", *map(column, ("indexrelid", "indrelid", "indisvalid")), schema="pg_catalog")
    of = connection.dialect.identifier_preparer.format_table(cast(Table, index.table))
    return (
        select(indexes.c.indexrelid)
        .join_from(indexes, relations, relations.c.oid == indexes.c.indexrelid)
        .where(
            indexes.c.indrelid == catalog.to_regclass(of),
            relations.c.relname == index.name,
            indexes.c.indisvalid.is_(False),
        )
    )
