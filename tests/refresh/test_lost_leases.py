"""The lease is lost while the provider is asked."""

from __future__ import annotations

import asyncio

import pytest

from support.polling import until
from support.refresh_world import World, on_memory
from support.refreshers import NEW_PAIR, OLD, Script, pair
from support.store_calls import fresh
from tokenstore import ProviderUnavailableError, ReauthorizationRequiredError
from tokenstore.records import TokenKey

HOUR = 3600.0
KEY = TokenKey("github", "u1")


class Overtaken:
    """A refresh whose lease runs out while the provider is slow, and another one that has taken over."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.slow, self.quick = Script(), Script()

    async def begin(self, quick: Script) -> None:
        self.quick = quick
        self.slow.hold()
        self.one, self.interceptor = await self.world.intercepted(self.slow)
        self.two = await self.world.store(refreshers={"github": quick})
        self.old = await self.world.expired(self.one)
        self.late = asyncio.create_task(fresh(self.one))
        await self.slow.called.wait()
        self.world.ahead += 31  # a lease lasts 30 s


OTHER = {"access_token": "other-access", "refresh_token": "other-refresh", "expires_in": 3600}


@on_memory
async def test_late_tokens_are_saved_if_the_other_gave_up(world: World) -> None:
    """What the row holds is still what they were issued for, and they may be the only live pair."""
    race = Overtaken(world)
    await race.begin(Script(ProviderUnavailableError("down", retry_after=HOUR)))
    with pytest.raises(ProviderUnavailableError):
        await fresh(race.two)
    race.slow.answer.set()
    assert pair(await race.late) == pair(await world.stored()) == pair(await fresh(race.two)) == NEW_PAIR


@on_memory
async def test_late_tokens_are_saved_if_the_other_died(world: World) -> None:
    """Its lease has run out as well, or runs out in the end."""
    for left in (-1, 0.05):
        race = Overtaken(world)
        await race.begin(Script())
        claimed = await race.interceptor.claim_lease(
            KEY, generation=race.old["generation"], holder="dead", duration=1 + left
        )
        assert claimed
        world.ahead += 1
        race.slow.answer.set()
        assert pair(await race.late) == pair(await world.stored()) == NEW_PAIR


@on_memory
async def test_late_tokens_wait_for_the_other(world: World) -> None:
    """Beside a live lease nothing is written: saved when the other fails."""
    race = Overtaken(world)
    quick = Script(ProviderUnavailableError("down"))
    quick.hold()
    await race.begin(quick)
    other = asyncio.create_task(fresh(race.two))
    await quick.called.wait()
    race.slow.answer.set()
    await until(lambda: race.interceptor.calls["complete_lease"] == 1)
    assert pair(await world.stored()) == OLD
    quick.answer.set()
    with pytest.raises(ProviderUnavailableError):
        await other
    assert pair(await race.late) == pair(await world.stored()) == NEW_PAIR


@on_memory
async def test_late_tokens_are_dropped_if_there_are_newer_ones(world: World) -> None:
    """The caller gets the newer ones, without an error."""
    race = Overtaken(world)
    await race.begin(Script(OTHER))
    assert pair(await fresh(race.two)) == pair(OTHER)
    race.slow.answer.set()
    assert pair(await race.late) == pair(await world.stored()) == pair(OTHER)
    assert (race.slow.calls, race.quick.calls) == (1, 1)


@on_memory
async def test_a_late_failure_is_no_verdict_on_newer_tokens(world: World) -> None:
    """A refusal of the refresh token that the other one has used: the caller gets the other's tokens."""
    race = Overtaken(world)
    race.slow = Script(ReauthorizationRequiredError("used"))
    await race.begin(Script(OTHER))
    assert pair(await fresh(race.two)) == pair(OTHER)
    race.slow.answer.set()
    assert pair(await race.late) == pair(await world.stored()) == pair(OTHER)
