"""The refresh engine on backends without row locks and watching, and on backends that can be watched."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from support.interceptor import Interceptor, failing
from support.refresh_world import World, on_every_row, on_memory
from support.refreshers import NEW_PAIR, Script, pair
from support.store_calls import due, fresh, many
from tokenstore import TokensNotStoredError
from tokenstore.records import SealedMetadata, SealedTokens, TokenKey

HOUR = 3600.0
KEY = TokenKey("github", "u1")


@on_every_row
async def test_a_backend_without_row_locks_and_watching_can_refresh(world: World) -> None:
    """Both abilities are optional."""
    one, _ = await world.intercepted(world.refresher)
    two, _ = await world.intercepted(world.refresher)
    await world.log_in(one)
    records = await many(5, one, two)
    assert {pair(record) for record in records} == {pair(await world.stored())}
    assert world.provider.stats().requests == 1
    [result] = await due(one, within=2 * HOUR)
    assert result.outcome == "refreshed"
    assert await two.revoke_tokens("github", "u1")
    assert await world.sealed() is None


class Refusing(Interceptor):
    """A backend that wrongly refuses to store the tokens of any refresh."""

    async def complete_lease(
        self,
        key: TokenKey,
        tokens: SealedTokens,
        *,
        generation: int,
        holder: str,
        metadata: SealedMetadata | None = None,
    ) -> bool:
        self.calls["complete_lease"] += 1
        return False


@on_memory
async def test_a_write_that_is_refused_without_a_reason_does_not_hang_callers(world: World) -> None:
    """No other holder has a lease, and yet the backend refuses: callers, and closing the store, end with an error."""
    backend = Refusing(world.backend())
    store = await world.store(backend, refreshers={"github": Script()}, refresh_timeout=0.05)
    await world.expired(store)
    for error in await many(3, store):
        assert isinstance(error, TokensNotStoredError)
        assert pair(error.record) == NEW_PAIR
    assert backend.calls["complete_lease"] < 50
    with pytest.raises(TokensNotStoredError):
        await store.aclose()


class Watcher(Interceptor):
    """A backend with ``watch``, which a test can let fail."""

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        self.changed = asyncio.Event()

    async def watch(self, key: TokenKey) -> None:
        await self._pass("watch", self.changed.wait)


@on_memory
async def test_a_backend_that_can_be_watched_is_watched(world: World) -> None:
    """The engine calls ``watch`` instead of polling at fixed intervals, but not for longer than the lease lasts."""
    store, _ = await world.intercepted(Script())
    watcher = Watcher(world.backend())
    two = await world.store(watcher, refreshers={"github": Script()})
    old = await world.expired(store)
    assert await watcher.claim_lease(KEY, generation=old["generation"], holder="other", duration=0.2)
    assert pair(await fresh(two)) == NEW_PAIR
    assert watcher.calls["watch"] == 1


@on_memory
@pytest.mark.parametrize("error", [None, RuntimeError("a driver's own")], ids=["unavailable", "anything"])
async def test_a_failed_watch_does_not_fail_the_refresh(world: World, error: Exception | None) -> None:
    """Neither a waiting caller fails, nor a refresh that has tokens to store while another holder has the lease."""
    slow = Script()
    slow.hold()
    watcher = Watcher(world.backend())
    watcher.before["watch"] = failing(error=error)
    store = await world.store(watcher, refreshers={"github": slow})
    old = await world.expired(store)
    assert await watcher.claim_lease(KEY, generation=old["generation"], holder="other", duration=0.1)
    caller = asyncio.create_task(fresh(store))
    await slow.called.wait()
    world.ahead += 31
    assert await watcher.claim_lease(KEY, generation=old["generation"], holder="other", duration=0.1)
    slow.answer.set()
    assert pair(await caller) == pair(await world.stored()) == NEW_PAIR
    assert watcher.calls["watch"] >= 2
