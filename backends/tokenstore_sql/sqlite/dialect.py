"""How SQLite locks, waits and is set up."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

from sqlalchemy import URL, CursorResult, Executable, update
from sqlalchemy import text as sql
from sqlalchemy.ext.asyncio import AsyncConnection

from tokenstore.cancellation import finish
from tokenstore.errors import UnsupportedOperationError
from tokenstore_sql.connections.alchemy import AlchemyConnection
from tokenstore_sql.connections.connection import Parameters
from tokenstore_sql.dialect import Dialect, LockScope
from tokenstore_sql.sqlite.busy import until_not_busy
from tokenstore_sql.sqlite.errors import SQLiteErrors
from tokenstore_sql.sqlite.files import BUSY_TIMEOUT_MS, any_text, require_version
from tokenstore_sql.sqlite.grammar import SQLiteGrammar
from tokenstore_sql.sqlite.watching import wait_for_change

__all__ = ["SQLiteDialect"]

T = TypeVar("T")

_BEGIN: Final = sql("BEGIN IMMEDIATE")


class _SQLiteAlchemyConnection(AlchemyConnection):
    async def execute(self, statement: Executable, parameters: Parameters) -> CursorResult[Any]:
        driver = await self.driver_connection()

        async def execute() -> CursorResult[Any]:
            of_application, driver.text_factory = driver.text_factory, any_text
            try:
                return await self.alchemy.execute(statement, parameters)  # reads all rows
            finally:
                driver.text_factory = of_application

        # A statement that is cancelled half-way stays open inside SQLite, with its locks, even when its connection is
        # closed, until the garbage collector finds its cursor. No statement takes long.
        return await finish(execute())


class SQLiteDialect(Dialect):
    """See :class:`tokenstore_sql.dialect.Dialect`."""

    grammar = SQLiteGrammar()
    errors = SQLiteErrors()
    alchemy_class = _SQLiteAlchemyConnection
    # This dialect sends BEGIN itself, for writes and locks alone; the driver must not begin by itself.
    isolation_level = "AUTOCOMMIT"
    locks_rows = False
    statements_at_once = 1
    begin_statement: Executable = _BEGIN

    @property
    def begin(self) -> str:
        return str(self.begin_statement)

    async def run_locking(self, scope: LockScope, action: Callable[[], Awaitable[T]], *, brief: bool = False) -> T:
        if not scope.transactional and not scope.connection.borrowed:
            return await until_not_busy(action, self.lock_timeout)
        if not scope.prepared:
            await self._take_write_lock(scope)
            scope.prepared = True
        return await action()

    async def holds_locks(self, connection: AsyncConnection) -> bool:
        return True  # an explicit BEGIN IMMEDIATE takes the write lock, whatever the driver's mode

    async def _take_write_lock(self, scope: LockScope) -> None:
        connection = scope.connection
        if not isinstance(connection, AlchemyConnection):
            await until_not_busy(lambda: connection.run(self.begin_statement), self.lock_timeout)
            return
        ((busy_timeout,),), _ = await connection.run(sql("PRAGMA busy_timeout"))
        statement: Executable = self.begin_statement
        if await _in_transaction(connection.alchemy):
            # The driver, or a "begin" hook of the application, has begun a transaction. A statement that writes, even
            # if it changes no row, takes its write lock.
            generation = scope.table.c.generation
            statement = update(scope.table).where(generation.is_(None)).values(generation=generation)
        try:
            _ = await connection.run(sql(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}"))
            _ = await until_not_busy(lambda: connection.run(statement), self.lock_timeout)
        finally:
            if not connection.lost:
                _ = await connection.run(sql(f"PRAGMA busy_timeout = {int(busy_timeout)}"))

    async def watch(self, database: str | None, interval: object) -> None:
        await wait_for_change(str(database))

    async def may_look(self, connection: AsyncConnection) -> bool:
        # A read that begins a snapshot makes a later lock fail if another connection writes in between.
        return not await _in_transaction(connection)

    @asynccontextmanager
    async def exclusive_setup(self, connection: AsyncConnection) -> AsyncIterator[None]:
        if not connection.in_transaction():
            _ = await connection.begin()  # or SQLAlchemy's first statement would begin, after the next line's look
        if not await _in_transaction(connection):
            _ = await until_not_busy(lambda: finish(connection.execute(self.begin_statement)), self.lock_timeout)
        yield

    @staticmethod
    def check_url(url: URL) -> None:
        if (
            url.database in (None, "", ":memory:")
            or "mode=memory" in str(url.database)
            or url.query.get("mode") == "memory"
        ):
            raise UnsupportedOperationError(
                "SQLite in memory has one connection for all tasks, where one task's rollback undoes another's "
                "committed write: use memory:// for a store in memory, or a file"
            )

    async def check(self, connection: AsyncConnection) -> None:
        require_version(sqlite3.sqlite_version_info)


async def _in_transaction(connection: AsyncConnection) -> bool:
    raw = await connection.get_raw_connection()
    return bool(getattr(raw.driver_connection, "in_transaction", False))
