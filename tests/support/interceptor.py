"""A backend that runs an action of the test before and after each call, to count, delay or fail the call."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, cast

from tokenstore import BackendUnavailableError
from tokenstore.health import RowFilter, SearchPage
from tokenstore.protocol import Backend
from tokenstore.records import DueKey, DueRow, Failure, ScannedRow, SealedMetadata, SealedRecord, SealedTokens, TokenKey

Action = Callable[[], Awaitable[None]]


class Interceptor:
    """A backend without row locks and without watching, which passes each call on to another backend.

    Attributes:
        calls: How often each method was called.
        before: An action for a method, awaited before the call; if it raises an error, the caller gets that error.
        after: The same, awaited after the call.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.calls: Counter[str] = Counter()
        self.before: dict[str, Action] = {}
        self.after: dict[str, Action] = {}

    async def _pass(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        self.calls[name] += 1
        if action := self.before.get(name):
            await action()
        answer = await call()
        if action := self.after.get(name):
            await action()
        return answer

    async def setup(self) -> None:
        await self.backend.setup()

    async def aclose(self) -> None:
        await self.backend.aclose()

    async def get(self, key: TokenKey) -> SealedRecord | None:
        return cast(SealedRecord | None, await self._pass("get", lambda: self.backend.get(key)))

    async def put(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> None:
        await self._pass("put", lambda: self.backend.put(key, tokens, metadata=metadata))

    async def insert(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> bool:
        return bool(await self._pass("insert", lambda: self.backend.insert(key, tokens, metadata=metadata)))

    async def clock(self) -> int:
        return await self.backend.clock()

    async def delete(self, key: TokenKey) -> bool:
        return bool(await self._pass("delete", lambda: self.backend.delete(key)))

    async def scan(
        self,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        after: TokenKey | None = None,
        limit: int,
        with_metadata: bool = False,
    ) -> list[ScannedRow]:
        scan = self.backend.scan
        found = await self._pass(
            "scan",
            lambda: scan(provider=provider, user_id=user_id, after=after, limit=limit, with_metadata=with_metadata),
        )
        return cast(list[ScannedRow], found)

    async def scan_due(
        self, *, provider: str, within: float, as_of: int | None = None, after: DueKey | None = None, limit: int
    ) -> list[DueRow]:
        scan = self.backend.scan_due
        found = await self._pass(
            "scan_due", lambda: scan(provider=provider, within=within, as_of=as_of, after=after, limit=limit)
        )
        return cast(list[DueRow], found)

    async def claim_lease(self, key: TokenKey, *, generation: int, holder: str, duration: float) -> bool:
        claim = self.backend.claim_lease
        return bool(
            await self._pass("claim_lease", lambda: claim(key, generation=generation, holder=holder, duration=duration))
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
        complete = self.backend.complete_lease
        return bool(
            await self._pass(
                "complete_lease",
                lambda: complete(key, tokens, generation=generation, holder=holder, metadata=metadata),
            )
        )

    async def release_lease(
        self, key: TokenKey, *, generation: int, holder: str, failure: Failure | None = None
    ) -> bool:
        release = self.backend.release_lease
        return bool(
            await self._pass(
                "release_lease", lambda: release(key, generation=generation, holder=holder, failure=failure)
            )
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
        return await self.backend.search(
            where, provider=provider, user_id=user_id, after=after, limit=limit, with_metadata=with_metadata
        )

    async def clear_failure(self, key: TokenKey, *, min_age: float = 0.0, as_of: int | None = None) -> bool:
        return await self.backend.clear_failure(key, min_age=min_age, as_of=as_of)

    async def rewrap(self, key: TokenKey, tokens: SealedTokens, *, generation: int) -> bool:
        return await self.backend.rewrap(key, tokens, generation=generation)

    async def set_metadata(self, key: TokenKey, metadata: SealedMetadata, *, replacing: bytes | None) -> bool:
        set_metadata = self.backend.set_metadata
        return bool(await self._pass("set_metadata", lambda: set_metadata(key, metadata, replacing=replacing)))


class Stop:
    """An action that stops the first call until ``go_on`` is set; later calls continue at once."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()

    async def __call__(self) -> None:
        if not self.reached.is_set():
            self.reached.set()
            await self.go_on.wait()


def failing(times: float = float("inf"), error: Exception | None = None) -> Action:
    """Make an action that raises the error (default: BackendUnavailableError) that many times."""
    left = times

    async def fail() -> None:
        nonlocal left
        if left > 0:
            left -= 1
            raise error or BackendUnavailableError("the database is unavailable")

    return fail
