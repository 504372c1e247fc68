"""The smallest backend: rows in a dict of this process. For tests, and the model for those of other backends.

PYTEST_DONT_REWRITE: this word keeps pytest, which finds the plugin of tokenstore.testing in the same distribution, from
warning that the package was imported before pytest began.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self
from urllib.parse import parse_qsl, urlsplit

from tokenstore.errors import ConfigurationError, LockTimeoutError, StoreClosedError
from tokenstore.event_loops import HomeLoop
from tokenstore.health import RowFilter, SearchPage
from tokenstore.leases import Row, claimed, cleared, completed, released, written
from tokenstore.locks import KeyedLocks
from tokenstore.options import positive_seconds, read_options
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
from tokenstore_memory.values import MemoryValues, in_bytes

__all__ = ["MemoryBackend", "MemoryTransaction"]

_US = 1_000_000
_OPTIONS = {"lock_timeout": positive_seconds}


@dataclass(frozen=True, slots=True)
class _Stored:
    row: Row[SealedTokens]
    created_at: int
    updated_at: int
    due_at: int | None
    metadata: SealedMetadata = NO_METADATA

    def after(self, row: Row[SealedTokens], now: int, metadata: SealedMetadata | None = None) -> _Stored:
        """The same row, changed: new tokens show by their generation."""
        metadata = self.metadata if metadata is None else metadata
        if row.generation != self.row.generation:
            return _Stored(row, self.created_at, now, row.tokens.due_at, metadata)
        due_at = replace(row.tokens, issued=False).due_at if self.row.is_dead else self.due_at
        return _Stored(row, self.created_at, self.updated_at, None if row.is_dead else due_at, metadata)


class MemoryBackend(MemoryValues):
    """Rows in this process, gone with it. Serves the tasks of one event loop.

    Args:
        lock_timeout: The longest wait for a row's lock, in seconds.
        clock: Seconds since the epoch: what a database's own clock is to the other backends.
    """

    def __init__(self, *, lock_timeout: float = 10.0, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self._rows: dict[TokenKey, _Stored] = {}
        self._locks = KeyedLocks()
        self.lock_timeout = lock_timeout
        self._clock = clock
        self._closed = False
        self._home = HomeLoop()

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

    def use_clock(self, clock: Callable[[], float]) -> None:
        """See :class:`tokenstore.protocol.SupportsClock`."""
        self._clock = clock

    async def setup(self) -> None:
        """Nothing to create."""
        self._open_rows()

    async def aclose(self) -> None:
        """Forget every row and value."""
        self._closed = True
        self._rows.clear()
        self._stored.clear()

    async def get(self, key: TokenKey) -> SealedRecord | None:
        return _record(key, self._open_rows().get(key), self._now())

    async def put(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> None:
        async with self.transaction() as transaction:
            await transaction.put(key, tokens, metadata=metadata)

    async def insert(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> bool:
        async with self.transaction() as transaction:
            return await transaction.insert(key, tokens, metadata=metadata)

    async def delete(self, key: TokenKey) -> bool:
        async with self.transaction() as transaction:
            return await transaction.delete(key)

    async def clock(self) -> int:
        self._open_rows()
        return self._now()

    async def scan(
        self,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        after: TokenKey | None = None,
        limit: int,
        with_metadata: bool = False,
    ) -> list[ScannedRow]:
        return self._listed(provider, user_id, after, with_metadata)[:limit]

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
        page = self._listed(provider, user_id, after, with_metadata)[:limit]
        return SearchPage([row for row in page if where.matches(row)], page[-1].key if len(page) == limit else None)

    def _listed(
        self, provider: str | None, user_id: str | None, after: TokenKey | None, with_metadata: bool
    ) -> list[ScannedRow]:
        rows, now = self._open_rows(), self._now()
        found = sorted(
            (
                (key, stored)
                for key, stored in rows.items()
                if not stored.row.tokens.is_empty
                and provider in (None, key.provider)
                and user_id in (None, key.user_id)
                and (after is None or in_bytes(key) > in_bytes(after))
            ),
            key=lambda item: in_bytes(item[0]),
        )
        return [_scanned(key, stored, now, with_metadata) for key, stored in found]

    async def scan_due(
        self, *, provider: str, within: float, as_of: int | None = None, after: DueKey | None = None, limit: int
    ) -> list[DueRow]:
        rows, now = self._open_rows(), self._now()
        until = (now if as_of is None else as_of) + round(within * _US)
        found = [
            DueRow(
                key,
                stored.due_at,
                stored.row.tokens.access_token_expires_at,
                stored.updated_at,
                now,
                stored.row.tokens.is_empty,
            )
            for key, stored in rows.items()
            if key.provider == provider and stored.due_at is not None and stored.due_at <= until
        ]
        # Comparing the strings is right: code points have the same order as their UTF-8 bytes.
        found.sort(key=lambda row: row.position)
        return [row for row in found if after is None or row.position > after][:limit]

    async def claim_lease(self, key: TokenKey, *, generation: int, holder: str, duration: float) -> bool:
        length = round(duration * _US)
        return await self._change(
            key, lambda row, now: claimed(row, generation=generation, holder=holder, now=now, duration=length)
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
        return await self._change(
            key, lambda row, now: completed(row, tokens, generation=generation, holder=holder, now=now), metadata
        )

    async def release_lease(
        self, key: TokenKey, *, generation: int, holder: str, failure: Failure | None = None
    ) -> bool:
        def release(row: Row[SealedTokens], now: int) -> Row[SealedTokens] | None:
            outcome = None
            if failure is not None:
                outcome = failure.code, None if failure.retry_in is None else now + round(failure.retry_in * _US)
            return released(row, generation=generation, holder=holder, now=now, failure=outcome)

        return await self._change(key, release)

    async def clear_failure(self, key: TokenKey, *, min_age: float = 0.0, as_of: int | None = None) -> bool:
        age = round(min_age * _US)
        return await self._change(key, lambda row, now: cleared(row, now=now if as_of is None else as_of, min_age=age))

    async def rewrap(self, key: TokenKey, tokens: SealedTokens, *, generation: int) -> bool:
        def rewrap(row: Row[SealedTokens], _now: int) -> Row[SealedTokens] | None:
            sealed = replace(
                row.tokens,
                access_token=tokens.access_token,
                refresh_token=tokens.refresh_token,
                extra=tokens.extra,
                key_id=tokens.key_id,
            )
            return replace(row, tokens=sealed) if row.generation == generation else None

        return await self._change(key, rewrap)

    async def set_metadata(self, key: TokenKey, metadata: SealedMetadata, *, replacing: bytes | None) -> bool:
        async with self.transaction() as transaction:
            return await transaction.set_metadata(key, metadata, replacing=replacing)

    def transaction(self) -> AbstractAsyncContextManager[MemoryTransaction]:
        return MemoryTransaction(self)

    async def _change(
        self,
        key: TokenKey,
        change: Callable[[Row[SealedTokens], int], Row[SealedTokens] | None],
        metadata: SealedMetadata | None = None,
    ) -> bool:
        await self._lock(key)
        try:
            # Nothing is awaited from here on, so this is one atomic step; the clock is read after the wait.
            rows, now = self._open_rows(), self._now()
            stored = rows.get(key)
            changed = None if stored is None else change(stored.row, now)
            if stored is None or changed is None:
                return False
            rows[key] = stored.after(changed, now, metadata)
            return True
        finally:
            self._locks.release(key)

    async def _lock(self, key: TokenKey) -> None:
        self._open_rows()
        try:
            await self._locks.acquire(key, self.lock_timeout)
        except TimeoutError:
            raise LockTimeoutError(
                f"the row of {key} stayed locked for {self.lock_timeout:g} s; repeat the call"
            ) from None

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("this store is closed")

    def _open_rows(self) -> dict[TokenKey, _Stored]:
        self._check_open()
        if self._home.moved():
            self._locks = KeyedLocks()  # the tasks that held locks ended with their event loop
        return self._rows

    def _now(self) -> int:
        return int(self._clock() * _US)


class MemoryTransaction:
    """One transaction: its writes lie aside until it commits, its locks are held until it ends."""

    def __init__(self, backend: MemoryBackend) -> None:
        self._backend = backend
        self._writes: dict[TokenKey, _Stored | None] = {}
        self._held: set[TokenKey] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if exc_type is None:
                self.commit()
        finally:
            self.release()

    async def get(self, key: TokenKey) -> SealedRecord | None:
        return _record(key, self._row(key), self._backend._now())

    async def lock(self, key: TokenKey) -> SealedRecord | None:
        await self._hold(key)
        return _record(key, self._row(key), self._backend._now())

    async def put(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> None:
        await self._hold(key)
        found, now = self._row(key), self._backend._now()
        self._writes[key] = (
            _Stored(Row(tokens, new_generation()), now, now, tokens.due_at, metadata or NO_METADATA)
            if found is None
            else found.after(written(found.row, tokens), now, metadata)
        )

    async def insert(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> bool:
        await self._hold(key)
        found = self._row(key)
        if found is not None and (tokens.is_empty or not found.row.tokens.is_empty):
            return False
        await self.put(key, tokens, metadata=metadata or NO_METADATA)
        return True

    async def set_metadata(self, key: TokenKey, metadata: SealedMetadata, *, replacing: bytes | None) -> bool:
        await self._hold(key)
        found = self._row(key)
        if found is None or found.metadata.value != replacing:
            return False
        self._writes[key] = replace(found, metadata=metadata)
        return True

    async def clock(self) -> int:
        return await self._backend.clock()

    async def delete(self, key: TokenKey) -> bool:
        await self._hold(key)
        existed = self._row(key) is not None
        self._writes[key] = None
        return existed

    async def rollback(self) -> None:
        self._writes.clear()
        self.release()

    def commit(self) -> None:
        rows = self._backend._open_rows()
        for key, stored in self._writes.items():
            if stored is None:
                rows.pop(key, None)
            else:
                rows[key] = stored

    def release(self) -> None:
        while self._held:
            self._backend._locks.release(self._held.pop())

    def _row(self, key: TokenKey) -> _Stored | None:
        return self._writes[key] if key in self._writes else self._backend._open_rows().get(key)

    async def _hold(self, key: TokenKey) -> None:
        if key not in self._held:
            await self._backend._lock(key)
            self._held.add(key)


def _scanned(key: TokenKey, stored: _Stored, now: int, with_metadata: bool) -> ScannedRow:
    row = stored.row
    return ScannedRow(
        key=key,
        has_refresh_token=row.tokens.refresh_token is not None,
        issued=row.tokens.refresh_token is None and stored.due_at is not None,
        access_token_expires_at=row.tokens.access_token_expires_at,
        refresh_token_expires_at=row.tokens.refresh_token_expires_at,
        access_token_expiry_known=row.tokens.access_token_expiry_known,
        key_id=row.tokens.key_id,
        generation=row.generation,
        created_at=stored.created_at,
        updated_at=stored.updated_at,
        as_of=now,
        failure_code=row.failure_code,
        failed_at=row.failed_at,
        retry_at=row.retry_at,
        lease_expires_at=row.lease_expires_at,
        metadata_key_id=stored.metadata.key_id,
        metadata=stored.metadata.value if with_metadata else None,
    )


def _record(key: TokenKey, stored: _Stored | None, now: int) -> SealedRecord | None:
    if stored is None:
        return None
    row = stored.row
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
        created_at=stored.created_at,
        updated_at=stored.updated_at,
        as_of=now,
        metadata=stored.metadata,
    )
