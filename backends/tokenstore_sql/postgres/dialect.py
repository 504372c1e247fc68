"""How PostgreSQL locks, waits and is set up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from sqlalchemy import Integer, column, func, literal_column, select, table
from sqlalchemy.ext.asyncio import AsyncConnection

from tokenstore.errors import UnsupportedOperationError
from tokenstore.escaping import escaped
from tokenstore_sql.connections.connection import Connection
from tokenstore_sql.dialect import Dialect, LockScope
from tokenstore_sql.postgres.connections import PostgresAlchemyConnection
from tokenstore_sql.postgres.errors import PostgresErrors
from tokenstore_sql.postgres.grammar import PostgresGrammar
from tokenstore_sql.postgres.sessions import session_of, terminate
from tokenstore_sql.termination import ending_lost_session

__all__ = ["PostgresDialect"]

T = TypeVar("T")

# Any number that is always the same: the advisory lock that keeps two processes from creating the table at once.
_SETUP_LOCK: Final = 0x746F6B656E73


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

    async def check(self, connection: AsyncConnection) -> None:
        encoding = (await connection.execute(select(func.pg_catalog.current_setting("server_encoding")))).scalar_one()
        if encoding != "UTF8":
            raise UnsupportedOperationError(
                f"the database's encoding is {escaped(encoding)}; create one with ENCODING 'UTF8'"
            )
