"""asyncpg's and psycopg's connections."""

from __future__ import annotations

from typing import Any

from tokenstore_sql.connections.connection import StatementResult
from tokenstore_sql.connections.driver import DriverConnection, descriptor

__all__ = ["AsyncpgConnection", "PreparingAsyncpgConnection", "PsycopgConnection"]


class AsyncpgConnection(DriverConnection):
    """asyncpg without prepared statements."""

    def is_closed(self) -> bool:
        return bool(self.driver.is_closed())

    def socket(self) -> int | None:
        return descriptor(getattr(self.driver, "_transport", None))

    async def send(self, sql: str, arguments: Any, returns_rows: bool) -> StatementResult:
        if returns_rows:
            rows = await self.driver.fetch(sql, *arguments)
            return StatementResult(rows, len(rows))
        return StatementResult((), _changed(await self.driver.execute(sql, *arguments)))

    async def close(self) -> None:
        await self.driver.close()


class PreparingAsyncpgConnection(AsyncpgConnection):
    """asyncpg with prepared statements, which it keeps; the driver would look up each statement's text anew."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._prepared: dict[str, Any] = {}

    async def send(self, sql: str, arguments: Any, returns_rows: bool) -> StatementResult:
        if not arguments:
            return await super().send(sql, arguments, returns_rows)
        try:
            if (statement := self._prepared.get(sql)) is None:
                statement = self._prepared[sql] = await self.driver.prepare(sql)
            rows = await statement.fetch(*arguments)
        except Exception:
            self._prepared.pop(sql, None)  # another process's DDL may have made it void
            raise
        return StatementResult(rows, len(rows) if returns_rows else _changed(statement.get_statusmsg()))


class PsycopgConnection(DriverConnection):
    """psycopg."""

    def is_closed(self) -> bool:
        return bool(self.driver.closed)

    def socket(self) -> int | None:
        return int(self.driver.fileno())

    async def send(self, sql: str, arguments: Any, returns_rows: bool) -> StatementResult:
        cursor = await self.driver.execute(sql, arguments or None)
        rows = await cursor.fetchall() if returns_rows else ()
        return StatementResult(rows, cursor.rowcount)

    async def close(self) -> None:
        await self.driver.close()


def _changed(status: str) -> int:
    """How many rows a statement changed, from its status: "UPDATE 1", "INSERT 0 1", "BEGIN"."""
    last = status.rpartition(" ")[2]
    return int(last) if last.isdigit() else 0
