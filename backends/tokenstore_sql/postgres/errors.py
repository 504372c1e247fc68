"""What PostgreSQL's SQLSTATE codes mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar, Final

from tokenstore.errors import (
    BackendError,
    BackendUnavailableError,
    ConflictError,
    LockTimeoutError,
    LoginRefusedError,
    RowTooLargeError,
    TableMissingError,
)
from tokenstore_sql.errors import ErrorTable

__all__ = ["PostgresErrors"]

# What a server says that has no free slot for another connection.
_NO_FREE_SLOT: Final = ("too many connections for", "too many clients", "remaining connection slots are reserved")
# The English messages of a server, and of libpq, that refuse a login, and their codes.
_REFUSED_LOGINS: Final = (
    ("password authentication failed|no password supplied", "28P01"),
    ("FATAL: .*( authentication failed|no pg_hba.conf entry|role .* does not exist|not permitted to log in)", "28000"),
    ("FATAL: .*database .* does not exist", "3D000"),
)


class PostgresErrors(ErrorTable):
    """SQLSTATE codes, by asyncpg or psycopg."""

    driver_error_names = (
        "asyncpg.PostgresError",
        "asyncpg.InterfaceError",
        "asyncpg.InternalClientError",
        "psycopg.Error",
    )
    classes: ClassVar[Mapping[str, type[BackendError]]] = {
        "42P01": TableMissingError,
        "55P03": LockTimeoutError,
        "57014": LockTimeoutError,  # statement_timeout, if an administrator set one shorter than lock_timeout
        "40": ConflictError,
        "22001": RowTooLargeError,  # a column of an application's own table is too small
        "54": RowTooLargeError,
        "0A000": ConflictError,  # a cached plan that another process's DDL made void
        "25006": BackendUnavailableError,  # a primary that became a standby
        "25P03": BackendUnavailableError,
        "08": BackendUnavailableError,
        "28": LoginRefusedError,
        "3D000": LoginRefusedError,
        "53": BackendUnavailableError,
        "57P": BackendUnavailableError,
    }

    explanations: ClassVar[Mapping[str, str]] = {
        "28000": (
            "the server does not let this user in: check the user name and the database's name in the database's URL, "
            "the role's right to log in, and the server's pg_hba.conf"
        ),
        "3F000": (
            "no schema of the search_path exists, in which the table could be created: set the role's search_path, or "
            "the option `schema`"
        ),
        "3D000": "there is no such database: check the database's name in the database's URL, or create it",
    }

    def code(self, error: BaseException) -> str | None:
        code = getattr(_fatal(error) or error, "sqlstate", None)
        if code is None and type(error).__name__ == "InvalidCachedStatementError":
            return "0A000"  # SQLAlchemy's adapter for asyncpg drops the code
        if code is None and any(cls.__name__ == "OperationalError" for cls in type(error).__mro__):
            # libpq has no code when it cannot connect, or loses the connection.
            return next((code for words, code in _REFUSED_LOGINS if re.search(words, str(error))), "08000")
        if code is None and type(error).__name__ == "InternalClientError":
            return "08003"  # asyncpg's protocol is in a state in which the connection cannot be used
        return code if isinstance(code, str) else None

    def not_carried_out(self, error: BaseException) -> bool:
        # The administrator ended the session. The server says so in answer to a statement only if it did not commit the
        # statement. asyncpg wraps that answer.
        if "57P01" in (getattr(error, "sqlstate", None), getattr(error.__cause__, "sqlstate", None)):
            return True
        # The driver did not send the statement. asyncpg raises InternalClientError if the statement crossed the
        # server's last message, else InterfaceError; psycopg raises OperationalError.
        words = str(error)
        if type(error).__name__ == "InternalClientError":
            return words.startswith("cannot switch to state")
        return isinstance(error, self.driver_errors()) and "connection is closed" in words

    def has_no_free_slot(self, error: BaseException) -> bool:
        # libpq has no code when it cannot connect, so the English message of the server must do for psycopg.
        return self.code(error) == "53300" or (
            self.code(error) == "08000" and any(words in str(error) for words in _NO_FREE_SLOT)
        )

    def is_undecodable(self, error: BaseException) -> bool:
        # Only a database with the encoding SQL_ASCII holds such text, and its server converts what it sends.
        return self.code(error) == "22021" or super().is_undecodable(error)

    def ends_connection(self, error: BaseException) -> bool:
        # After such an answer the server closes the connection, whatever the code: a conflict on a standby is 40001.
        return _fatal(error) is not None or super().ends_connection(error)

    def text(self, error: BaseException, code: str) -> str:
        # The first line is the server's primary message. DETAIL, which can quote a row, follows. In class 22 (data) and
        # 23 (constraints) the first line can quote values, too.
        if code.startswith(("22", "23")):
            return ""
        return str(_fatal(error) or error).partition("\n")[0].rpartition(">: ")[2]


def _fatal(error: BaseException) -> BaseException | None:
    """The answer after which the server closed the connection, if there was one.

    asyncpg raises it only as the cause of an error of its own, and SQLAlchemy's adapter wraps that one again.
    """
    found: BaseException | None = error
    while found is not None:
        if _severity(found) in ("FATAL", "PANIC"):
            return found
        found = found.__cause__
    return None


def _severity(error: BaseException) -> str | None:
    """How severe the server calls an error, in English: ERROR, FATAL or PANIC; None if it is no answer of a server."""
    # Servers before 9.6 send the word in their own language alone.
    if diagnosis := getattr(error, "diag", None):
        severity: str | None = diagnosis.severity_nonlocalized or diagnosis.severity
    else:
        severity = getattr(error, "severity_en", None) or getattr(error, "severity", None)
    return severity
