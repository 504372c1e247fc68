"""A backend that lets a test in before and after each call: to count, to stop a refresh, or to let the call fail."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, cast

from tokenstore import BackendUnavailableError
from tokenstore.protocol import Backend
from tokenstore.records import Failure, ScannedRow, SealedRecord, SealedTokens, TokenKey

Action = Callable[[], Awaitable[None]]


class Meddler:
    """A backend, of the protocol's least kind: without row locks and without watching. Counts calls, lets tests in.

    ``before`` and ``after`` hold an action for a method; what an action raises is what the engine gets.
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

    async def put(self, key: TokenKey, tokens: SealedTokens) -> None:
        await self._pass("put", lambda: self.backend.put(key, tokens))

    async def delete(self, key: TokenKey) -> bool:
        return bool(await self._pass("delete", lambda: self.backend.delete(key)))

    async def scan(
        self,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        after: TokenKey | None = None,
        limit: int,
    ) -> list[ScannedRow]:
        return await self.backend.scan(provider=provider, user_id=user_id, after=after, limit=limit)

    async def claim_lease(self, key: TokenKey, *, generation: int, holder: str, duration: float) -> bool:
        claim = self.backend.claim_lease
        return bool(
            await self._pass("claim_lease", lambda: claim(key, generation=generation, holder=holder, duration=duration))
        )

    async def complete_lease(self, key: TokenKey, tokens: SealedTokens, *, generation: int, holder: str) -> bool:
        complete = self.backend.complete_lease
        return bool(
            await self._pass("complete_lease", lambda: complete(key, tokens, generation=generation, holder=holder))
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

    async def rewrap(self, key: TokenKey, tokens: SealedTokens, *, generation: int) -> bool:
        return await self.backend.rewrap(key, tokens, generation=generation)


class Stop:
    """An action: whoever comes first stops here until told to go on; later ones pass."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()

    async def __call__(self) -> None:
        if not self.reached.is_set():
            self.reached.set()
            await self.go_on.wait()


def failing(times: float = float("inf"), error: Exception | None = None) -> Action:
    """An action that raises so many times: that the database is gone, if nothing else is said."""
    left = times

    async def fail() -> None:
        nonlocal left
        if left > 0:
            left -= 1
            raise error or BackendUnavailableError("the database is gone")

    return fail
