"""The backend's operations on one connection. Who begins, commits and maps errors is the caller's affair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

from sqlalchemy import CursorResult, Executable, Row
from sqlalchemy.ext.asyncio import AsyncConnection

from tokenstore.records import Failure, ScannedRow, SealedRecord, SealedTokens, TokenKey, new_generation
from tokenstore_sql.dialect import Dialect
from tokenstore_sql.pace import Clients
from tokenstore_sql.statements import Statements

__all__ = ["Rows"]

_US = 1_000_000
# Databases bound the number of parameters (SQLite 32,766; PostgreSQL 32,767).
_KEYS_A_QUERY = 1000


class Rows:
    """The table as one connection sees it.

    Args:
        connection: The connection.
        statements: The table's statements.
        dialect: The database's ways.
        transactional: Whether statements run in a transaction, rather than each on its own.
        borrowed: Whether the connection's settings belong to somebody else and must be left as found.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        statements: Statements,
        dialect: Dialect,
        *,
        transactional: bool,
        borrowed: bool,
    ) -> None:
        self.connection = connection
        self.statements = statements
        self.dialect = dialect
        self.transactional = transactional
        self.borrowed = borrowed
        self.wait_is_bounded = False
        """For the dialect: that this transaction needs no further preparation to wait."""

    async def get(self, keys: Sequence[TokenKey]) -> list[SealedRecord | None]:
        if len(keys) == 1:
            return [_record((await self._read(self.statements.get, _where(keys[0]))).first())]
        found: dict[TokenKey, SealedRecord] = {}
        distinct = list(dict.fromkeys(keys))
        for start in range(0, len(distinct), _KEYS_A_QUERY):
            chunk = [tuple(key) for key in distinct[start : start + _KEYS_A_QUERY]]
            for row in await self._read(self.statements.get_many, {"keys": chunk}):
                record = _some(row)
                found[record.key] = record
        return [found.get(key) for key in keys]

    async def lock(self, key: TokenKey) -> SealedRecord | None:
        async with self.dialect.waiting(self):
            return _record((await self._read(self.statements.lock, _where(key))).first())

    async def put(self, entries: Mapping[TokenKey, SealedTokens]) -> None:
        # In one order everywhere, so that two calls cannot dead-lock on each other.
        writes = [{**_where(key), "g": new_generation(), **_sealed(entries[key])} for key in sorted(entries)]
        for parameters in writes:
            await self._write(self.statements.put, parameters)

    async def delete(self, key: TokenKey) -> bool:
        return await self._write(self.statements.delete, _where(key)) > 0

    async def scan(
        self, *, provider: str | None, user_id: str | None, after: TokenKey | None, limit: int
    ) -> list[ScannedRow]:
        page: list[ScannedRow] = []
        for query in self.statements.scan(provider, user_id, after, limit):
            if len(page) < limit:
                rows = await self._read(query.limit(limit - len(page)), {})
                page += [_scanned(row) for row in rows]
        return page

    async def claim_lease(self, key: TokenKey, *, generation: int, holder: str, duration: float) -> bool:
        parameters = {**_where(key), "g": generation, "h": holder, "duration": round(duration * _US)}
        return await self._write(self.statements.claim, parameters) > 0

    async def complete_lease(self, key: TokenKey, tokens: SealedTokens, *, generation: int, holder: str) -> bool:
        parameters = {**_where(key), "g": generation, "h": holder, **_sealed(tokens)}
        return await self._write(self.statements.complete, parameters) > 0

    async def release_lease(
        self, key: TokenKey, *, generation: int, holder: str, failure: Failure | None = None
    ) -> bool:
        parameters: dict[str, Any] = {**_where(key), "g": generation, "h": holder}
        if failure is None:
            return await self._write(self.statements.release, parameters) > 0
        parameters["code"] = failure.code
        parameters["retry_in"] = None if failure.retry_in is None else round(failure.retry_in * _US)
        return await self._write(self.statements.fail, parameters) > 0

    async def rewrap(self, key: TokenKey, tokens: SealedTokens, *, generation: int) -> bool:
        sealed = _sealed(tokens)
        del sealed["access_token_expires_at"], sealed["refresh_token_expires_at"]
        return await self._write(self.statements.rewrap, {**_where(key), "g": generation, **sealed}) > 0

    async def count_clients(self) -> Clients:
        # A transaction goes on even where counting is refused.
        async with self.connection.begin_nested() if self.transactional else nullcontext():
            found = await self.dialect.count_clients(self.connection)
        pool: Any = self.connection.engine.sync_engine.pool
        own = pool.checkedin() + pool.checkedout() if hasattr(pool, "checkedin") else 1
        return Clients(found, own)

    async def _read(self, statement: Executable, parameters: Mapping[str, Any]) -> CursorResult[Any]:
        return await self.dialect.execute(self.connection, statement, parameters)

    async def _write(self, statement: Executable, parameters: Mapping[str, Any]) -> int:
        async with self.dialect.waiting(self):
            return (await self.dialect.execute(self.connection, statement, parameters)).rowcount


def _where(key: TokenKey) -> dict[str, Any]:
    return {"p": key.provider, "u": key.user_id}


def _sealed(tokens: SealedTokens) -> dict[str, Any]:
    return {
        "access_token": tokens.access_token,
        "refresh_token": tokens.refresh_token,
        "extra": tokens.extra,
        "key_id": tokens.key_id,
        "access_token_expires_at": tokens.access_token_expires_at,
        "refresh_token_expires_at": tokens.refresh_token_expires_at,
    }


def _scanned(row: Row[Any]) -> ScannedRow:
    provider, user_id, has_refresh_token, *rest = cast(tuple[Any, ...], row)
    return ScannedRow(TokenKey(provider, user_id), bool(has_refresh_token), *rest)


def _record(row: Row[Any] | None) -> SealedRecord | None:
    return None if row is None else _some(row)


def _some(row: Row[Any]) -> SealedRecord:
    (
        provider,
        user_id,
        access_token,
        refresh_token,
        extra,
        access_token_expires_at,
        refresh_token_expires_at,
        key_id,
        generation,
        lease_holder,
        lease_expires_at,
        failure_code,
        retry_at,
        created_at,
        updated_at,
        as_of,
    ) = cast(tuple[Any, ...], row)
    failure = None
    if failure_code is not None:
        failure = Failure(failure_code, None if retry_at is None else (retry_at - as_of) / _US)
    return SealedRecord(
        key=TokenKey(provider, user_id),
        tokens=SealedTokens(
            access_token=access_token,
            refresh_token=refresh_token,
            extra=extra,
            access_token_expires_at=access_token_expires_at,
            refresh_token_expires_at=refresh_token_expires_at,
            key_id=key_id,
        ),
        generation=generation,
        lease_holder=lease_holder,
        lease_expires_in=None if lease_expires_at is None else (lease_expires_at - as_of) / _US,
        failure=failure,
        created_at=created_at,
        updated_at=updated_at,
        as_of=as_of,
    )
