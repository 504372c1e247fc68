"""Connections of an application's engine."""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tokenstore.cancellation import finish
from tokenstore_sql.connections.alchemy import AlchemyConnection
from tokenstore_sql.connections.connection import Connection
from tokenstore_sql.connections.source import Source
from tokenstore_sql.errors import ErrorTable

__all__ = ["EngineSource"]


class EngineSource(Source):
    """An application's engine, with the pool that the application chose.

    Args:
        engine: The engine.
        connection_class: The class that wraps its connections.
        errors: What the database's errors mean.
        isolation_level: The level of a transaction that takes locks.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        connection_class: type[AlchemyConnection],
        errors: ErrorTable,
        isolation_level: str,
    ) -> None:
        self._engine = engine
        self._connection_class = connection_class
        self._errors = errors
        self._isolation_level = isolation_level
        self._pool: Any = engine.sync_engine.pool

    @property
    def open(self) -> int:
        return int(self._pool.checkedin()) + self.in_use if hasattr(self._pool, "checkedin") else 1

    @property
    def in_use(self) -> int:
        return int(self._pool.checkedout()) if hasattr(self._pool, "checkedout") else 0

    async def acquire(self, *, transactional: bool, write: bool) -> Connection:
        alchemy = self._engine.connect()
        # A statement on its own needs no transaction: one round trip, and nothing that could stay open.
        level = self._isolation_level if transactional else "AUTOCOMMIT"

        async def prepare() -> Connection:
            _ = await alchemy.start()
            _ = await alchemy.execution_options(isolation_level=level)
            return await self._connection_class.of(alchemy, self._errors, pooled=True)

        try:
            # A checkout that is cancelled half-way would never return to the pool.
            return await finish(prepare())
        except BaseException:
            await self._close(alchemy)
            raise

    async def release(self, connection: Connection) -> None:
        await self._close(cast(AlchemyConnection, connection).alchemy)

    async def _close(self, alchemy: AsyncConnection) -> None:
        if alchemy.sync_connection is not None:
            await finish(alchemy.close())

    async def aclose(self) -> None:
        """Nothing: the application closes its engine."""

    def forget(self) -> None:
        """Nothing: the application disposes of its engine's connections."""
