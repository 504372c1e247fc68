"""What differs between the databases beside their SQL, as methods that the databases' folders override."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import ClassVar, TypeVar, cast

from sqlalchemy import URL, Index, Table
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import ExecutableDDLElement

from tokenstore.errors import ConfigurationError
from tokenstore_sql.connections.alchemy import AlchemyConnection
from tokenstore_sql.connections.connection import Connection
from tokenstore_sql.errors import ErrorTable
from tokenstore_sql.polling import jittered
from tokenstore_sql.statements.grammar import Grammar

__all__ = ["Dialect", "LockScope", "unencoded_at"]

T = TypeVar("T")


@dataclass(slots=True)
class LockScope:
    """Where a statement that locks or writes runs.

    Attributes:
        connection: Its connection.
        table: The table that it locks or writes.
        transactional: Whether it runs in a transaction, rather than on its own.
        prepared: For the dialect: whether this transaction needs no further preparation before it waits for a lock.
    """

    connection: Connection
    table: Table
    transactional: bool
    prepared: bool = False


class Dialect(ABC):
    """How one database locks, waits and is set up.

    Args:
        lock_timeout: The longest wait for a lock, in seconds.
    """

    grammar: ClassVar[Grammar]
    errors: ClassVar[ErrorTable]

    alchemy_class: ClassVar[type[AlchemyConnection]] = AlchemyConnection
    """The class that wraps connections of an application's engine or session."""

    isolation_level: ClassVar[str]
    """The level of a transaction that takes locks, as SQLAlchemy names it."""

    locks_rows: ClassVar[bool] = True
    """Whether a write waits only for transactions that hold the same row; else the lock is the whole database's."""

    statements_at_once: ClassVar[int] = 2
    """How many statements that read, or that write, keep the database busy. Further rows share statements."""

    def __init__(self, lock_timeout: float) -> None:
        self.lock_timeout = lock_timeout

    @property
    @abstractmethod
    def begin(self) -> str:
        """The SQL that begins a transaction that takes locks, on a connection of the store's own."""

    # Locks

    async def run_locking(self, scope: LockScope, action: Callable[[], Awaitable[T]], *, brief: bool = False) -> T:
        """Run a statement that may wait for a lock. Limits the wait, and leaves the connection's settings as they were.

        Args:
            scope: Where the statement runs.
            action: Runs the statement.
            brief: Whether the statement has rows of several callers, so that one locked row must not delay them long.
        """
        return await action()

    async def holds_locks(self, connection: AsyncConnection) -> bool:
        """Whether a lock outlives its statement on this connection: not in the driver's autocommit mode."""
        raw = await connection.get_raw_connection()
        # There is one: it was just checked out.
        dbapi_connection = cast(DBAPIConnection, raw.dbapi_connection)
        return not connection.dialect.detect_autocommit_setting(dbapi_connection)

    # Waiting for another holder's lease

    async def count_clients(self, connection: Connection) -> int:
        """This user's connections to this database, as its server counts them; 1 if there is no server."""
        return 1

    async def watch(self, database: str | None, interval: Callable[[], Awaitable[float]]) -> None:
        """Wait until a row may have changed.

        Args:
            database: The database's name, or its file.
            interval: Returns the poll interval that the server can bear, in seconds.
        """
        await asyncio.sleep(jittered(await interval()))

    async def may_look(self, connection: AsyncConnection) -> bool:
        """Whether a plain read in an application's transaction has no effect on later locks and reads in it."""
        return True

    # Setup

    @asynccontextmanager
    async def exclusive_setup(self, connection: AsyncConnection) -> AsyncIterator[None]:
        """Around the creation of the table: one process at a time."""
        yield

    @asynccontextmanager
    async def exclusive_migration(self, connection: AsyncConnection) -> AsyncIterator[None]:
        """Around the change of tables that exist: one process at a time. The connection is in no transaction."""
        async with self.exclusive_setup(connection):
            yield

    async def change_table(self, connection: AsyncConnection, change: ExecutableDDLElement) -> None:
        """Change a table that others use. Waits only briefly for its lock, as the statements of all others wait behind.

        Raises:
            Exception: That of SQLAlchemy or the driver; it means LockTimeoutError if others use the table.
        """
        await connection.execute(change)

    async def add_index(self, connection: AsyncConnection, index: Index) -> None:
        """Create an index, if there is none, on a table that others go on to use.

        Raises:
            Exception: As for :meth:`change_table`.
        """
        await connection.run_sync(index.create, checkfirst=True)

    @staticmethod
    def check_url(url: URL) -> None:
        """Refuse a database that cannot serve as a store, by its URL."""
        if "@" in (url.host or ""):
            raise unencoded_at()

    async def check(self, connection: AsyncConnection) -> None:
        """Refuse a database that cannot serve as a store, before the table is created."""


def unencoded_at() -> ConfigurationError:
    """The error for a URL in which a part behind the password has an @: that part may be the password's second half.

    Messages and a store's ``repr`` show hosts and databases.
    """
    return ConfigurationError("the database URL has an @ too many: write %40 for an @ in a name or in the password")
