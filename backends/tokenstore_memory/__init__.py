"""The smallest backend: rows in a dict of this process. For tests, and the model for those of other backends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Self
from urllib.parse import parse_qsl, urlsplit

from tokenstore.errors import ConfigurationError, LockTimeoutError, StoreClosedError
from tokenstore.locks import KeyedLocks
from tokenstore.options import positive_seconds, read_options
from tokenstore.records import Failure, ScannedRow, SealedRecord, SealedTokens, TokenKey, new_generation

__all__ = ["MemoryBackend", "MemoryTransaction"]

_US = 1_000_000
_OPTIONS = {"lock_timeout": positive_seconds}


@dataclass(frozen=True, slots=True)
class _Row:
    tokens: SealedTokens
    generation: int
    created_at: int
    updated_at: int
    lease_holder: str | None = None
    lease_expires_at: int | None = None
    failure_code: str | None = None
    retry_at: int | None = None

    def next(self, tokens: SealedTokens, now: int) -> _Row:
        return _Row(tokens, self.generation + 1, self.created_at, now)


class MemoryBackend:
    """Rows in this process, gone with it. Serves the tasks of one event loop.

    Args:
        lock_timeout: The longest wait for a row's lock, in seconds.
        clock: Seconds since the epoch: what a database's own clock is to the other backends.
    """

    def __init__(self, *, lock_timeout: float = 10.0, clock: Callable[[], float] = time.time) -> None:
        self._rows: dict[TokenKey, _Row] = {}
        self._locks = KeyedLocks()
        self._lock_timeout = lock_timeout
        self._clock = clock
        self._closed = False

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, object]) -> Self:
        """``memory://``, with the option ``lock_timeout``. Each store has rows of its own."""
        parts = urlsplit(url)
        if parts.netloc or parts.path:
            raise ConfigurationError("memory:// takes no host and no path; each store has rows of its own")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        checked = read_options("memory://", _OPTIONS, query, options)
        return cls(**checked)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return "<MemoryBackend>"

    async def setup(self) -> None:
        """Nothing to create."""
        self._open_rows()

    async def aclose(self) -> None:
        """Forget every row."""
        self._closed = True
        self._rows.clear()

    async def get(self, keys: Sequence[TokenKey]) -> list[SealedRecord | None]:
        rows, now = self._open_rows(), self._now()
        return [_record(key, rows.get(key), now) for key in keys]

    async def put(self, entries: Mapping[TokenKey, SealedTokens]) -> None:
        async with self.transaction() as transaction:
            await transaction.put(entries)

    async def delete(self, key: TokenKey) -> bool:
        async with self.transaction() as transaction:
            return await transaction.delete(key)

    async def scan(
        self,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        after: TokenKey | None = None,
        limit: int,
    ) -> list[ScannedRow]:
        rows, now = self._open_rows(), self._now()
        found = sorted(
            (
                (key, row)
                for key, row in rows.items()
                if provider in (None, key.provider)
                and user_id in (None, key.user_id)
                and (after is None or _order(key) > _order(after))
            ),
            key=lambda item: _order(item[0]),
        )
        return [
            ScannedRow(
                key,
                row.tokens.refresh_token is not None,
                row.tokens.access_token_expires_at,
                row.tokens.refresh_token_expires_at,
                row.tokens.key_id,
                row.generation,
                row.created_at,
                row.updated_at,
                now,
            )
            for key, row in found[:limit]
        ]

    async def claim_lease(self, key: TokenKey, *, generation: int, holder: str, duration: float) -> bool:
        def claim(row: _Row, now: int) -> _Row | None:
            leased = row.lease_expires_at is not None and row.lease_expires_at > now
            failed = row.failure_code is not None and (row.retry_at is None or row.retry_at > now)
            if leased or failed:
                return None
            return replace(row, lease_holder=holder, lease_expires_at=now + round(duration * _US))

        return await self._compare_and_set(key, generation, claim)

    async def complete_lease(self, key: TokenKey, tokens: SealedTokens, *, generation: int, holder: str) -> bool:
        def complete(row: _Row, now: int) -> _Row | None:
            return row.next(tokens, now) if row.lease_holder == holder else None

        return await self._compare_and_set(key, generation, complete)

    async def release_lease(
        self, key: TokenKey, *, generation: int, holder: str, failure: Failure | None = None
    ) -> bool:
        def release(row: _Row, now: int) -> _Row | None:
            if row.lease_holder != holder:
                return None
            code = retry_at = None
            if failure is not None:
                code = failure.code
                retry_at = None if failure.retry_in is None else now + round(failure.retry_in * _US)
            return replace(row, lease_holder=None, lease_expires_at=None, failure_code=code, retry_at=retry_at)

        return await self._compare_and_set(key, generation, release)

    async def rewrap(self, key: TokenKey, tokens: SealedTokens, *, generation: int) -> bool:
        def rewrap(row: _Row, _now: int) -> _Row:
            sealed = replace(
                row.tokens,
                access_token=tokens.access_token,
                refresh_token=tokens.refresh_token,
                extra=tokens.extra,
                key_id=tokens.key_id,
            )
            return replace(row, tokens=sealed)

        return await self._compare_and_set(key, generation, rewrap)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[MemoryTransaction]:
        transaction = MemoryTransaction(self)
        try:
            yield transaction
            transaction.commit()
        finally:
            transaction.release()

    async def _compare_and_set(
        self, key: TokenKey, generation: int, change: Callable[[_Row, int], _Row | None]
    ) -> bool:
        lock = await self._lock(key)
        try:
            # Nothing is awaited from here on, so this is one atomic step; the clock is read after the wait.
            rows = self._open_rows()
            row = rows.get(key)
            if row is None or row.generation != generation:
                return False
            changed = change(row, self._now())
            if changed is None:
                return False
            rows[key] = changed
            return True
        finally:
            lock.release()

    async def _lock(self, key: TokenKey) -> asyncio.Lock:
        self._open_rows()
        try:
            return await self._locks.acquire(key, self._lock_timeout)
        except TimeoutError:
            raise LockTimeoutError(
                f"the row of {key} stayed locked for {self._lock_timeout} s; repeat the call"
            ) from None

    def _open_rows(self) -> dict[TokenKey, _Row]:
        if self._closed:
            raise StoreClosedError("this store is closed")
        return self._rows

    def _now(self) -> int:
        return int(self._clock() * _US)


