"""How MySQL and MariaDB lock, wait and are set up."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, TypeVar

from sqlalchemy import Index, column, func, select, table
from sqlalchemy import text as sql
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import ExecutableDDLElement

from tokenstore.cancellation import finish
from tokenstore.errors import LockTimeoutError
from tokenstore_sql.connections.connection import Connection
from tokenstore_sql.dialect import Dialect, LockScope
from tokenstore_sql.mysql.alchemy import MySQLAlchemyConnection
from tokenstore_sql.mysql.errors import MySQLErrors
from tokenstore_sql.mysql.grammar import MySQLGrammar
from tokenstore_sql.mysql.threads import kill, thread_of
from tokenstore_sql.termination import ending_lost_session

__all__ = ["MySQLDialect"]

T = TypeVar("T")

# The setting's name; also, in the notes of a connection of our own, the value that it has.
_WAIT: Final = "innodb_lock_wait_timeout"
_GET_WAIT: Final = sql(f"SELECT @@SESSION.{_WAIT}")
_SET_WAIT: Final = sql(f"SET SESSION {_WAIT} = :seconds")
# InnoDB's shortest lock wait timeout, in seconds.
_SHORTEST_WAIT: Final = 1
_SETUP_TIMEOUT: Final = 60
# How long a change of a table, and an index, wait for the table, in seconds.
_BRIEF_WAIT: Final = 1
_INDEX_WAIT: Final = 10


class MySQLDialect(Dialect):
    """See :class:`tokenstore_sql.dialect.Dialect`."""

    grammar = MySQLGrammar()
    errors = MySQLErrors()
    alchemy_class = MySQLAlchemyConnection
    # At REPEATABLE READ, locking a row that does not exist takes a gap lock: two first inserts dead-lock.
    isolation_level = "READ COMMITTED"

    @property
    def begin(self) -> str:
        return "START TRANSACTION"

    async def run_locking(self, scope: LockScope, action: Callable[[], Awaitable[T]], *, brief: bool = False) -> T:
        connection = scope.connection
        thread = await thread_of(connection)
        found = None
        if connection.borrowed:
            found = await self._set_wait(connection, self._whole_seconds)
        else:
            # A statement on its own is undone as a whole on timeout, and can be sent again. So it may have the shortest
            # timeout, and the setting seldom has to be changed.
            seconds = self._whole_seconds if scope.transactional else _SHORTEST_WAIT
            if connection.info.get(_WAIT) != seconds:
                _ = await connection.run(_SET_WAIT, {"seconds": seconds})
                connection.info[_WAIT] = seconds
        alone = not (connection.borrowed or scope.transactional or brief)
        waiting = partial(self._until_free, action) if alone else action
        try:
            if thread is None:
                return await waiting()
            return await ending_lost_session(connection, waiting, lambda: kill(connection, thread))
        finally:
            if found is not None and not connection.lost:
                _ = await self._set_wait(connection, found)

    @property
    def _whole_seconds(self) -> int:
        """``lock_timeout`` as InnoDB counts."""
        return max(_SHORTEST_WAIT, math.ceil(self.lock_timeout))

    async def _until_free(self, action: Callable[[], Awaitable[T]]) -> T:
        """Send a statement again while its lock is not free, until ``lock_timeout`` has passed."""
        deadline = time.monotonic() + self.lock_timeout
        while True:
            try:
                return await action()
            except self.errors.driver_errors() as error:
                if self.errors.code(error) != "1205" or time.monotonic() >= deadline:
                    raise

    async def _set_wait(self, connection: Connection, seconds: int) -> int:
        """Set how long the session waits for a lock. Returns the former setting, in seconds."""
        ((found,),), _ = await connection.run(_GET_WAIT)
        if found != seconds:
            _ = await connection.run(_SET_WAIT, {"seconds": seconds})
        return int(found)

    async def count_clients(self, connection: Connection) -> int:
        # Without the privilege PROCESS these tables show the threads of this user alone, which are the ones that count.
        # MySQL warns that the one table is deprecated, and MariaDB lacks the other.
        home = "information_schema" if getattr(connection.sql_dialect, "is_mariadb", False) else "performance_schema"
        threads = table("processlist", column("user"), column("db"), schema=home)
        query = (
            select(func.count())
            .select_from(threads)
            .where(threads.c.user == func.substring_index(func.user(), "@", 1), threads.c.db == func.database())
        )
        ((found,),), _ = await connection.run(query)
        if found == 0:  # performance_schema is off: count the threads of all users
            ((_, found),), _ = await connection.run(sql("SHOW GLOBAL STATUS LIKE 'Threads_connected'"))
        return int(found)

    async def may_look(self, connection: AsyncConnection) -> bool:
        # At REPEATABLE READ, the default, the first plain read decides what all later reads see, and locks do not; at
        # SERIALIZABLE it locks.
        return await connection.get_isolation_level() not in ("REPEATABLE READ", "SERIALIZABLE")

    @asynccontextmanager
    async def exclusive_setup(self, connection: AsyncConnection) -> AsyncIterator[None]:
        granted = await connection.execute(
            sql("SELECT GET_LOCK('tokenstore.setup', :seconds)"), {"seconds": _SETUP_TIMEOUT}
        )
        if granted.scalar_one() != 1:
            raise LockTimeoutError(f"another process has been setting up a token table for {_SETUP_TIMEOUT} s")
        try:
            yield
        finally:
            if not connection.invalidated:
                await connection.execute(sql("SELECT RELEASE_LOCK('tokenstore.setup')"))

    async def change_table(self, connection: AsyncConnection, change: ExecutableDDLElement) -> None:
        async with _metadata_wait(connection, _BRIEF_WAIT):
            await connection.execute(change)

    async def add_index(self, connection: AsyncConnection, index: Index) -> None:
        # The build waits for the table twice. The second time, at its end, a time-out would undo it.
        async with _metadata_wait(connection, _INDEX_WAIT):
            await super().add_index(connection, index)


@asynccontextmanager
async def _metadata_wait(connection: AsyncConnection, seconds: int) -> AsyncIterator[None]:
    """Limit how long the session waits for a table that other transactions use."""
    found = (await connection.execute(sql("SELECT @@SESSION.lock_wait_timeout"))).scalar_one()
    await connection.execute(sql("SET SESSION lock_wait_timeout = :seconds"), {"seconds": seconds})
    try:
        yield
    finally:
        if not connection.invalidated:
            await finish(connection.execute(sql("SET SESSION lock_wait_timeout = :found"), {"found": found}))
