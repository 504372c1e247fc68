"""The lease expires during the provider's call, and another refresh gets the lease."""

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
    """A refresh whose lease expired while the provider was slow, and another one that got the lease."""

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
async def test_late_tokens_are_stored_if_the_other_refresh_failed(world: World) -> None:
    """The row still has the generation that was refreshed, and the late tokens may be the only valid pair."""
    race = Overtaken(world)
    await race.begin(Script(ProviderUnavailableError("down", retry_after=HOUR)))
    with pytest.raises(ProviderUnavailableError):
        await fresh(race.two)
    race.slow.answer.set()
    assert pair(await race.late) == pair(await world.stored()) == pair(await fresh(race.two)) == NEW_PAIR


@on_memory
async def test_late_tokens_are_stored_if_the_other_refresh_died(world: World) -> None:
    """The other refresh's lease has expired too, or expires later."""
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
async def test_late_tokens_are_not_stored_while_another_lease_is_live(world: World) -> None:
    """They are stored once the other refresh has failed."""
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
async def test_late_tokens_are_dropped_if_the_row_has_newer_ones(world: World) -> None:
    """The caller gets the newer tokens without an error."""
    race = Overtaken(world)
    await race.begin(Script(OTHER))
    assert pair(await fresh(race.two)) == pair(OTHER)
    race.slow.answer.set()
    assert pair(await race.late) == pair(await world.stored()) == pair(OTHER)
    assert (race.slow.calls, race.quick.calls) == (1, 1)


@on_memory
async def test_a_late_failure_is_not_stored_for_newer_tokens(world: World) -> None:
    """The provider refuses the refresh token because the other refresh used it; the caller gets the newer tokens."""
    race = Overtaken(world)
    race.slow = Script(ReauthorizationRequiredError("used"))
    await race.begin(Script(OTHER))
    assert pair(await fresh(race.two)) == pair(OTHER)
    race.slow.answer.set()
    assert pair(await race.late) == pair(await world.stored()) == pair(OTHER)
