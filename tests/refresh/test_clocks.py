"""Expiry and leases run on the database's clock."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from support.refresh_world import World, on_every_row, on_memory, until_waiting
from support.refreshers import NEW_PAIR, Revoker, Script, pair
from support.store_calls import fresh, many
from tokenstore.records import TokenKey
from tokenstore.refresh.rows import new_holder

HOUR = 3600.0
KEY = TokenKey("github", "u1")
# A lease lasts 1.5 times as long, and the wait for one 3 times.
TIMEOUT = 0.4


@on_every_row
async def test_machines_with_different_clocks_agree_on_expiry(world: World) -> None:
    """Expiry and leases depend on the database's clock; a token for eight hours is valid on all machines."""
    world.provider.access_token_lifetime = 8 * HOUR
    clocks = [lambda skew=skew: datetime.now(UTC).timestamp() + skew for skew in (-HOUR, 0, HOUR)]
    stores = [await world.store(clock=clock) for clock in clocks]
    await world.log_in(stores[0], expires_in=30)
    records = await many(2, *stores)
    assert {pair(record) for record in records} == {pair(await world.stored())}
    assert world.provider.stats().requests == 1
    assert all(store.is_access_token_valid(records[0]) for store in stores)


async def _lease_of_a_dead_process(world: World, generation: int) -> None:
    """Claim a lease as another process would, then set the database's clock back by an hour."""
    backend = world.backend()
    lease = 1.5 * TIMEOUT
    assert await backend.claim_lease(KEY, generation=generation, holder=new_holder(lease), duration=lease)
    world.ahead -= HOUR


@on_memory
async def test_a_clock_set_back_does_not_prolong_a_dead_process_s_lease(world: World) -> None:
    """A caller waits for as long as the lease lasts, not for an hour."""
    store = await world.store(refreshers={"github": Script()}, refresh_timeout=TIMEOUT)
    old = await world.expired(store, expires_in=-2 * HOUR)
    await _lease_of_a_dead_process(world, old["generation"])
    assert pair(await fresh(store)) == NEW_PAIR


@on_memory
async def test_a_revocation_does_not_wait_for_a_prolonged_lease_either(world: World) -> None:
    store = await world.store(refreshers={"github": Revoker()}, refresh_timeout=TIMEOUT)
    old = await world.expired(store, expires_in=-2 * HOUR)
    await _lease_of_a_dead_process(world, old["generation"])
    assert await store.revoke_tokens("github", "u1")
    assert await world.sealed() is None


@on_memory
async def test_a_clock_set_back_ends_no_lease_of_a_live_process(world: World) -> None:
    """While its call of the provider is under way, nobody else calls."""
    slow, other = Script(), Script()
    slow.hold()
    one = await world.store(refreshers={"github": slow})
    two = await world.store(refreshers={"github": other})
    await world.expired(one, expires_in=-2 * HOUR)
    first = asyncio.create_task(fresh(one))
    await slow.called.wait()
    world.ahead -= HOUR
    second = asyncio.create_task(fresh(two))
    await until_waiting(two)
    slow.answer.set()
    assert pair(await first) == pair(await second) == NEW_PAIR
    assert other.calls == 0
