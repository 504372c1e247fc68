"""The backend protocol's operations on values, each one call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Hashable, Sequence
from functools import cached_property
from typing import TypeVar

from sqlalchemy import MetaData, Table

from tokenstore.value_records import ScannedValue, SealedValue, ValueKey, ValueRow
from tokenstore_sql.calls import Operation
from tokenstore_sql.dialect import Dialect
from tokenstore_sql.rows import Rows
from tokenstore_sql.schema import values_table
from tokenstore_sql.statements.values import ValueStatements
from tokenstore_sql.value_rows import ValueRows

__all__ = ["SQLValueOperations"]

T = TypeVar("T")


class SQLValueOperations(ABC):
    """See :class:`tokenstore.protocol.SupportsValues`. The calls take the road of :mod:`tokenstore_sql.calls`."""

    dialect: Dialect
    table: Table
    """The token table."""

    # Made when they are needed: a store on a session often lives for one request, and most use no values.

    @cached_property
    def values(self) -> Table:
        """The table of values."""
        return values_table(MetaData(), self.table.name, self.table.schema)

    @cached_property
    def value_statements(self) -> ValueStatements:
        """The statements on the table of values."""
        return ValueStatements(self.values, self.dialect.grammar)

    @abstractmethod
    async def _run(self, keys: Sequence[Hashable], operation: Operation[T], *, write: bool) -> T:
        """Carry out an operation. A write is committed, or left to the owner of the transaction."""

    async def put_value(self, key: ValueKey, value: SealedValue, *, ttl: float | None) -> None:
        await self._on_values(key, lambda values: values.put(key, value, ttl=ttl), write=True)

    async def insert_value(self, key: ValueKey, value: SealedValue, *, ttl: float | None) -> bool:
        return await self._on_values(key, lambda values: values.insert(key, value, ttl=ttl), write=True)

    async def get_value(self, key: ValueKey) -> ValueRow | None:
        return await self._on_values(key, lambda values: values.get(key), write=False)

    async def pop_value(self, key: ValueKey) -> ValueRow | None:
        return await self._on_values(key, lambda values: values.pop(key), write=True)

    async def delete_values(self, group: str) -> int:
        about = f"the values of namespace {group!r}"
        return await self._on_values(about, lambda values: values.delete_group(group), write=True)

    async def purge_values(self, *, limit: int) -> int:
        about = f"the table {self.values.fullname}"
        return await self._on_values(about, lambda values: values.purge(limit=limit), write=True)

    async def scan_values(
        self, *, group: str | None = None, after: ValueKey | None = None, limit: int
    ) -> list[ScannedValue]:
        about = f"the table {self.values.fullname}"
        return await self._on_values(
            about, lambda values: values.scan(group=group, after=after, limit=limit), write=False
        )

    async def rewrap_value(self, key: ValueKey, value: SealedValue, *, version: int) -> bool:
        return await self._on_values(key, lambda values: values.rewrap(key, value, version=version), write=True)

    async def _on_values(self, about: Hashable, operation: Callable[[ValueRows], Awaitable[T]], *, write: bool) -> T:
        def on_rows(rows: Rows) -> Awaitable[T]:
            return operation(ValueRows(rows, self.value_statements))

        return await self._run([about], on_rows, write=write)
