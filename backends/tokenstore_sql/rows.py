"""The operations on one connection. The caller begins and commits transactions and maps errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from operator import itemgetter
from typing import Any, TypeVar

from sqlalchemy import Executable

from tokenstore.health import RowFilter, SearchPage, after_prefix
from tokenstore.records import (
    NO_METADATA,
    DueKey,
    DueRow,
    Failure,
    ScannedRow,
    SealedMetadata,
    SealedRecord,
    SealedTokens,
    TokenKey,
    new_generation,
)
from tokenstore_sql.connections.connection import Connection, StatementResult
from tokenstore_sql.connections.driver import OneTripConnection
from tokenstore_sql.dialect import Dialect, LockScope
from tokenstore_sql.statements.statements import Statements

__all__ = ["Rows", "record_of"]

T = TypeVar("T")

_US = 1_000_000


class Rows:
    """The table's rows as one connection sees and changes them.

    Args:
        connection: The connection.
        statements: The table's statements.
        dialect: How the database locks.
        transactional: Whether statements run in a transaction, rather than each on its own.
    """

    def __init__(
        self, connection: Connection, statements: Statements, dialect: Dialect, *, transactional: bool
    ) -> None:
        self.connection = connection
        self.statements = statements
        self.transactional = transactional
        self._dialect = dialect
        self._scope = LockScope(connection, statements.table, transactional)

    async def get(self, key: TokenKey) -> SealedRecord | None:
        rows, _ = await self.connection.run(self.statements.get, _where(key))
        return record_of(rows)

    async def get_many(self, keys: Sequence[TokenKey]) -> list[SealedRecord | None]:
        """Read several rows. The result has one element for each key, in order; a key may be there twice."""
        if len(keys) == 1:
            return [await self.get(keys[0])]
        found: dict[TokenKey, SealedRecord] = {}
        for several in _chunks(list(dict.fromkeys(keys)), self.statements.grammar.most_at_once):
            rows, _ = await self.connection.run(*self.statements.get_many(several))
            for row in map(_record, rows):
                found[row.key] = row
        # If the server answers with a row that is not among the keys, None would say that the asked row does not exist.
        # The core refuses the other row as tampered.
        strangers = found.keys() - set(keys)
        instead = found[min(strangers)] if strangers else None
        return [found.get(key, instead) for key in keys]

    async def lock(self, key: TokenKey) -> SealedRecord | None:
        rows, _ = await self.run_locking(self.statements.lock, _where(key))
        return record_of(rows)

    async def put(self, key: TokenKey, tokens: SealedTokens, metadata: SealedMetadata | None = None) -> None:
        if metadata is None:
            _ = await self.run_locking(self.statements.put, _put(key, tokens))
        else:
            _ = await self.run_locking(self.statements.put_with_metadata, {**_put(key, tokens), **_metadata(metadata)})

    async def put_many(self, entries: Sequence[tuple[TokenKey, SealedTokens]]) -> None:
        """Write several rows, all or none."""
        if len(entries) == 1:
            await self.put(*entries[0])
            return
        # All calls lock rows in the same order, so that two of them cannot dead-lock on each other.
        in_order = sorted(entries, key=itemgetter(0))
        writes = [_put(key, tokens) for key, tokens in in_order]
        if isinstance(connection := self.connection, OneTripConnection):
            _ = await self._dialect.run_locking(self._scope, lambda: connection.run_each(self.statements.put, writes))
        else:
            for several in _chunks(writes, self.statements.grammar.most_at_once):
                _ = await self.run_locking(*self.statements.put_many(several), brief=not self.transactional)

    async def insert(self, key: TokenKey, tokens: SealedTokens, metadata: SealedMetadata | None = None) -> bool:
        parameters = {**_put(key, tokens), **_metadata(metadata or NO_METADATA)}
        while not await self._write(self.statements.insert, parameters):
            # Not `get`: in a transaction that reads from a snapshot, it may not see the row.
            row = None if tokens.is_empty else await self.lock(key)
            if tokens.is_empty or (row is not None and not row.tokens.is_empty):
                return False
            if row is not None and await self._write(self.statements.fill, parameters):
                break
        return True

    async def delete(self, key: TokenKey) -> bool:
        return await self._write(self.statements.delete, _where(key)) > 0

    async def clock(self) -> int:
        rows, _ = await self.connection.run(self.statements.clock)
        return int(rows[0][0])

    async def scan(
        self, *, provider: str | None, user_id: str | None, after: TokenKey | None, limit: int, with_metadata: bool
    ) -> list[ScannedRow]:
        queries = self.statements.scan(
            by_provider=provider is not None,
            by_user=user_id is not None,
            after=after is not None,
            with_metadata=with_metadata,
        )
        parameters = _range(provider, user_id, after)
        return [_scanned(row) for row in await self.page(queries, parameters, limit)]

    async def search(
        self,
        where: RowFilter,
        *,
        provider: str | None,
        user_id: str | None,
        after: TokenKey | None,
        limit: int,
        with_metadata: bool,
    ) -> SearchPage:
        prefix, within = where.user_prefix, where.expiring_within
        user_to = None if prefix is None else after_prefix(prefix)
        queries = self.statements.search(
            by_provider=provider is not None,
            by_user=user_id is not None,
            after=after is not None,
            status=where.status is not None,
            expiring=within is not None,
            prefix=prefix is not None,
            open_end=user_to is None,
            with_metadata=with_metadata,
        )
        parameters = {
            **_range(provider, user_id, after),
            "status": where.status,
            "margin": round(where.margin * _US),
            "within": None if within is None else round(within * _US),
            "user_from": prefix,
            "user_to": user_to,
            "limit": limit,
        }
        found: list[ScannedRow] = []
        for query in queries:
            rows, _ = await self.connection.run(query, parameters)
            found += [_scanned(row[:-2]) for row in rows if row[-2]]
            if rows and rows[-1][-1] == limit:
                return SearchPage(found, TokenKey(*rows[-1][:3]))
        return SearchPage(found, None)

    async def scan_due(
        self, *, provider: str, within: float, as_of: int | None, after: DueKey | None, limit: int
    ) -> list[DueRow]:
        parameters: dict[str, Any] = {"p": provider, "within": round(within * _US), "as_of": as_of}
        if after is not None:
            parameters |= {"after_d": after.due_at, "after_u": after.user_id, "after_a": after.account}
        queries = self.statements.scan_due(after=after is not None)
        return [_due(row) for row in await self.page(queries, parameters, limit)]

    async def claim_lease(self, key: TokenKey, *, generation: int, holder: str, duration: float) -> bool:
        parameters = {**_where(key), "g": generation, "h": holder, "duration": round(duration * _US)}
        return await self._write(self.statements.claim, parameters) > 0

    async def complete_lease(
        self,
        key: TokenKey,
        tokens: SealedTokens,
        *,
        generation: int,
        holder: str,
        metadata: SealedMetadata | None = None,
    ) -> bool:
        parameters = {**_where(key), "g": generation, "h": holder, **_written(tokens)}
        if metadata is None:
            return await self._write(self.statements.complete, parameters) > 0
        return await self._write(self.statements.complete_with_metadata, {**parameters, **_metadata(metadata)}) > 0

    async def release_lease(
        self, key: TokenKey, *, generation: int, holder: str, failure: Failure | None = None
    ) -> bool:
        parameters: dict[str, Any] = {**_where(key), "g": generation, "h": holder}
        if failure is None:
            return await self._write(self.statements.release, parameters) > 0
        parameters["code"] = failure.code
        parameters["retry_in"] = None if failure.retry_in is None else round(failure.retry_in * _US)
        return await self._write(self.statements.fail, parameters) > 0

    async def clear_failure(self, key: TokenKey, *, min_age: float = 0.0, as_of: int | None = None) -> bool:
        parameters = {**_where(key), "min_age": round(min_age * _US), "as_of": as_of}
        return await self._write(self.statements.clear_failure, parameters) > 0

    async def rewrap(self, key: TokenKey, tokens: SealedTokens, *, generation: int) -> bool:
        parameters = {**_where(key), "g": generation, **_sealed(tokens)}
        return await self._write(self.statements.rewrap, parameters) > 0

    async def page(
        self, queries: Iterable[Executable], parameters: Mapping[str, Any], limit: int
    ) -> list[Sequence[Any]]:
        """The rows of several queries, one after the other, up to a limit: their parameter ``limit``."""
        page: list[Sequence[Any]] = []
        for query in queries:
            if len(page) < limit:
                rows, _ = await self.connection.run(query, {**parameters, "limit": limit - len(page)})
                page += rows
        return page

    async def set_metadata(self, key: TokenKey, metadata: SealedMetadata, *, replacing: bytes | None) -> bool:
        parameters = {**_where(key), **_metadata(metadata)}
        if replacing is None:
            return await self._write(self.statements.set_first_metadata, parameters) > 0
        return await self._write(self.statements.set_metadata, {**parameters, "replacing": replacing}) > 0

    async def count_clients(self) -> int:
        # If the server refuses to count, the transaction must be able to go on.
        async with self.connection.savepoint() if self.transactional else nullcontext():
            return await self._dialect.count_clients(self.connection)

    async def _write(self, statement: Executable, parameters: Mapping[str, Any]) -> int:
        return (await self.run_locking(statement, parameters)).changed

    async def run_locking(
        self, statement: Executable, parameters: Mapping[str, Any], *, brief: bool = False
    ) -> StatementResult:
        """Run a statement that may wait for a lock; see :meth:`tokenstore_sql.dialect.Dialect.run_locking`."""
        return await self._dialect.run_locking(
            self._scope, lambda: self.connection.run(statement, parameters), brief=brief
        )


def _chunks(writes: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(writes), size):
        yield writes[start : start + size]


def _where(key: TokenKey) -> dict[str, Any]:
    return {"p": key.provider, "u": key.user_id, "a": key.account}


def _sealed(tokens: SealedTokens) -> dict[str, Any]:
    return {
        "access_token": tokens.access_token,
        "refresh_token": tokens.refresh_token,
        "extra": tokens.extra,
        "key_id": tokens.key_id,
    }


def _written(tokens: SealedTokens) -> dict[str, Any]:
    return {
        **_sealed(tokens),
        "due_at": tokens.due_at,
        "access_token_expires_at": tokens.access_token_expires_at,
        "refresh_token_expires_at": tokens.refresh_token_expires_at,
        "access_token_expiry_known": int(tokens.access_token_expiry_known),
    }


def _metadata(metadata: SealedMetadata) -> dict[str, Any]:
    return {"metadata": metadata.value, "metadata_key_id": metadata.key_id}


def _put(key: TokenKey, tokens: SealedTokens) -> dict[str, Any]:
    return {**_where(key), "g": new_generation(), **_written(tokens)}


def _range(provider: str | None, user_id: str | None, after: TokenKey | None) -> dict[str, Any]:
    parameters: dict[str, Any] = {"p": provider, "u": user_id}
    if after is not None:
        parameters |= {"after_p": after.provider, "after_u": after.user_id, "after_a": after.account}
    return parameters


def _scanned(row: Sequence[Any]) -> ScannedRow:
    provider, user_id, account, has_refresh_token, issued, access_expiry, refresh_expiry, known, *rest = row
    key = TokenKey(provider, user_id, account)
    return ScannedRow(key, bool(has_refresh_token), bool(issued), access_expiry, refresh_expiry, _switch(known), *rest)


def _due(row: Sequence[Any]) -> DueRow:
    provider, user_id, account, due_at, access_token_expires_at, updated_at, as_of, is_empty = row
    key = TokenKey(provider, user_id, account)
    return DueRow(key, due_at, access_token_expires_at, updated_at, as_of, bool(is_empty))


def record_of(rows: Sequence[Sequence[Any]]) -> SealedRecord | None:
    """What a query for one row found."""
    return _record(rows[0]) if rows else None


def _record(row: Sequence[Any]) -> SealedRecord:
    """From what :meth:`tokenstore_sql.statements.grammar.Grammar.read` selects."""
    access_token, refresh_token, extra, metadata, *plain = row
    (
        provider,
        user_id,
        account,
        key_id,
        metadata_key_id,
        lease_holder,
        failure_code,
        access_token_expires_at,
        refresh_token_expires_at,
        access_token_expiry_known,
        generation,
        lease_expires_at,
        retry_at,
        created_at,
        updated_at,
        as_of,
    ) = plain[0] if len(plain) == 1 else plain
    failure = None
    if failure_code is not None:
        failure = Failure(failure_code, None if retry_at is None else _seconds(retry_at, as_of))
    # By position, as names take twice as long.
    return SealedRecord(
        TokenKey(provider, user_id, account),
        SealedTokens(
            access_token,
            refresh_token,
            extra,
            access_token_expires_at,
            refresh_token_expires_at,
            key_id,
            _switch(access_token_expiry_known),
        ),
        generation,
        lease_holder,
        None if lease_expires_at is None else _seconds(lease_expires_at, as_of),
        failure,
        created_at,
        updated_at,
        as_of,
        # Most rows have none.
        NO_METADATA if metadata is metadata_key_id is None else SealedMetadata(metadata, metadata_key_id),
    )


def _switch(value: Any) -> Any:
    """A truth value of a column of numbers; an altered column's other value stays, and the core refuses it."""
    return value == 1 if value in (0, 1) else value


def _seconds(at: Any, as_of: Any) -> float:
    """Seconds until a time; NaN, which the core refuses, if an altered column holds something else than a number."""
    try:
        return float((at - as_of) / _US)
    except TypeError:
        return math.nan
