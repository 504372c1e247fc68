"""From what SQLAlchemy, a driver or the socket raised to the error that callers get."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import ClassVar, Final, TypeVar

from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from tokenstore.errors import (
    BackendError,
    BackendUnavailableError,
    ConflictError,
    LockTimeoutError,
    LoginRefusedError,
    RowTooLargeError,
    TableMissingError,
    TamperedError,
    TokenStoreError,
)
from tokenstore.escaping import escaped

__all__ = ["EXPLANATIONS", "ConnectionLostError", "ErrorTable", "NoFreeSlotError", "cause_of", "mapped"]

T = TypeVar("T")

EXPLANATIONS: Final[Mapping[type[BackendError], str]] = {
    BackendError: "the database refused the statement",
    TableMissingError: "the table does not exist: create it with `await store.setup()` or `tokenstore init`",
    LockTimeoutError: "the lock was not free in time: another transaction holds the row; repeat the call",
    ConflictError: "a concurrent transaction won: repeat this one from its start",
    LoginRefusedError: "the server refuses the login: check the user name and the password in the database's URL",
    RowTooLargeError: "the row exceeds a limit of the database, and was not written",
    BackendUnavailableError: "the database cannot be reached, or went away, or accepts no writes",
}


class ConnectionLostError(Exception):
    """A driver's error after which its connection cannot be used.

    Args:
        orig: The driver's error.
    """

    def __init__(self, orig: Exception) -> None:
        super().__init__(orig)
        self.orig = orig


class NoFreeSlotError(ConnectionLostError):
    """The server refused a new connection because it has as many as it, or this user, may have."""


class ErrorTable(ABC):
    """What one database's errors mean."""

    classes: ClassVar[Mapping[str, type[BackendError]]]
    """From the database's own codes to our errors; the beginning of a code may stand for a whole class of codes."""

    explanations: ClassVar[Mapping[str, str]] = {}
    """From a code to its explanation, where that of the class says too little."""

    driver_error_names: ClassVar[Sequence[str]]
    """The base classes of the drivers' exceptions, which SQLAlchemy lets through when a connection is made."""

    def driver_errors(self) -> tuple[type[Exception], ...]:
        """The base classes of those drivers that are loaded; a driver that is not loaded has raised nothing."""
        found = (name.rpartition(".") for name in self.driver_error_names)
        return tuple(getattr(sys.modules[module], name) for module, _, name in found if module in sys.modules)

    def not_carried_out(self, error: BaseException) -> bool:
        """Whether an error that ended a connection tells that the statement was certainly not carried out."""
        return False

    def has_no_free_slot(self, error: BaseException) -> bool:
        """Whether a server refused a new connection because it has as many as it, or this user, may have."""
        return False

    def is_undecodable(self, error: BaseException) -> bool:
        """Whether a query found text that is not UTF-8. The other databases' columns hold any bytes."""
        return isinstance(error, UnicodeDecodeError)

    def is_of_driver(self, error: Exception) -> bool:
        """Whether an exception that has none of the driver's classes is the driver's all the same."""
        return False

    def ends_connection(self, error: BaseException) -> bool:
        """Whether a connection is of no more use after the server has answered with this error.

        A server that became read-only, or is shutting down, still answers. A pool that keeps such a connection gives
        the next caller the same error.
        """
        return self.classify(error)[0] is BackendUnavailableError

    @abstractmethod
    def code(self, error: BaseException) -> str | None:
        """The SQLSTATE, errno or result code of a driver's exception; None if it carries none."""

    def text(self, error: BaseException, code: str) -> str:
        """The server's own message, if it cannot contain a row's data; else an empty string."""
        return ""

    def classify(self, error: BaseException) -> tuple[type[BackendError], str | None]:
        """The error class for a driver's exception, and its code. The longest beginning of the code decides."""
        code = self.code(error)
        for length in range(len(code or ""), 0, -1):
            if found := self.classes.get(str(code)[:length]):
                return found, code
        return BackendError, code


def cause_of(error: BaseException) -> BaseException:
    """The driver's exception inside SQLAlchemy's, or inside ours."""
    if isinstance(error, ConnectionLostError | DBAPIError) and error.orig is not None:
        return error.orig
    return error


async def mapped(errors: ErrorTable, about: Callable[[], str], operation: Callable[[], Awaitable[T]]) -> T:
    """Run an operation, and raise our own error in place of one of SQLAlchemy, a driver or the socket.

    The driver's exception is neither cause nor context of ours, because it can carry a statement's parameters.

    Args:
        errors: What the database's errors mean.
        about: Returns what the error is about: a row or the table.
        operation: What to run.
    """
    failure: TokenStoreError
    try:
        return await operation()
    except TokenStoreError:
        raise
    except Exception as error:
        if errors.is_undecodable(cause_of(error)):
            failure = TamperedError(f"{about()}: a column holds text that is not UTF-8, which no store has written")
        elif isinstance(
            error, (SQLAlchemyError, ConnectionLostError, OSError, *errors.driver_errors())
        ) or errors.is_of_driver(error):
            failure = _translate(errors, about(), error)
        else:
            raise
    raise failure


def _translate(errors: ErrorTable, about: str, error: BaseException) -> BackendError:
    if isinstance(error, PoolTimeoutError):
        return BackendUnavailableError(
            f"{about}: no connection of the pool became free within its pool_timeout; "
            f"a larger pool_size, shorter transactions, or inside a transaction its own methods, help"
        )
    cause = cause_of(error)
    lost = isinstance(error, ConnectionLostError) or getattr(error, "connection_invalidated", False)
    kind, code = errors.classify(cause)
    # A code that the database's table names says more than the end of the connection, which it may have caused.
    if kind is BackendError and code not in errors.classes and (isinstance(cause, OSError) or lost):
        kind = BackendUnavailableError
    words = errors.text(cause, code) if code else ""
    if isinstance(cause, OSError):
        words = words or cause.strerror or str(cause)
    code = None if code is None else escaped(code)
    details = f"{code}: {words}" if code and words else code or words or type(cause).__name__
    explanation = errors.explanations.get(code or "", EXPLANATIONS[kind])
    # A hostile server chooses its words, and its code.
    return kind(f"{about}: {explanation} ({escaped(details)})", code=code)
