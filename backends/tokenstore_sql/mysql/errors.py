"""What the error numbers of MySQL and MariaDB mean."""

from __future__ import annotations

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

__all__ = ["READ_ONLY", "MySQLErrors"]

READ_ONLY: Final = frozenset({"1290", "1792", "1836"})
"""The server, or the session, accepts no writes."""

# Access denied to a table, a column or an operation: these messages name no values.
_ACCESS_DENIED: Final = frozenset({"1142", "1143", "1227"})
# The driver did not send the statement (0), or the server refused it before it did anything.
_NOT_CARRIED_OUT: Final = frozenset({"0", "1047", *READ_ONLY})
# Too many connections: of the server; of each user, by max_user_connections; of one user, by MAX_USER_CONNECTIONS.
_NO_FREE_SLOT: Final = frozenset({"1040", "1203", "1226"})


class MySQLErrors(ErrorTable):
    """Error numbers, by aiomysql (PyMySQL) or asyncmy."""

    driver_error_names = ("pymysql.err.Error", "asyncmy.errors.Error")
    classes: ClassVar[Mapping[str, type[BackendError]]] = {
        "0": BackendUnavailableError,  # the driver's own: the connection is closed
        "1146": TableMissingError,
        "1205": LockTimeoutError,
        "3572": LockTimeoutError,
        "1213": ConflictError,
        "1062": ConflictError,  # another connection inserted the row at the same moment
        "1020": ConflictError,  # MariaDB since 11.6.2: the row changed since this snapshot
        "1969": LockTimeoutError,  # MariaDB's max_statement_time, if an administrator set one
        "3024": LockTimeoutError,  # MySQL's max_execution_time
        "1118": RowTooLargeError,
        "1153": RowTooLargeError,  # the statement was too large, and the server has closed the connection
        "1406": RowTooLargeError,  # a column of an application's own table is too small
        # The server does not let this user in: not from this host (1130), without a password (1698), with an expired
        # password (1862), or because the account is locked (3118, on MariaDB 4151).
        **dict.fromkeys(("1044", "1045", "1049", "1130", "1698", "1862", "3118", "4151"), LoginRefusedError),
        # The server has no free slot.
        "1040": BackendUnavailableError,
        "1203": BackendUnavailableError,
        "1226": BackendUnavailableError,  # a limit of this user's, such as max_user_connections
        # The server does not write, or does not serve at all.
        "1047": BackendUnavailableError,  # a node of Galera that has lost the others
        "1180": BackendUnavailableError,  # a node of Galera that lost the others during a COMMIT
        **dict.fromkeys(READ_ONLY, BackendUnavailableError),
        # The session is about to end.
        "1053": BackendUnavailableError,
        "1184": BackendUnavailableError,
        "1317": BackendUnavailableError,
        "1927": BackendUnavailableError,
        "4031": BackendUnavailableError,
        # The network, as the server saw it.
        "1152": BackendUnavailableError,
        **dict.fromkeys(map(str, range(1154, 1162)), BackendUnavailableError),
        "1835": BackendUnavailableError,
        # The network, as the driver saw it.
        "2002": BackendUnavailableError,
        "2003": BackendUnavailableError,
        "2006": BackendUnavailableError,
        "2013": BackendUnavailableError,
        "2014": BackendUnavailableError,
        "2026": BackendUnavailableError,  # no TLS
        "2055": BackendUnavailableError,
        "2059": BackendUnavailableError,  # a method of authentication that the driver lacks, or that is refused
        "2020": RowTooLargeError,  # the statement was too large, and was not sent
    }

    explanations: ClassVar[Mapping[str, str]] = {
        "1044": (
            "the user may not use this database: check the database's name in the database's URL, or grant the user "
            "its rights there"
        ),
        "1049": (
            "there is no such database: check the database's name in the database's URL and the option `schema`, or "
            "create it"
        ),
    }

    def code(self, error: BaseException) -> str | None:
        number = error.args[0] if error.args else None
        return str(number) if isinstance(number, int) else None

    def not_carried_out(self, error: BaseException) -> bool:
        return self.code(error) in _NOT_CARRIED_OUT

    def has_no_free_slot(self, error: BaseException) -> bool:
        return self.code(error) in _NO_FREE_SLOT

    def is_of_driver(self, error: Exception) -> bool:
        # With RuntimeError both drivers refuse a server that asks for a file of this machine.
        return isinstance(error, RuntimeError) and "LOAD_LOCAL" in str(error)

    def ends_connection(self, error: BaseException) -> bool:
        return self.code(error) == "1153" or super().ends_connection(error)

    def text(self, error: BaseException, code: str) -> str:
        # Messages about access, names and the server's state. Other messages can quote a value.
        quotable = code in self.classes or code in _ACCESS_DENIED
        return str(error.args[1]) if quotable and len(error.args) > 1 else ""
