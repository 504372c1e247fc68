"""What stores send to their databases."""

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
    """What stores send over connections of their own; SQLite's batches count as one each."""
    sent: list[str] = []
    really, really_each = DriverConnection.run, SQLiteConnection.run_each

    async def noted(connection: DriverConnection, statement: Executable, *parameters: Any) -> StatementResult:
        sent.append(str(statement))
        return await really(connection, statement, *parameters)

    async def noted_each(connection: SQLiteConnection, statement: Executable, parameters: Any) -> list[StatementResult]:
        sent.append(str(statement))
        return await really_each(connection, statement, parameters)

    with (
        mock.patch.object(DriverConnection, "run", noted),
        mock.patch.object(SQLiteConnection, "run_each", noted_each),
    ):
        yield sent
