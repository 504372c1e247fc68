"""SQLite's connection, in a thread of its own."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Executable

from tokenstore_sql.connections.connection import StatementResult
from tokenstore_sql.connections.driver import OneTripConnection
from tokenstore_sql.sqlite.database_file import DatabaseFile, FileMovedError
from tokenstore_sql.sqlite.files import any_text
from tokenstore_sql.sqlite.thread import ConnectionThread

__all__ = ["SQLiteConnection"]


class SQLiteConnection(OneTripConnection):
    """A connection with a thread of its own. An operation is one trip to the thread, however many statements it has.

    Args:
        file: The database file.
        arguments: See :class:`tokenstore_sql.connections.driver.DriverConnection`.
    """

    driver: ConnectionThread

    def __init__(self, file: DatabaseFile, *arguments: Any) -> None:
        self._file = file
        super().__init__(*arguments)

    def is_closed(self) -> bool:
        return self.driver.raw is None

    def is_alive(self, idle: float) -> bool:
        return not self.lost and not self._has_moved()

    def _has_moved(self) -> bool:
        """Whether the file that the connection has open is no longer the one at its path."""
        return self.driver.file_id is not None and not self._file.is_at_path(self.driver.file_id)

    def _check_file(self) -> None:
        """Refuse to acknowledge a write, or to begin one, in a file that nothing else can see."""
        if self._has_moved():
            raise FileMovedError("the database file has been moved")

    def socket(self) -> None:
        """None: there is no server."""

    def has_ended(self) -> bool:
        return self.driver.is_idle

    @property
    def in_transaction(self) -> bool:
        return self.driver.raw is not None and self.driver.raw.in_transaction

    async def begin(self) -> None:
        """Nothing: the first statement that takes a lock begins (see ``SQLiteDialect.run_locking``)."""

    async def send(self, sql: str, arguments: Any, returns_rows: bool) -> StatementResult:
        found = await self.driver.do(partial(_execute, sql, arguments))
        # Of a query sqlite3 counts -1 rows; of a DELETE that returns rows, those that it deleted.
        if not returns_rows or found.changed >= 0:
            self._check_file()
        return found

    async def run_each(self, statement: Executable, parameters: Sequence[Mapping[str, Any]]) -> list[StatementResult]:
        compiled = self._compiler(statement)
        each = [compiled.arguments(one) for one in parameters]
        try:
            found = await self.driver.do(partial(_write_each, compiled.sql, each))
            self._check_file()
        except BaseException as error:
            self._unanswered = True
            self._after_error(error)
            raise
        return found

    async def ping(self) -> None:
        """Nothing: there is no server."""

    async def close(self) -> None:
        await self.driver.close()

    def forget(self) -> None:
        super().forget()
        if not self.is_foreign:
            self.driver.end()


def _execute(sql: str, arguments: Sequence[Any], raw: sqlite3.Connection) -> StatementResult:
    try:
        return _executed(sql, arguments, raw)
    except sqlite3.OperationalError as error:
        if hasattr(error, "sqlite_errorcode"):
            raise
    # Not SQLite's error but that of Python's module: a column that was read holds bytes that are not UTF-8. Only then
    # is each text decoded by a function, which takes longer.
    raw.text_factory = any_text
    try:
        return _executed(sql, arguments, raw)
    finally:
        raw.text_factory = str


def _executed(sql: str, arguments: Sequence[Any], raw: sqlite3.Connection) -> StatementResult:
    cursor = raw.execute(sql, arguments)
    return StatementResult(cursor.fetchall(), cursor.rowcount)


def _execute_each(sql: str, each: Sequence[Sequence[Any]], raw: sqlite3.Connection) -> list[StatementResult]:
    return [_execute(sql, arguments, raw) for arguments in each]


def _write_each(sql: str, each: Sequence[Sequence[Any]], raw: sqlite3.Connection) -> list[StatementResult]:
    """Run the statement for each set of parameters, in one transaction: the one that is open, or a new one."""
    if raw.in_transaction:
        return _execute_each(sql, each, raw)
    raw.execute("BEGIN IMMEDIATE")
    try:
        results = _execute_each(sql, each, raw)
        raw.execute("COMMIT")
    except BaseException:
        raw.rollback()
        raise
    return results
