"""An expired token is refreshed with one call of the provider, for all tasks and all stores."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from support.database import source_of
from support.refresh_world import World, on_every_row, on_memory, until_joined, until_waiting
from support.refreshers import NEW_PAIR, OLD, Script, pair
from support.store_calls import fresh, many
from tokenstore import AuthTokenStore, RefreshTimeoutError, TokenRecord
from tokenstore.records import TokenKey

HOUR = 3600.0
KEY = TokenKey("github", "u1")


@on_every_row
async def test_tasks_join_one_refresh(world: World) -> None:
    """Fifty tasks cause one call, and each gets its own record; other rows can be used while the provider is slow."""
    store = await world.store()
    old = await world.log_in(store)
    with world.provider.hold():
        callers = [asyncio.create_task(fresh(store)) for _ in range(50)]
        await world.requests(1)
        await until_joined(store, 49)
        if world.row.mark != "memory":
            assert source_of(store).in_use == 0
        await store.store_tokens("github", "u2", *OLD, world.at(HOUR))
        assert pair(await fresh(store, "u2")) == OLD
        assert await store.load_tokens("github", "u1") == old
        assert not any(caller.done() for caller in callers)
    records = await asyncio.gather(*callers)
    assert {pair(record) for record in records} == {pair(await world.stored())} != {pair(old)}
    assert {record["generation"] for record in records} == {old["generation"] + 1}
    assert world.provider.stats().requests == 1
    read = await fresh(store)
    assert abs(read["updated_at"] - records[0]["updated_at"]) < timedelta(seconds=5)
    assert read == records[0] | {"updated_at": read["updated_at"]}
    records[0]["extra"]["scope"] = records[0]["access_token"] = "spoilt"
    assert "spoilt" not in {
        value for record in records[1:] for value in (record["access_token"], *record["extra"].values())
    }


@on_every_row
async def test_two_stores_make_one_call(world: World) -> None:
    """The second store waits, and reads the tokens that the first one stored."""
    one, two = await world.store(), await world.store()
    await world.log_in(one)
    with world.provider.hold():
        first = asyncio.create_task(fresh(one))
        await world.requests(1)
        others = [asyncio.create_task(fresh(two)) for _ in range(5)]
        await until_waiting(two)
    records = await asyncio.gather(first, *others)
    assert {pair(record) for record in records} == {pair(await world.stored())}
    assert world.provider.stats().requests == 1


@on_every_row
async def test_many_stores_at_once_make_one_call(world: World) -> None:
    """All stores claim at the same time, while other callers lock the row in a transaction."""
    stores = [await world.store() for _ in range(3)]
    await world.log_in(stores[0])

    async def by_hand(store: AuthTokenStore) -> TokenRecord:
        async with store.transaction() as tx:
            record = await tx.load_tokens("github", "u1", for_update=True)
            assert record is not None
            if store.is_access_token_valid(record):
                return record
            assert store.is_refresh_token_valid(record)
            new = await world.refresher(record)
            await tx.store_tokens("github", "u1", new["access_token"], new["refresh_token"], world.at(HOUR))
        return await world.stored()

    calls = [call(store) for store in stores for call in (fresh, by_hand, fresh)]
    records = await asyncio.gather(*calls)
    assert {pair(record) for record in records} == {pair(await world.stored())}
    assert world.provider.stats().requests == 1


@on_every_row
async def test_after_a_dead_holder_s_lease_has_expired_another_caller_refreshes(world: World) -> None:
    """The lease expires by the database's clock."""
    store = await world.store()
    old = await world.log_in(store)
    backend = store._backend
    assert await backend.claim_lease(KEY, generation=old["generation"], holder="dead", duration=0.2)
    records = await many(3, store)
    assert {pair(record) for record in records} == {pair(await world.stored())}
    assert world.provider.stats().requests == 1


@on_memory
async def test_waiting_for_another_refresh_is_limited(world: World) -> None:
    """After three times ``refresh_timeout`` the caller gets an error; the row is unchanged, and callers can retry."""
    script = Script()
    store, interceptor = await world.intercepted(script, refresh_timeout=0.05)
    old = await world.expired(store)
    assert await interceptor.claim_lease(KEY, generation=old["generation"], holder="stuck", duration=HOUR)
    errors = await many(3, store)
    assert {type(error) for error in errors} == {RefreshTimeoutError}
    assert await interceptor.release_lease(KEY, generation=old["generation"], holder="stuck")
    assert pair(await fresh(store)) == NEW_PAIR