class MemoryTransaction:
    """One transaction: its writes lie aside until it commits, its locks are held until it ends."""

    def __init__(self, backend: MemoryBackend) -> None:
        self._backend = backend
        self._writes: dict[TokenKey, _Row | None] = {}
        self._held: dict[TokenKey, asyncio.Lock] = {}

    async def get(self, keys: Sequence[TokenKey]) -> list[SealedRecord | None]:
        now = self._backend._now()
        return [_record(key, self._row(key), now) for key in keys]

    async def lock(self, key: TokenKey) -> SealedRecord | None:
        await self._hold([key])
        return _record(key, self._row(key), self._backend._now())

    async def put(self, entries: Mapping[TokenKey, SealedTokens]) -> None:
        await self._hold(sorted(entries))
        now = self._backend._now()
        for key, tokens in entries.items():
            row = self._row(key)
            self._writes[key] = _Row(tokens, new_generation(), now, now) if row is None else row.next(tokens, now)

    async def delete(self, key: TokenKey) -> bool:
        await self._hold([key])
        existed = self._row(key) is not None
        self._writes[key] = None
        return existed

    def commit(self) -> None:
        rows = self._backend._open_rows()
        for key, row in self._writes.items():
            if row is None:
                rows.pop(key, None)
            else:
                rows[key] = row

    def release(self) -> None:
        while self._held:
            self._held.popitem()[1].release()

    def _row(self, key: TokenKey) -> _Row | None:
        return self._writes[key] if key in self._writes else self._backend._open_rows().get(key)

    async def _hold(self, keys: Iterable[TokenKey]) -> None:
        for key in keys:
            if key not in self._held:
                self._held[key] = await self._backend._lock(key)


def _record(key: TokenKey, row: _Row | None, now: int) -> SealedRecord | None:
    if row is None:
        return None
    failure = None
    if row.failure_code is not None:
        failure = Failure(row.failure_code, None if row.retry_at is None else (row.retry_at - now) / _US)
    return SealedRecord(
        key=key,
        tokens=row.tokens,
        generation=row.generation,
        lease_holder=row.lease_holder,
        lease_expires_in=None if row.lease_expires_at is None else (row.lease_expires_at - now) / _US,
        failure=failure,
        created_at=row.created_at,
        updated_at=row.updated_at,
        as_of=now,
    )


def _order(key: TokenKey) -> tuple[bytes, bytes]:
    return key.provider.encode(), key.user_id.encode()
