"""aiomysql's and asyncmy's connections."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Final

from tokenstore_sql.connections.connection import StatementResult
from tokenstore_sql.connections.driver import DriverConnection, descriptor
from tokenstore_sql.mysql.sessions import check_size

__all__ = ["AiomysqlConnection", "AsyncmyConnection"]

# What a prepared statement has beside its values, and what each value has beside its own bytes, at most.
_PREPARED_BYTES: Final = 16
_VALUE_BYTES: Final = 12


class _MySQLConnection(DriverConnection):
    @staticmethod
    @abstractmethod
    def transport_of(driver: Any) -> Any:
        """The asyncio transport of a driver's connection, which it does not show in public; None if it is closed."""

    def socket(self) -> int | None:
        return descriptor(self.transport_of(self.driver))

    async def close(self) -> None:
        if self.lost:
            self.driver.close()
        else:
            await self.driver.ensure_closed()


class AiomysqlConnection(_MySQLConnection):
    """aiomysql."""

    async def send(self, sql: str, arguments: Any, returns_rows: bool) -> StatementResult:
        # A cursor need not be closed once all rows have been read.
        cursor = await self.driver.cursor()
        if arguments:
            sql = cursor.mogrify(sql, arguments)
        # One character is one byte: aiomysql writes bytes as surrogates, and the SQL is ASCII.
        check_size(self, self.driver, len(sql))
        _ = await cursor.execute(sql)
        return StatementResult(await cursor.fetchall(), cursor.rowcount)

    def is_closed(self) -> bool:
        # When the server has closed the connection, the stream is at its end.
        return bool(self.driver.closed or self.driver._reader.at_eof())

    @staticmethod
    def transport_of(driver: Any) -> Any:
        writer = getattr(driver, "_writer", None)
        return writer and writer.transport


class AsyncmyConnection(_MySQLConnection):
    """asyncmy."""

    async def send(self, sql: str, arguments: Any, returns_rows: bool) -> StatementResult:
        # A prepared statement's values are sent as they are.
        check_size(self, self.driver, _PREPARED_BYTES + sum(map(_sent_bytes, arguments)))
        cursor = self.driver.cursor()
        _ = await cursor.execute(sql, arguments or None)
        return StatementResult(await cursor.fetchall(), cursor.rowcount)

    def is_closed(self) -> bool:
        transport = self.transport_of(self.driver)
        return not self.driver.connected or (transport is not None and transport.is_closing())

    @staticmethod
    def transport_of(driver: Any) -> Any:
        return getattr(driver, "_transport", None)  # since 0.2.14


def _sent_bytes(value: object) -> int:
    """The bytes of a prepared statement's value, with its type and the length before it."""
    return _VALUE_BYTES + (len(value) if isinstance(value, bytes | str) else 0)
