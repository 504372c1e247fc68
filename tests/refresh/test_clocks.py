"""Expiry and leases run on the database's clock."""

from __future__ import annotations

from datetime import UTC, datetime

from support.refresh_world import World, on_every_row
from support.refreshers import pair
from support.store_calls import many

HOUR = 3600.0


@on_every_row
async def test_machines_whose_clocks_differ_agree(world: World) -> None:
    """Expiry and leases run on the database's clock; what was issued for eight hours is valid on all of them."""
    world.provider.access_token_lifetime = 8 * HOUR
    clocks = [lambda skew=skew: datetime.now(UTC).timestamp() + skew for skew in (-HOUR, 0, HOUR)]
    stores = [await world.store(clock=clock) for clock in clocks]
    await world.log_in(stores[0], expires_in=30)
    records = await many(2, *stores)
    assert {pair(record) for record in records} == {pair(await world.stored())}
    assert world.provider.stats().requests == 1
    assert all(store.is_access_token_valid(records[0]) for store in stores)
