"""What SQLite's result codes mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from tokenstore.errors import (
    BackendError,
    BackendUnavailableError,
    ConflictError,
    LockTimeoutError,
    RowTooLargeError,
    TableMissingError,
)
from tokenstore_sql.errors import ErrorTable

__all__ = ["SQLiteErrors"]


class SQLiteErrors(ErrorTable):
    """Result codes by their names, as Python's ``sqlite3`` gives them."""

    driver_error_names = ("sqlite3.Error",)
    classes: ClassVar[Mapping[str, type[BackendError]]] = {
        "SQLITE_BUSY": LockTimeoutError,
        "SQLITE_BUSY_SNAPSHOT": ConflictError,  # this transaction has read what another one has changed since
        "SQLITE_LOCKED": LockTimeoutError,
        "SQLITE_READONLY": BackendUnavailableError,
        "SQLITE_CANTOPEN": BackendUnavailableError,
        "SQLITE_IOERR": BackendUnavailableError,
        "SQLITE_FULL": BackendUnavailableError,
        "SQLITE_NOTADB": BackendUnavailableError,
        "SQLITE_CORRUPT": BackendUnavailableError,
        "SQLITE_TOOBIG": RowTooLargeError,
    }

    explanations: ClassVar[Mapping[str, str]] = {
        "SQLITE_READONLY_DBMOVED": (
            "the database file was moved, deleted or replaced while it was in use, so the write is not in the file at "
            "its path; repeat the call"
        ),
    }

    def not_carried_out(self, error: BaseException) -> bool:
        # The write went to a file that is no longer the database.
        return self.code(error) == "SQLITE_READONLY_DBMOVED"

    def code(self, error: BaseException) -> str | None:
        cause: BaseException | None = error
        while cause is not None and not hasattr(cause, "sqlite_errorname"):
            cause = cause.__cause__ or cause.__context__
        return getattr(cause, "sqlite_errorname", None)

    def text(self, error: BaseException, code: str) -> str:
        return str(error)  # SQLite's messages contain constants and names of tables and columns only

    def classify(self, error: BaseException) -> tuple[type[BackendError], str | None]:
        # The code, SQLITE_ERROR, is the one of all mistakes in a statement.
        if "no such table" in str(error):
            return TableMissingError, "SQLITE_ERROR"
        return super().classify(error)
