"""SQLite's SQL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Executable, Integer, Select, Table, cast, delete, func, literal_column
from sqlalchemy.dialects.sqlite import Insert, insert

from tokenstore_sql.statements.grammar import Grammar, on_conflict_ignore, on_conflict_replace

__all__ = ["SQLiteGrammar"]


class SQLiteGrammar(Grammar):
    """See :class:`tokenstore_sql.statements.grammar.Grammar`."""

    def now(self) -> ColumnElement[int]:
        # SQLite's clock counts milliseconds; 2440587.5 is the epoch's Julian day.
        days: ColumnElement[float] = func.julianday(literal_column("'now'")) - literal_column("2440587.5")
        return cast(days * literal_column("86400000"), Integer) * literal_column("1000")

    def insert(self, table: Table) -> Insert:
        return insert(table)

    def or_replace(self, insert: Any, *, replaced: Sequence[str], also: Mapping[str, Any]) -> Any:
        return on_conflict_replace(insert, replaced, also)

    def insert_if_absent(
        self, table: Table, values: Mapping[str, ColumnElement[Any]], this_row: Sequence[ColumnElement[bool]]
    ) -> Any:
        return on_conflict_ignore(insert(table), values)

    # SQLite's parser refuses an expression of more terms as too deep.
    most_at_once = 256

    def for_update(self, query: Select[Any]) -> Select[Any]:
        return query  # BEGIN IMMEDIATE locks the whole database

    def take(
        self,
        table: Table,
        this_row: Sequence[ColumnElement[bool]],
        condition: Callable[[Any], ColumnElement[bool]],
        columns: Sequence[ColumnElement[Any]],
    ) -> Executable:
        return delete(table).where(*this_row, condition(table.c)).returning(*columns)
