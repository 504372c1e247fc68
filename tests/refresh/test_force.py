"""`force`, with and without the generation whose token a provider refused with 401."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from support.refresh_world import World, on_every_row, on_memory, until_joined
from support.refreshers import NEW_PAIR, OLD, Script, pair
from support.store_calls import fresh, many
from tokenstore import InvalidInputError, ProviderUnavailableError

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


@on_every_row
async def test_force_returns_a_token_that_was_stored_just_now(world: World) -> None:
    """An API that answers 401 to every token does not cause a refresh for each request."""
    script = Script()
    one, two = [await world.store(refreshers={"github": script}, force_min_age=60) for _ in range(2)]
    old = await world.expired(one, expires_in=HOUR)
    for generation in (None, old["generation"]):
        records = await many(5, one, two, force=True, generation=generation)
        assert {record["generation"] for record in records} == {old["generation"]}
    assert script.calls == 0
    assert (await fresh(one, force=True, force_min_age=0))["generation"] == old["generation"] + 1
    assert (await fresh(two, force=True, generation=old["generation"] + 1))["generation"] == old["generation"] + 1
    assert script.calls == 1


@on_memory
async def test_force_refreshes_an_expired_token_whatever_its_age(world: World) -> None:
    """The call never returns an invalid token. After the time the token is refreshed by force again."""
    script = Script()
    store = await world.store(refreshers={"github": script}, force_min_age=10)
    await world.expired(store)
    assert pair(await fresh(store, force=True)) == NEW_PAIR
    await fresh(store, force=True)
    assert script.calls == 1
    world.ahead += 9
    await fresh(store, force=True)
    assert script.calls == 1
    world.ahead += 2
    await fresh(store, force=True)
    assert script.calls == 2


@on_memory
async def test_of_joined_callers_the_one_with_the_lowest_age_decides(world: World) -> None:
    """Whichever began the refresh. A caller without force does not count."""
    for ages in ([60, 0], [0, 60], [60, None], [None, 60]):
        script = Script()
        store = await world.store(refreshers={"github": script}, refresh_margin=0)
        old = await world.expired(store, expires_in=HOUR)
        calls = [fresh(store) if age is None else fresh(store, force=True, force_min_age=age) for age in ages]
        records = await asyncio.gather(*calls)
        assert script.calls == (0 if None in ages else 1)
        assert records[ages.index(0) if 0 in ages else 0]["generation"] == old["generation"] + script.calls


@pytest.mark.parametrize("age", [-1, "1", None, float("nan")])
@on_memory
async def test_an_age_is_a_number_of_seconds(world: World, age: Any) -> None:
    store = await world.store()
    with pytest.raises(InvalidInputError, match="force_min_age"):
        await world.store(force_min_age=age)
    with pytest.raises(InvalidInputError, match="force_min_age"):
        await fresh(store, force=age is not None, force_min_age=age or 5)
