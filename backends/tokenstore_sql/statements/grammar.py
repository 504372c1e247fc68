"""What differs between the databases' SQL, as methods that the databases' folders override."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any, ClassVar, Final, NamedTuple

from sqlalchemy import ColumnElement, Executable, Select, Table, Update, and_, bindparam, literal_column, or_, select
from sqlalchemy.dialects.mysql import Insert as MySQLInsert
from sqlalchemy.dialects.postgresql import Insert as PostgresInsert
from sqlalchemy.dialects.sqlite import Insert as SQLiteInsert

__all__ = [
    "KEY_PARAMETERS",
    "Grammar",
    "RecordColumns",
    "Upsert",
    "key_columns",
    "on_conflict_ignore",
    "on_conflict_replace",
]

Upsert = PostgresInsert | SQLiteInsert | MySQLInsert

KEY_PARAMETERS: Final[Mapping[str, str]] = {"p": "provider", "u": "user_id", "a": "account"}
"""From the parameters that name a row to the columns of the primary key, in the order of ``TokenKey``."""


def key_columns(table: Table) -> dict[str, ColumnElement[Any]]:
    """The columns of the primary key, by the parameters that name a row."""
    return {name: table.c[column] for name, column in KEY_PARAMETERS.items()}


class RecordColumns(NamedTuple):
    """The columns of a record, in the order in which its query returns them.

    Attributes:
        sealed: Those with sealed values.
        key: The primary key.
        texts: The other texts.
        numbers: Numbers.
    """

    sealed: Sequence[ColumnElement[Any]]
    key: Sequence[ColumnElement[Any]]
    texts: Sequence[ColumnElement[Any]]
    numbers: Sequence[ColumnElement[Any]]


class Grammar(ABC):
    """One database's SQL."""

    def for_driver(self, driver: str) -> Grammar:
        """The SQL as it suits a driver.

        Args:
            driver: The driver's name in SQLAlchemy's URLs.
        """
        return self

    @abstractmethod
    def now(self) -> ColumnElement[int]:
        """Microseconds since the epoch on the database's clock, which goes on while a statement waits for a lock."""

    def statement_start(self) -> ColumnElement[int]:
        """The same clock when the statement began: one value, so that a query for times before it can use an index."""
        return self.now()

    @abstractmethod
    def insert(self, table: Table) -> Upsert:
        """An insert, as SQLAlchemy's dialect for this database has it."""

    @abstractmethod
    def or_replace(self, insert: Any, *, replaced: Sequence[str], also: Mapping[str, Any]) -> Any:
        """Make an insert an atomic upsert.

        Args:
            insert: The insert.
            replaced: The columns that get the insert's values if the row exists.
            also: Columns that get other values then. They are assigned in this order, after the others.
        """

    @abstractmethod
    def insert_if_absent(
        self, table: Table, values: Mapping[str, ColumnElement[Any]], this_row: Sequence[ColumnElement[bool]]
    ) -> Upsert:
        """An insert of one row that changes nothing, and counts no row, if the row exists.

        Args:
            table: The table.
            values: The new row's values by column.
            this_row: The conditions that identify the row.
        """

    no_bytes: ClassVar[ColumnElement[bytes]] = literal_column("x''")
    """A value of no bytes."""

    most_at_once: ClassVar[int]
    """How many rows one statement reads or writes at most."""

    any_number: ClassVar[bool] = False
    """Whether one statement serves any number of rows; else there is one statement for each number."""

    def among(self, query: Select[Any], table: Table, size: int) -> Select[Any]:
        """Restrict a query to rows that are named by parameters."""
        rows = (
            and_(*(column == bindparam(f"{name}_{n}") for name, column in key_columns(table).items()))
            for n in range(size)
        )
        return query.where(or_(*rows))

    def insert_many(self, table: Table, columns: Mapping[str, str], now: ColumnElement[int], size: int) -> Upsert:
        """An insert of several rows; ``columns`` maps a parameter's name to the column that gets its value."""
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
        """The parameters of several rows as the parameters of one statement."""
        return dict(zip(_numbered(names, len(rows)), chain.from_iterable(rows), strict=True))

    def for_update(self, query: Select[Any]) -> Select[Any]:
        """Add the row lock."""
        return query.with_for_update()

    def read(self, columns: RecordColumns, clock: ColumnElement[int]) -> Select[Any]:
        """The query for records, without a condition.

        The sealed columns come first, each by itself. Then come the others and the clock's time, in the order of
        :class:`RecordColumns`: each by itself, or all of them in one column, which is returned as a sequence.
        """
        return select(*chain.from_iterable(columns), clock)

    def lock_and_read(
        self, columns: RecordColumns, clock: ColumnElement[int], this_row: Sequence[ColumnElement[bool]]
    ) -> Select[Any]:
        """The query for one record that takes the row's lock, and reads the clock after that."""
        return self.for_update(self.read(columns, clock).where(*this_row))

    def lock_first(self, update: Update, table: Table, this_row: Sequence[ColumnElement[bool]]) -> Update:
        """Make an update of one row read the clock after it has taken the row's lock."""
        return update

    def take(
        self,
        table: Table,
        this_row: Sequence[ColumnElement[bool]],
        condition: Callable[[Any], ColumnElement[bool]],
        columns: Sequence[ColumnElement[Any]],
    ) -> Executable | None:
        """One statement that deletes a row and returns it, if a condition holds after the row's lock was taken.

        Args:
            table: The table.
            this_row: Which row.
            condition: From columns of the table, by their names, to the condition.
            columns: The columns that the statement returns.

        Returns:
            The statement; None: the database has none.
        """
        return None


@cache
def _numbered(names: tuple[str, ...], rows: int) -> tuple[str, ...]:
    return tuple(f"{name}_{n}" for n in range(rows) for name in names)


def on_conflict_ignore(insert: Any, values: Mapping[str, ColumnElement[Any]]) -> Any:
    """PostgreSQL's insert that changes nothing if the row exists, which SQLite took over."""
    return insert.values(values).on_conflict_do_nothing(index_elements=list(insert.table.primary_key))


def on_conflict_replace(insert: Any, replaced: Sequence[str], also: Mapping[str, Any]) -> Any:
    """PostgreSQL's upsert, which SQLite took over."""
    return insert.on_conflict_do_update(
        index_elements=list(insert.table.primary_key),
        set_={**{name: insert.excluded[name] for name in replaced}, **also},
    )
