"""The statements that stores send to their databases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from sqlalchemy import Executable

from tokenstore_sql.connections.connection import StatementResult
from tokenstore_sql.connections.driver import DriverConnection
from tokenstore_sql.sqlite.connections import SQLiteConnection


@contextmanager
def sent_statements() -> Iterator[list[str]]:
    """Record the statements that stores send over their own connections; a batch on SQLite counts as one statement."""
    sent: list[str] = []
    run, run_each = DriverConnection.run, SQLiteConnection.run_each

    async def record(connection: DriverConnection, statement: Executable, *parameters: Any) -> StatementResult:
        sent.append(str(statement))
        return await run(connection, statement, *parameters)

    async def record_each(
        connection: SQLiteConnection, statement: Executable, parameters: Any
    ) -> list[StatementResult]:
        sent.append(str(statement))
        return await run_each(connection, statement, parameters)

    with (
        mock.patch.object(DriverConnection, "run", record),
        mock.patch.object(SQLiteConnection, "run_each", record_each),
    ):
        yield sent
