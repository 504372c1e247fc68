"""The SQL of MySQL and MariaDB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    BindParameter,
    ColumnElement,
    Select,
    Table,
    bindparam,
    cast,
    func,
    literal_column,
    quoted_name,
    select,
    tuple_,
)
from sqlalchemy import table as named_table
from sqlalchemy.dialects.mysql import Insert, insert

from tokenstore_sql.mysql.packing import packed
from tokenstore_sql.statements.grammar import Grammar, RecordColumns, key_columns

__all__ = ["MySQLGrammar"]


class MySQLGrammar(Grammar):
    """See :class:`tokenstore_sql.statements.grammar.Grammar`.

    Args:
        packs: Whether a record's columns that are not sealed are read as one column.
    """

    def __init__(self, *, packs: bool = False) -> None:
        self._packs = packs

    def for_driver(self, driver: str) -> Grammar:
        # aiomysql is written in Python, and each column costs it some microseconds. asyncmy reads the columns in C, for
        # less than packing and unpacking them costs.
        return type(self)(packs=driver == "aiomysql")

    def now(self) -> ColumnElement[int]:
        # UTC_TIMESTAMP stands still while a statement waits for a lock. SYSDATE goes on, but in the session's time
        # zone. So this is UTC_TIMESTAMP plus the time by which SYSDATE is ahead of NOW.
        # Not func.sysdate, which SQLAlchemy renders without its argument: whole seconds.
        waited = _between(func.now(literal_column("6")), literal_column("SYSDATE(6)"))
        return cast(_since_epoch() + waited, BigInteger)

    def statement_start(self) -> ColumnElement[int]:
        return cast(_since_epoch(), BigInteger)

    def insert(self, table: Table) -> Insert:
        return insert(table)

    def or_replace(self, insert: Any, *, replaced: Sequence[str], also: Mapping[str, Any]) -> Any:
        # A list, because MySQL computes later values from earlier ones, and SQLAlchemy would sort a dict.
        return insert.on_duplicate_key_update([*((name, insert.inserted[name]) for name in replaced), *also.items()])

    def insert_if_absent(
        self, table: Table, values: Mapping[str, ColumnElement[Any]], this_row: Sequence[ColumnElement[bool]]
    ) -> Insert:
        # Not INSERT IGNORE, which turns any error into a warning. An insert of the same row by another connection at
        # the same moment ends this one with a duplicate key, which is a conflict, and sent again.
        typed = [
            bindparam(value.key, type_=table.c[name].type) if isinstance(value, BindParameter) else value
            for name, value in values.items()
        ]
        dual = named_table(quoted_name("DUAL", quote=False))
        absent = select(*typed).select_from(dual).where(~select(literal_column("1")).where(*this_row).exists())
        return insert(table).from_select(list(values), absent)

    def read(self, columns: RecordColumns, clock: ColumnElement[int]) -> Select[Any]:
        if not self._packs:
            return super().read(columns, clock)
        return select(*columns.sealed, packed(columns.key, columns.texts, (*columns.numbers, clock)))

    # There is one statement for each number of rows, so there must not be too many of them.
    most_at_once = 64

    def among(self, query: Select[Any], table: Table, size: int) -> Select[Any]:
        # With OR between pairs of comparisons, as elsewhere, the optimizers think for longer than the server reads.
        key = key_columns(table)
        named = (
            tuple_(*(bindparam(f"{name}_{n}", type_=column.type) for name, column in key.items())) for n in range(size)
        )
        return query.where(tuple_(*key.values()).in_(named))


def _since_epoch() -> ColumnElement[int]:
    return _between(literal_column("TIMESTAMP'1970-01-01 00:00:00'"), func.utc_timestamp(literal_column("6")))


def _between(start: ColumnElement[Any], end: ColumnElement[Any]) -> ColumnElement[int]:
    """Microseconds between two times."""
    return func.timestampdiff(literal_column("MICROSECOND"), start, end)
