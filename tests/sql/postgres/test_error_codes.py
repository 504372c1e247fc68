"""The error class for each SQLSTATE."""

from __future__ import annotations

import pytest

from tokenstore_sql.postgres.errors import PostgresErrors


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("40001", "ConflictError"),
        ("40P01", "ConflictError"),
        ("55P03", "LockTimeoutError"),
        ("57014", "LockTimeoutError"),
        ("57P01", "BackendUnavailableError"),
        ("25006", "BackendUnavailableError"),
        ("25P03", "BackendUnavailableError"),
        ("08006", "BackendUnavailableError"),
        ("53300", "BackendUnavailableError"),
        ("28P01", "LoginRefusedError"),
        ("28000", "LoginRefusedError"),
        ("3D000", "LoginRefusedError"),
        ("42P01", "TableMissingError"),
        ("54000", "RowTooLargeError"),
        ("22001", "RowTooLargeError"),
        ("42501", "BackendError"),
        ("23505", "BackendError"),
    ],
)
def test_the_sqlstate_decides_the_error_class(code: str, name: str) -> None:
    """The class of the driver's exception does not matter."""

    class Anything(Exception):
        sqlstate = code

    kind, found = PostgresErrors().classify(Anything())
    assert (kind.__name__, found) == (name, code)
