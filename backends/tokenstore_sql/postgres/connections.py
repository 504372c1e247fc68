"""asyncpg's and psycopg's connections."""

from __future__ import annotations

from typing import Any, Final, Self

from sqlalchemy.ext.asyncio import AsyncConnection

from tokenstore.errors import UnsupportedOperationError
from tokenstore.escaping import escaped
from tokenstore_sql.connections.alchemy import AlchemyConnection
from tokenstore_sql.connections.connection import StatementResult
from tokenstore_sql.connections.driver import DriverConnection, descriptor
from tokenstore_sql.errors import ErrorTable
from tokenstore_sql.postgres.arrays import register_arrays

__all__ = ["AsyncpgConnection", "PostgresAlchemyConnection", "PreparingAsyncpgConnection", "PsycopgConnection"]

# In the notes of an application's connection: it knows the store's arrays.
_KNOWS_ARRAYS: Final = "tokenstore.arrays"
# The encoding that has every user's id, by the names with which servers and poolers report it, in small letters and
# without punctuation.
_UTF8: Final = ("utf8", "unicode")


class AsyncpgConnection(DriverConnection):
    """asyncpg without prepared statements."""

    def is_closed(self) -> bool:
        return bool(self.driver.is_closed())

    def socket(self) -> int | None:
        return descriptor(self._transport)

    @property
    def _transport(self) -> Any:
        return getattr(self.driver, "_transport", None)  # the driver has no public way to it

    def is_encrypted(self) -> bool:
        """Whether the connection uses TLS."""
        return self._transport is not None and self._transport.get_extra_info("ssl_object") is not None

    def server_address(self) -> str | None:
        """The IP address of the server; None: a Unix socket."""
        peer = self._transport and self._transport.get_extra_info("peername")
        return str(peer[0]) if isinstance(peer, tuple) else None

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

    def __init__(self, driver: Any, *args: Any) -> None:
        super().__init__(driver, *args)
        register_arrays(driver)

    def is_closed(self) -> bool:
        return bool(self.driver.closed)

    def socket(self) -> int | None:
        return int(self.driver.fileno())

    def is_encrypted(self) -> bool:
        """Whether the connection uses TLS."""
        return bool(self.driver.pgconn.ssl_in_use)

    def server_address(self) -> str | None:
        """The IP address of the server; None: a Unix socket."""
        return self.driver.info.hostaddr or None

    async def send(self, sql: str, arguments: Any, returns_rows: bool) -> StatementResult:
        # Rows in the binary format, which depends on no setting of the server. The server takes several statements in
        # one text only if their results are text.
        cursor = await self.driver.execute(sql, arguments or None, binary=returns_rows)
        rows = await cursor.fetchall() if returns_rows else ()
        return StatementResult(rows, cursor.rowcount)

    async def close(self) -> None:
        await self.driver.close()


class PostgresAlchemyConnection(AlchemyConnection):
    """SQLAlchemy's connection through asyncpg or psycopg."""

    @classmethod
    async def of(cls, alchemy: AsyncConnection, errors: ErrorTable, *, pooled: bool = False) -> Self:
        connection = await super().of(alchemy, errors, pooled=pooled)
        driver = await connection.driver_connection()
        # The driver knows the setting: the server reports each change of it. A proxy may report nothing.
        if hasattr(driver, "get_settings"):
            encoding = getattr(driver.get_settings(), "client_encoding", None)
        else:
            encoding = (driver.pgconn.parameter_status(b"client_encoding") or b"").decode() or None
            if _KNOWS_ARRAYS not in connection.info:
                register_arrays(driver)
                connection.info[_KNOWS_ARRAYS] = True
        if encoding is not None and "".join(filter(str.isalnum, encoding.lower())) not in _UTF8:
            raise UnsupportedOperationError(
                f"the connection's client_encoding is {escaped(encoding)}, which cannot hold every user's id; let the "
                "engine connect with client_encoding=utf8, whatever the database or the role has for a default"
            )
        return connection


def _changed(status: str) -> int:
    """How many rows a statement changed, from its status: "UPDATE 1", "INSERT 0 1", "BEGIN"."""
    last = status.rpartition(" ")[2]
    return int(last) if last.isdigit() else 0
