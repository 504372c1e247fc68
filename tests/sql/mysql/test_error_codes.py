"""The error class for each error number."""

from __future__ import annotations

import pytest

from tokenstore_sql.mysql.errors import MySQLErrors


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (1020, "ConflictError"),
        (1213, "ConflictError"),
        (1205, "LockTimeoutError"),
        (1146, "TableMissingError"),
        (2006, "BackendUnavailableError"),
        (2013, "BackendUnavailableError"),
        (4031, "BackendUnavailableError"),
        (1047, "BackendUnavailableError"),
        (1180, "BackendUnavailableError"),
        (1290, "BackendUnavailableError"),
        (1792, "BackendUnavailableError"),
        (1836, "BackendUnavailableError"),
        (1044, "LoginRefusedError"),
        (1045, "LoginRefusedError"),
        (1049, "LoginRefusedError"),
        (1130, "LoginRefusedError"),
        (1698, "LoginRefusedError"),
        (1040, "BackendUnavailableError"),
        (1142, "BackendError"),
        (1062, "BackendError"),
    ],
)
def test_the_error_number_decides_the_error_class(number: int, name: str) -> None:
    """The class of the driver's exception does not matter."""
    kind, code = MySQLErrors().classify(Exception(number, "words"))
    assert (kind.__name__, code) == (name, str(number))
