"""SQLAlchemy's connection, of an application's engine or session."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, Self, cast

from sqlalchemy import CursorResult, Engine, Executable
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tokenstore.escaping import escaped
from tokenstore_sql.connections.connection import NO_PARAMETERS, Connection, Parameters, StatementResult
from tokenstore_sql.errors import ErrorTable, cause_of

__all__ = ["AlchemyConnection", "beside"]

_log: Final = logging.getLogger("tokenstore.sql.connections")


class AlchemyConnection(Connection):
    """SQLAlchemy's connection.

    Args:
        alchemy: The connection, which is open.
        errors: What the database's errors mean.
        info: The connection's notes.
        pooled: Whether it was taken from an engine's pool for the operations of a store alone.
    """

    borrowed = True

    def __init__(self, alchemy: AsyncConnection, errors: ErrorTable, info: dict[str, Any], *, pooled: bool) -> None:
        self.alchemy = alchemy
        self.sql_dialect = alchemy.dialect
        self.info = info
        self._errors = errors
        self._pooled = pooled

    @classmethod
    async def of(cls, alchemy: AsyncConnection, errors: ErrorTable, *, pooled: bool = False) -> Self:
        """Wrap a connection that is open."""
        return cls(alchemy, errors, (await alchemy.get_raw_connection()).info, pooled=pooled)

    @property
    def lost(self) -> bool:
        return self.alchemy.invalidated

    @property
    def in_transaction(self) -> bool:
        return True  # SQLAlchemy begins a transaction by itself

    async def execute(self, statement: Executable, parameters: Parameters) -> CursorResult[Any]:
        """Run a statement through SQLAlchemy. If the caller is cancelled, nothing is left behind in the client."""
        return await self.alchemy.execute(statement, parameters)

    async def run(self, statement: Executable, parameters: Parameters = NO_PARAMETERS) -> StatementResult:
        try:
            found = await self.execute(statement, parameters)
        except Exception as error:
            # A server that became read-only answers pings, so the engine's pool would keep this connection. It would
            # also keep one whose driver raised an error that SQLAlchemy does not know.
            cause = cause_of(error)
            known = isinstance(error, (DBAPIError, *self._errors.driver_errors()))
            if known and self._errors.ends_connection(cause) and self._pooled and not self.lost:
                code = self._errors.code(cause)
                _log.info("discarding a connection of the application's engine after error %s", escaped(str(code)))
                await self.alchemy.invalidate()
            raise
        if found.returns_rows:
            rows = found.all()
            return StatementResult(cast(Sequence[Sequence[Any]], rows), len(rows))
        return StatementResult((), found.rowcount)

    async def commit(self) -> None:
        await self.alchemy.commit()

    @asynccontextmanager
    async def beside(self) -> AsyncIterator[Connection]:
        engine = beside(self.alchemy.engine)
        try:
            async with engine.connect() as connection:
                yield await type(self).of(connection, self._errors)
        finally:
            await engine.dispose()

    def savepoint(self) -> AbstractAsyncContextManager[Any]:
        return self.alchemy.begin_nested()

    async def driver_connection(self) -> Any:
        return (await self.alchemy.get_raw_connection()).driver_connection


def beside(engine: AsyncEngine) -> AsyncEngine:
    """An engine to the same database with a pool of its own, for when all connections of the first engine wait."""
    return AsyncEngine(Engine(engine.sync_engine.pool.recreate(), engine.dialect, engine.url))
