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
        (1062, "ConflictError"),
    ],
)
def test_the_error_number_decides_the_error_class(number: int, name: str) -> None:
    """The class of the driver's exception does not matter."""
    kind, code = MySQLErrors().classify(Exception(number, "words"))
    assert (kind.__name__, code) == (name, str(number))


@pytest.mark.parametrize("number", [0, 1047, 1290, 1792, 1836])
def test_a_statement_that_was_refused_before_it_did_anything_may_be_sent_again(number: int) -> None:
    assert MySQLErrors().not_carried_out(Exception(number, "words"))


@pytest.mark.parametrize("number", [1180, 1213, 2006, 2013])
def test_a_statement_whose_outcome_is_unknown_or_was_decided_may_not(number: int) -> None:
    """1180: a commit failed at a node of Galera; 1213: a deadlock, which has its own road."""
    assert not MySQLErrors().not_carried_out(Exception(number, "words"))
