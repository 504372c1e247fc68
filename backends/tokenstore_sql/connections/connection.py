"""A connection as the operations on the table see it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from sqlalchemy import Executable
from sqlalchemy.engine.interfaces import Dialect as SQLAlchemyDialect

__all__ = ["NO_PARAMETERS", "Connection", "Parameters", "StatementResult"]

Parameters = Mapping[str, Any]
NO_PARAMETERS: Final[Parameters] = MappingProxyType({})


class StatementResult(NamedTuple):
    """What a statement returned.

    Attributes:
        rows: The rows.
        changed: How many rows the statement changed, as the driver counts them; of a query, how many it returned.
    """

    rows: Sequence[Sequence[Any]]
    changed: int


class Connection(ABC):
    """One connection.

    Attributes:
        borrowed: Whether the connection's settings belong to an application and must be left as they were found.
        info: Notes of the dialect, which live as long as the connection to the server does.
    """

    borrowed: bool
    info: dict[str, Any]

    sql_dialect: SQLAlchemyDialect
    """SQLAlchemy's own dialect, which knows the server's version."""

    is_foreign: bool = False
    """Whether the connection belongs to the process that this process was forked from."""

    @property
    @abstractmethod
    def lost(self) -> bool:
        """Whether the connection cannot be used again: it is closed, broken, or was cut off during a statement."""

    @property
    @abstractmethod
    def in_transaction(self) -> bool:
        """Whether there is, or may be, something to commit or to roll back."""

    @abstractmethod
    async def run(self, statement: Executable, parameters: Parameters = NO_PARAMETERS) -> StatementResult:
        """Run one statement."""

    @abstractmethod
    async def commit(self) -> None:
        """Commit the transaction, if there is one."""

    @abstractmethod
    def beside(self) -> AbstractAsyncContextManager[Connection]:
        """Another connection to the same server, outside of any pool: all connections of the pool may be waiting."""

    def savepoint(self) -> AbstractAsyncContextManager[Any]:
        """Around statements whose failure must not end the transaction."""
        return nullcontext()

    @abstractmethod
    async def driver_connection(self) -> Any:
        """The driver's own connection object."""
