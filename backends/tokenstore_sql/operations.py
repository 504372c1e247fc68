"""The backend protocol's operations on SQL rows, each one call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import TypeVar

from sqlalchemy import URL, MetaData, Table

from tokenstore.health import RowFilter, SearchPage
from tokenstore.records import DueKey, DueRow, Failure, ScannedRow, SealedMetadata, SealedRecord, SealedTokens, TokenKey
from tokenstore_sql.calls import Operation
from tokenstore_sql.dialect import Dialect
from tokenstore_sql.polling import Clients, PollInterval
from tokenstore_sql.schema import DEFAULT_TABLE, TOKEN_TABLE, VALUES_TABLE, token_table
from tokenstore_sql.statements.statements import Statements
from tokenstore_sql.value_operations import SQLValueOperations

__all__ = ["SQLOperations"]

T = TypeVar("T")


class SQLOperations(SQLValueOperations, ABC):
    """See :class:`tokenstore.protocol.Backend`.

    Args:
        dialect: How the database locks and waits.
        url: The database's address.
        table: The table's name.
        schema: The table's schema.
    """

    def __init__(self, dialect: Dialect, url: URL, table: str = DEFAULT_TABLE, schema: str | None = None) -> None:
        self.dialect = dialect
        self.table = token_table(MetaData(), table, schema)
        self.statements = Statements(self.table, dialect.grammar.for_driver(url.get_driver_name()))
        self._database = url.database  # and not the URL, which has the password
        self._poll_interval = PollInterval()

    @property
    def tables(self) -> dict[str, Table]:
        """Both tables, by what an error calls a table of that kind."""
        return {TOKEN_TABLE: self.table, VALUES_TABLE: self.values}

    @abstractmethod
    async def _run(self, keys: Sequence[Hashable], operation: Operation[T], *, write: bool) -> T:
        """Carry out an operation. A write is committed, or left to the owner of the transaction."""

    @abstractmethod
    def _own_clients(self) -> int:
        """How many connections to the server this process has, as far as this object knows."""

    async def get(self, key: TokenKey) -> SealedRecord | None:
        return await self._run([key], lambda rows: rows.get(key), write=False)

    async def put(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> None:
        await self._run([key], lambda rows: rows.put(key, tokens, metadata), write=True)

    async def insert(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> bool:
        return await self._run([key], lambda rows: rows.insert(key, tokens, metadata), write=True)

    async def delete(self, key: TokenKey) -> bool:
        return await self._run([key], lambda rows: rows.delete(key), write=True)

    async def clock(self) -> int:
        return await self._run([], lambda rows: rows.clock(), write=False)

    async def scan(
        self,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        after: TokenKey | None = None,
        limit: int,
        with_metadata: bool = False,
    ) -> list[ScannedRow]:
        return await self._run(
            [],
            lambda rows: rows.scan(
                provider=provider, user_id=user_id, after=after, limit=limit, with_metadata=with_metadata
            ),
            write=False,
        )

    async def search(
        self,
        where: RowFilter,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        after: TokenKey | None = None,
        limit: int,
        with_metadata: bool = False,
    ) -> SearchPage:
        return await self._run(
            [],
            lambda rows: rows.search(
                where, provider=provider, user_id=user_id, after=after, limit=limit, with_metadata=with_metadata
            ),
            write=False,
        )

    async def scan_due(
        self, *, provider: str, within: float, as_of: int | None = None, after: DueKey | None = None, limit: int
    ) -> list[DueRow]:
        return await self._run(
            [],
            lambda rows: rows.scan_due(provider=provider, within=within, as_of=as_of, after=after, limit=limit),
            write=False,
        )

    async def claim_lease(self, key: TokenKey, *, generation: int, holder: str, duration: float) -> bool:
        return await self._run(
            [key],
            lambda rows: rows.claim_lease(key, generation=generation, holder=holder, duration=duration),
            write=True,
        )

    async def complete_lease(
        self,
        key: TokenKey,
        tokens: SealedTokens,
        *,
        generation: int,
        holder: str,
        metadata: SealedMetadata | None = None,
    ) -> bool:
        return await self._run(
            [key],
            lambda rows: rows.complete_lease(key, tokens, generation=generation, holder=holder, metadata=metadata),
            write=True,
        )

    async def release_lease(
        self, key: TokenKey, *, generation: int, holder: str, failure: Failure | None = None
    ) -> bool:
        return await self._run(
            [key],
            lambda rows: rows.release_lease(key, generation=generation, holder=holder, failure=failure),
            write=True,
        )

    async def clear_failure(self, key: TokenKey, *, min_age: float = 0.0, as_of: int | None = None) -> bool:
        return await self._run([key], lambda rows: rows.clear_failure(key, min_age=min_age, as_of=as_of), write=True)

    async def rewrap(self, key: TokenKey, tokens: SealedTokens, *, generation: int) -> bool:
        return await self._run([key], lambda rows: rows.rewrap(key, tokens, generation=generation), write=True)

    async def set_metadata(self, key: TokenKey, metadata: SealedMetadata, *, replacing: bytes | None) -> bool:
        return await self._run([key], lambda rows: rows.set_metadata(key, metadata, replacing=replacing), write=True)

    async def watch(self, key: TokenKey) -> None:
        """See :class:`tokenstore.protocol.SupportsWatching`; :mod:`tokenstore_sql.polling` explains the intervals."""
        await self.dialect.watch(self._database, lambda: self._poll_interval.current(self._count_clients))

    async def _count_clients(self) -> Clients:
        found = await self._run([], lambda rows: rows.count_clients(), write=False)
        return Clients(found, self._own_clients())
