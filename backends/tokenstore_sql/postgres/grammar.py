"""PostgreSQL's SQL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Double,
    Executable,
    Select,
    Table,
    Update,
    bindparam,
    cast,
    delete,
    func,
    literal_column,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import Insert, insert

from tokenstore_sql.postgres.arrays import Array
from tokenstore_sql.statements.grammar import (
    Grammar,
    RecordColumns,
    key_columns,
    on_conflict_ignore,
    on_conflict_replace,
)

__all__ = ["PostgresGrammar"]

# How long a statement that writes the rows of several callers waits for a lock on one of them.
_BRIEF_LOCK_TIMEOUT_MS: Final = 100


class PostgresGrammar(Grammar):
    """See :class:`tokenstore_sql.statements.grammar.Grammar`.

    Functions are named with their schema, and the operands of each operator have exactly the types of one of
    PostgreSQL's own operators. Otherwise a function or operator that another user created in a schema of the
    search_path could match better, and would run with the rights of the store's role.
    """

    def now(self) -> ColumnElement[int]:
        # now() is the transaction's start; it stands still while a statement waits.
        return _since_epoch(func.pg_catalog.clock_timestamp())

    def statement_start(self) -> ColumnElement[int]:
        return _since_epoch(func.pg_catalog.statement_timestamp())

    def insert(self, table: Table) -> Insert:
        return insert(table)

    def or_replace(self, insert: Any, *, replaced: Sequence[str], also: Mapping[str, Any]) -> Any:
        return on_conflict_replace(insert, replaced, also)

    def insert_if_absent(
        self, table: Table, values: Mapping[str, ColumnElement[Any]], this_row: Sequence[ColumnElement[bool]]
    ) -> Any:
        return on_conflict_ignore(insert(table), values)

    no_bytes = literal_column("''")

    # The parameters are an array for each column: one statement, and one plan, for any number of rows.
    any_number = True
    most_at_once = 500

    def among(self, query: Select[Any], table: Table, size: int) -> Select[Any]:
        # One lookup for each key. OFFSET keeps the planner from making a join of it, which reads a small table whole.
        key = key_columns(table)
        wanted = _unnested(key)
        this_row = (column == wanted.c[name] for name, column in key.items())
        one = query.where(*this_row).offset(literal_column("0"))
        found = one.lateral("found")
        return select(*found.c).select_from(wanted.join(found, true()))

    def insert_many(self, table: Table, columns: Mapping[str, str], now: ColumnElement[int], size: int) -> Insert:
        rows = _unnested({name: table.c[column] for name, column in columns.items()})
        # A lock on one of the rows must not delay the other callers for long.
        briefly = func.pg_catalog.set_config("lock_timeout", f"{_BRIEF_LOCK_TIMEOUT_MS}ms", True).is_not(None)
        return insert(table).from_select(
            [*columns.values(), "created_at", "updated_at"], select(*rows.c, now, now).where(briefly)
        )

    def together(self, names: tuple[str, ...], rows: Sequence[Sequence[Any]]) -> Mapping[str, Any]:
        return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))

    def for_update(self, query: Select[Any]) -> Select[Any]:
        return query.with_for_update(key_share=True)  # NO KEY: the key itself never changes

    def lock_and_read(
        self, columns: RecordColumns, clock: ColumnElement[int], this_row: Sequence[ColumnElement[bool]]
    ) -> Select[Any]:
        # As in lock_first, a clock beside the lock would be read before the wait.
        locked = self.for_update(select(*chain.from_iterable(columns)).where(*this_row)).subquery("locked")
        return select(*locked.c, clock)

    def lock_first(self, update: Update, table: Table, this_row: Sequence[ColumnElement[bool]]) -> Update:
        # PostgreSQL computes new values before the wait, and again only if the row has changed meanwhile. A subquery
        # that locks the row ends before anything is computed from it.
        key = list(table.primary_key)
        locked = self.for_update(select(*key).where(*this_row)).subquery("locked")
        return update.where(*(column == locked.c[column.name] for column in key))

    def take(
        self,
        table: Table,
        this_row: Sequence[ColumnElement[bool]],
        condition: Callable[[Any], ColumnElement[bool]],
        columns: Sequence[ColumnElement[Any]],
    ) -> Executable:
        # As in lock_first. The condition is on the subquery's columns, and OFFSET keeps the planner from moving it into
        # the subquery, where it would be computed before the wait.
        one = select(*table.c).where(*this_row).offset(literal_column("0"))
        locked = self.for_update(one).subquery("locked")
        same = (column == locked.c[column.name] for column in table.primary_key)
        return delete(table).where(*same, condition(locked.c)).returning(*columns)


def _since_epoch(time: ColumnElement[Any]) -> ColumnElement[int]:
    """A time in microseconds since the epoch."""
    seconds: ColumnElement[float] = func.pg_catalog.date_part(literal_column("'epoch'"), time, type_=Double())
    return cast(seconds * cast(literal_column("1000000"), Double()), BigInteger)


def _unnested(columns: Mapping[str, ColumnElement[Any]]) -> Any:
    """A table of parameters: an array for each column."""
    arrays = [bindparam(name, type_=Array(column.type)) for name, column in columns.items()]
    # PostgreSQL knows unnest of several arrays by its bare name alone, and takes its own function for each of them.
    return func.unnest(*arrays).table_valued(*columns, name="given").render_derived()
