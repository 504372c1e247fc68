"""What differs between the databases, as methods that sqlite.py, postgres.py and mysql.py override."""

from __future__ import annotations

import asyncio
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from sqlalchemy import URL, ColumnElement, CursorResult, Executable, Select, Table, Update, and_, bindparam, or_
from sqlalchemy.dialects.mysql import Insert as MySQLInsert
from sqlalchemy.dialects.postgresql import Insert as PostgresInsert
from sqlalchemy.dialects.sqlite import Insert as SQLiteInsert
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncConnection

from tokenstore.errors import (
    BackendError,
    BackendUnavailableError,
    ConflictError,
    LockTimeoutError,
    TableMissingError,
)
from tokenstore_sql.pace import jittered

if TYPE_CHECKING:
    from tokenstore_sql.connection import Connection
    from tokenstore_sql.rows import Rows

__all__ = ["Dialect", "Upsert", "on_conflict_replace"]

T = TypeVar("T")
Upsert = PostgresInsert | SQLiteInsert | MySQLInsert


class Dialect(ABC):
    """One database's ways.

    Args:
        lock_timeout: The longest wait for a lock, in seconds.
    """

    isolation_level: ClassVar[str]
    """The level of a transaction that takes locks."""

    error_classes: ClassVar[Mapping[str, type[BackendError]]]
    """From the database's own codes to ours; a code's beginning may stand for a whole class of codes."""

    def __init__(self, lock_timeout: float) -> None:
        self.lock_timeout = lock_timeout

    # Statements

    @abstractmethod
    def now(self) -> ColumnElement[int]:
        """Microseconds since the epoch on the database's clock, which goes on while a statement waits for a lock."""

    @abstractmethod
    def insert(self, table: Table) -> Upsert:
        """An insert, as this database's SQLAlchemy dialect has it."""

    @abstractmethod
    def or_replace(self, insert: Any, *, replaced: Sequence[str], also: Mapping[str, Any]) -> Any:
        """Make an insert atomically set ``replaced`` to the new values, and ``also`` as given, where the row exists."""

    # Several rows in one statement

    locks_rows: ClassVar[bool] = True
    """Whether who writes a row waits for those alone who hold that row; else the lock is the whole database's."""

    statements_at_once: ClassVar[int] = 2
    """How many statements for reading, or for writing, keep the database busy: what else there is goes together."""

    most_at_once: ClassVar[int]
    """How many rows one statement reads or writes at most."""

    any_number: ClassVar[bool] = False
    """Whether one statement serves any number of rows; else there is one for each number."""

    def among(self, query: Select[Any], table: Table, size: int) -> Select[Any]:
        """Restrict a query to rows that are named by parameters."""
        c = table.c
        return query.where(
            or_(*(and_(c.provider == bindparam(f"p_{n}"), c.user_id == bindparam(f"u_{n}")) for n in range(size)))
        )

    def insert_many(self, table: Table, columns: Mapping[str, str], now: ColumnElement[int], size: int) -> Upsert:
        """An insert of several rows; ``columns`` says which parameter gives a column its value."""
        return self.insert(table).values(
            [
                {
                    **{name: bindparam(f"{p}_{n}", type_=table.c[name].type) for p, name in columns.items()},
                    "created_at": now,
                    "updated_at": now,
                }
                for n in range(size)
            ]
        )

    def together(self, names: tuple[str, ...], rows: Sequence[Sequence[Any]]) -> Mapping[str, Any]:
        """The parameters of several rows as those of one statement."""
        return dict(zip(_numbered(names, len(rows)), chain.from_iterable(rows), strict=True))

    def for_update(self, query: Select[Any]) -> Select[Any]:
        """Add the row lock."""
        return query.with_for_update()

    def lock_and_read(self, query: Select[Any], clock: ColumnElement[int]) -> Select[Any]:
        """Add the row lock, and the clock as it is when the lock is taken."""
        return self.for_update(query.add_columns(clock))

    def lock_first(self, update: Update, table: Table, this_row: Sequence[ColumnElement[bool]]) -> Update:
        """Let an update of one row read the clock only when it has the row's lock."""
        return update

    # Waiting for somebody else's lease

    async def count_clients(self, connection: Connection) -> int:
        """This user's connections to this database, as its server counts them; 1 where there is no server."""
        return 1

    async def watch(self, url: URL, pace: Callable[[], Awaitable[float]]) -> None:
        """Wait until a row may have changed; ``pace`` gives the interval, in seconds, that the server can bear."""
        await asyncio.sleep(jittered(await pace()))

    async def may_look(self, connection: AsyncConnection) -> bool:
        """Whether a plain read in somebody's transaction, before a lock, binds neither that lock nor later reads."""
        return True

    # Sessions

    async def execute(
        self, connection: AsyncConnection, statement: Executable, parameters: Mapping[str, Any]
    ) -> CursorResult[Any]:
        """Run a statement; cancelled, it leaves nothing behind in the client."""
        return await connection.execute(statement, parameters)

    async def patiently(self, rows: Rows, action: Callable[[], Awaitable[T]], *, brief: bool = False) -> T:
        """Do what may wait for a lock: bounds the wait, and leaves the connection's settings alone.

        Args:
            rows: On which connection.
            action: What to do.
            brief: Whether several callers' rows are in it, where a lock on one must not keep the others for long.
        """
        return await action()

    @asynccontextmanager
    async def exclusive_setup(self, connection: AsyncConnection) -> AsyncIterator[None]:
        """Around the creation of the table: one process at a time."""
        yield

    async def holds_locks(self, connection: AsyncConnection) -> bool:
        """Whether a lock outlives its statement on this connection: not in the driver's autocommit mode."""
        raw = await connection.get_raw_connection()
        # There is one: it was just checked out.
        dbapi_connection = cast(DBAPIConnection, raw.dbapi_connection)
        return not connection.dialect.detect_autocommit_setting(dbapi_connection)

    @staticmethod
    def check_url(url: URL) -> None:
        """Refuse what cannot serve as a store, by its URL."""

    async def check(self, connection: AsyncConnection) -> None:
        """Refuse a database that cannot serve as a store, before it is set up."""

    # Errors

    driver_error_names: ClassVar[Sequence[str]]
    """The base classes of the drivers' exceptions, which SQLAlchemy lets through when a connection is made."""

    def driver_errors(self) -> tuple[type[Exception], ...]:
        """Those of the drivers that are loaded; another one has raised nothing."""
        found = (name.rpartition(".") for name in self.driver_error_names)
        return tuple(getattr(sys.modules[module], name) for module, _, name in found if module in sys.modules)

    @abstractmethod
    def error_code(self, error: BaseException) -> str | None:
        """The SQLSTATE, errno or result code of a driver's exception; None where it carries none."""

    def error_text(self, error: BaseException, code: str) -> str:
        """The server's own words, where they cannot hold a row's data."""
        return ""

    def classify(self, error: BaseException) -> tuple[type[BackendError], str | None]:
        """The error class for a driver's exception, most specific code first."""
        code = self.error_code(error)
        for length in range(len(code or ""), 0, -1):
            if found := self.error_classes.get(str(code)[:length]):
                return found, code
        return BackendError, code


EXPLANATIONS: Mapping[type[BackendError], str] = {
    BackendError: "the database refused the statement",
    TableMissingError: "the token table does not exist: create it with `await store.setup()` or `tokenstore init`",
    LockTimeoutError: "the lock was not free in time: somebody holds the row; repeat the call",
    ConflictError: "a concurrent transaction won: repeat this one from its start",
    BackendUnavailableError: "the database cannot be reached, or went away, or accepts no writes",
}


@cache
def _numbered(names: tuple[str, ...], rows: int) -> tuple[str, ...]:
    return tuple(f"{name}_{n}" for n in range(rows) for name in names)


def on_conflict_replace(insert: Any, replaced: Sequence[str], also: Mapping[str, Any]) -> Any:
    """The upsert of PostgreSQL, and of SQLite, which took it over."""
    return insert.on_conflict_do_update(
        index_elements=list(insert.table.primary_key),
        set_={**{name: insert.excluded[name] for name in replaced}, **also},
    )
