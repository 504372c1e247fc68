"""Closing a store waits for its refreshes, and raises an error with the tokens that cannot be stored."""

from __future__ import annotations

import asyncio

import pytest

from support.error_text import told
from support.interceptor import failing
from support.polling import until
from support.refresh_world import World, on_every_row, on_memory, until_waiting
from support.refreshers import NEW_PAIR, OLD, Script, pair
from support.store_calls import fresh
from tokenstore import StoreClosedError, TokensNotStoredError
from tokenstore.records import TokenKey

HOUR = 3600.0
KEY = TokenKey("github", "u1")

# -- closing -----------------------------------------------------------------------------------------


@on_every_row
async def test_closing_waits_for_a_refresh(world: World) -> None:
    """The new pair is stored before the connections are closed, and waiting callers get it."""
    store = await world.store()
    old = await world.log_in(store)
    with world.provider.hold():
        caller = asyncio.create_task(fresh(store))
        await world.requests(1)
        closing = asyncio.create_task(store.aclose())
        await until(lambda: store._engine._closing)
        with pytest.raises(StoreClosedError):
            await fresh(store)
    await closing
    assert pair(await caller) == pair(await world.stored()) != pair(old)


@on_every_row
async def test_a_cancelled_close_loses_no_tokens(world: World) -> None:
    """``aclose()`` is cancelled, for example by a timeout; the refresh ends normally nevertheless."""
    store = await world.store()
    old = await world.log_in(store)
    with world.provider.hold():
        caller = asyncio.create_task(fresh(store))
        await world.requests(1)
        closing = asyncio.create_task(store.aclose())
        await until(lambda: store._engine._closing)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
    records = await asyncio.gather(caller, return_exceptions=True)
    await store.aclose()
    assert pair(await world.stored()) != pair(old), records
    assert pair(records[0]) == pair(await world.stored())  # type: ignore[arg-type]


@on_memory
async def test_closing_does_not_wait_for_refreshes_of_other_stores(world: World) -> None:
    """A caller that waits for another holder's lease gets StoreClosedError."""
    store, interceptor = await world.intercepted(Script())
    old = await world.expired(store)
    assert await interceptor.claim_lease(KEY, generation=old["generation"], holder="other", duration=HOUR)
    caller = asyncio.create_task(fresh(store))
    await until_waiting(store)
    await store.aclose()
    with pytest.raises(StoreClosedError):
        await caller


# -- the database fails ------------------------------------------------------------------------------


@on_memory
async def test_closing_raises_an_error_with_the_tokens_that_cannot_be_stored(world: World) -> None:
    """One error contains the tokens of all rows; a second ``aclose()`` raises no error."""
    store, interceptor = await world.intercepted(Script(), refresh_timeout=0.05)
    for user in ("u1", "u2"):
        await world.expired(store, user)
    interceptor.before["complete_lease"] = failing()
    callers = [asyncio.create_task(fresh(store, user)) for user in ("u1", "u2")]
    await until(lambda: interceptor.calls["complete_lease"] >= 2)
    with pytest.raises(TokensNotStoredError) as caught:
        await store.aclose()
    assert {record["user_id"]: pair(record) for record in caught.value.records} == {"u1": NEW_PAIR, "u2": NEW_PAIR}
    assert not any(secret in told(caught.value) for secret in (*OLD, *NEW_PAIR))
    for error in await asyncio.gather(*callers, return_exceptions=True):
        assert isinstance(error, TokensNotStoredError)
    await store.aclose()


@on_memory
async def test_closing_stores_the_tokens_if_the_database_becomes_available_again(world: World) -> None:
    """The database is available again while the store closes."""
    store, interceptor = await world.intercepted(Script(), refresh_timeout=0.2)
    await world.expired(store)
    interceptor.before["complete_lease"] = failing(3)
    caller = asyncio.create_task(fresh(store))
    await until(lambda: interceptor.calls["complete_lease"] >= 1)
    await store.aclose()
    assert pair(await caller) == pair(await world.stored()) == NEW_PAIR
