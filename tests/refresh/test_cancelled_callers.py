"""Callers that are cancelled do not cancel the refresh."""

from __future__ import annotations

import asyncio
from unittest import mock

import pytest

from support.interceptor import Stop
from support.matrix import Row, each_database
from support.refresh_scene import Scene, checked_out, noted, scene_of
from support.refresh_world import World, on_every_row, on_memory, settled, until_joined
from support.refreshers import NEW_PAIR, Script, pair
from support.stepping import stepped
from support.store_calls import fresh, load
from tokenstore import AuthTokenStore, Keyring


@on_every_row
async def test_cancelled_callers_do_not_cancel_the_refresh(world: World) -> None:
    """Some or all callers are cancelled; the new pair is stored, which the next refresh needs."""
    store = await world.store()
    old = await world.log_in(store)
    with world.provider.hold():
        callers = [asyncio.create_task(fresh(store)) for _ in range(5)]
        await world.requests(1)
        await until_joined(store, 4)
        for caller in callers:
            caller.cancel()
        assert all(
            isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*callers, return_exceptions=True)
        )
    new = await world.until_saved(store)
    assert new["generation"] == old["generation"] + 1
    assert (await fresh(store, force=True))["generation"] == new["generation"] + 1


@on_memory
@pytest.mark.parametrize("stage", ["claim_lease", "complete_lease"])
@pytest.mark.parametrize("carried_out", [False, True])
async def test_a_refresh_whose_caller_is_cancelled_at_any_stage_ends(
    world: World, stage: str, carried_out: bool
) -> None:
    """A refresh that has begun ends normally; callers that joined it and later callers get the new pair."""
    script = Script()
    store, interceptor = await world.intercepted(script)
    await world.expired(store)
    stop = Stop()
    (interceptor.after if carried_out else interceptor.before)[stage] = stop
    caller, joined = asyncio.create_task(fresh(store)), asyncio.create_task(fresh(store))
    await stop.reached.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    stop.go_on.set()
    assert pair(await joined) == pair(await world.until_saved(store)) == NEW_PAIR
    assert script.calls == 1


@on_memory
async def test_a_caller_cancelled_during_its_first_read_begins_no_refresh(world: World) -> None:
    script = Script()
    store, interceptor = await world.intercepted(script)
    await world.expired(store)
    interceptor.before["get"] = stop = Stop()
    caller = asyncio.create_task(fresh(store))
    await stop.reached.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await settled(store)
    assert script.calls == 0
    assert pair(await fresh(store)) == NEW_PAIR


async def cancelled(scene: Scene, store: AuthTokenStore, at: int, *, alone: bool) -> bool:
    """Cancel a caller at the n-th suspension of itself or of its refresh. Returns whether it was cancelled."""
    old = await scene.log_in()
    user = old["user_id"]
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == at:
            caller.cancel()

    perform = store._engine._perform
    with mock.patch.object(store._engine, "_perform", lambda attempt: stepped(perform(attempt), step)):
        caller = asyncio.create_task(stepped(fresh(store, user), step))
        others = [] if alone else [asyncio.create_task(fresh(store, user))]
        await asyncio.wait([caller, *others])
        await settled(store)
    assert checked_out(store) == 0
    issued = scene.recorder.issued[user]
    assert scene.provider.stats().refreshes_by_user.get(user, 0) == len(issued)
    assert pair(await load(scene.direct, user)) == pair(issued[0] if issued else old)
    others.append(asyncio.create_task(fresh(store, user)))
    for other in others:
        assert pair(await other) == pair(issued[0])
    await scene.check(old)
    return caller.cancelled()


@each_database
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "joined"])
def test_a_refresh_whose_caller_is_cancelled_at_any_step_stores_the_issued_tokens(
    row: Row, url: str, alone: bool, keyring: Keyring
) -> None:
    """The refresh either has not begun, or ends normally; the tokens that the provider issued are in the row."""

    async def main() -> None:
        async with scene_of(url, keyring) as scene, scene.store(await scene.log_in(), url) as store:
            at = 1
            while True:
                with noted(at):
                    if not await cancelled(scene, store, at, alone=alone):
                        break
                at += 1
            assert at > 10

    asyncio.run(main())
