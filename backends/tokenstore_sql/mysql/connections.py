"""aiomysql's and asyncmy's connections."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from tokenstore_sql.connections.connection import StatementResult
from tokenstore_sql.connections.driver import DriverConnection, descriptor

__all__ = ["AiomysqlConnection", "AsyncmyConnection"]


class _MySQLConnection(DriverConnection):
    async def send(self, sql: str, arguments: Any, returns_rows: bool) -> StatementResult:
        cursor = await self.cursor()
        _ = await cursor.execute(sql, arguments or None)
        return StatementResult(await cursor.fetchall(), cursor.rowcount)

    @abstractmethod
    async def cursor(self) -> Any:
        """A cursor of the driver. It need not be closed once all rows have been read."""

    async def close(self) -> None:
        if self.lost:
            self.driver.close()
        else:
            await self.driver.ensure_closed()


class AiomysqlConnection(_MySQLConnection):
    """aiomysql."""

    async def cursor(self) -> Any:
        return await self.driver.cursor()

    def is_closed(self) -> bool:
        # When the server has closed the connection, the stream is at its end.
        return bool(self.driver.closed or self.driver._reader.at_eof())

    def socket(self) -> int | None:
        return descriptor(getattr(self.driver, "_writer", None))


class AsyncmyConnection(_MySQLConnection):
    """asyncmy."""

    async def cursor(self) -> Any:
        return self.driver.cursor()

    def is_closed(self) -> bool:
        transport = self._transport()
        return not self.driver.connected or (transport is not None and transport.is_closing())

    def socket(self) -> int | None:
        return descriptor(self._transport())

    def _transport(self) -> Any:
        return getattr(self.driver, "_transport", None)  # since 0.2.14
