"""`force`, with and without the generation whose token a provider refused with 401."""

from __future__ import annotations

import asyncio

import pytest

from support.refresh_world import World, on_every_row, on_memory, until_joined
from support.refreshers import OLD, Script, pair
from support.store_calls import fresh, many
from tokenstore import ProviderUnavailableError

HOUR = 3600.0


@on_memory
async def test_force_refreshes_a_valid_token_once(world: World) -> None:
    """Concurrent callers share one refresh; later callers start another one."""
    store = await world.store()
    old = await world.log_in(store, expires_in=HOUR)
    with world.provider.hold():
        calls = [asyncio.create_task(fresh(store, force=True)) for _ in range(20)]
        await world.requests(1)
        await until_joined(store, 19)
    records = await asyncio.gather(*calls)
    assert {record["generation"] for record in records} == {old["generation"] + 1}
    assert (await fresh(store, force=True))["generation"] == old["generation"] + 2
    assert world.provider.stats().requests == 2


@on_every_row
async def test_after_a_401_the_generation_is_refreshed_once(world: World) -> None:
    """A hundred callers of two stores pass the same generation: the provider is called once, also for later callers."""
    one, two = await world.store(), await world.store()
    old = await world.log_in(one, expires_in=HOUR)
    records = await many(25, one, two, force=True, generation=old["generation"])
    records += await many(25, one, two, force=True, generation=old["generation"])
    assert {pair(record) for record in records} == {pair(await world.stored())} != {pair(old)}
    assert world.provider.stats().requests == 1


@on_memory
async def test_an_old_generation_does_not_hide_a_newer_one(world: World) -> None:
    """Of two concurrent callers, one passes an old generation and the other the present one."""
    for order in (1, -1):
        script = Script()
        store = await world.store(refreshers={"github": script})
        old = (await world.expired(store, expires_in=HOUR))["generation"]
        present = (await world.expired(store, expires_in=HOUR))["generation"]
        generations = [old, present][::order]
        records = await asyncio.gather(*(fresh(store, force=True, generation=one) for one in generations))
        assert present < records[generations.index(present)]["generation"], "the caller got the token that was refused"
        assert script.calls == 1


@on_memory
async def test_force_does_not_call_the_provider_while_a_failure_holds(world: World) -> None:
    """The row has a failure, for good or until a retry time, although its access token is valid."""
    script = Script(ProviderUnavailableError("down", retry_after=60))
    store = await world.store(refreshers={"github": script})
    await world.expired(store, expires_in=HOUR)
    for _ in range(3):
        with pytest.raises(ProviderUnavailableError):
            await fresh(store, force=True)
    assert script.calls == 1
    assert pair(await fresh(store)) == OLD
