"""The row changes during the provider's call: a new login, a deletion, resealing with another key."""

from __future__ import annotations

import asyncio

import pytest

from support.refresh_world import World, on_every_row, on_memory, on_rows
from support.refreshers import NEW, NEW_PAIR, Revoker, Script, pair
from support.store_calls import due, fresh
from tokenstore import Keyring, ReauthorizationRequiredError, UnknownKeyError

HOUR = 3600.0


@on_every_row
@pytest.mark.parametrize("answer", ["tokens", "invalid_grant"])
async def test_the_tokens_of_a_new_login_are_kept(world: World, answer: str) -> None:
    """Callers get them without an error, whatever the provider answers to the old refresh token."""
    script = Script(NEW if answer == "tokens" else ReauthorizationRequiredError("used"))
    script.hold()
    store = await world.store(refreshers={"github": script})
    await world.expired(store)
    callers = [asyncio.create_task(fresh(store)) for _ in range(3)]
    await script.called.wait()
    await store.store_tokens("github", "u1", "login-access", "login-refresh", world.at(HOUR))
    script.answer.set()
    records = await asyncio.gather(*callers)
    assert {pair(record) for record in records} == {("login-access", "login-refresh")} == {pair(await world.stored())}
    row = await world.sealed()
    assert row is not None
    assert (row.lease_holder, row.failure) == (None, None)
    assert script.calls == 1


@on_memory
async def test_a_new_login_that_has_expired_is_refreshed(world: World) -> None:
    """The refresh continues with the new refresh token."""
    store = await world.store()
    await world.log_in(store)
    with world.provider.hold():
        caller = asyncio.create_task(fresh(store))
        await world.requests(1)
        login = await world.log_in(store)
    record = await caller
    assert record["generation"] == login["generation"] + 1
    assert pair(record) == pair(await world.stored())
    assert world.provider.stats().refreshes == 2


@on_rows("memory", "sqlite")
@pytest.mark.parametrize("answer", ["tokens", "invalid_grant"])
async def test_a_deleted_row_stays_deleted(world: World, answer: str) -> None:
    """Callers get None."""
    script = Script(NEW if answer == "tokens" else ReauthorizationRequiredError("used"))
    script.hold()
    store = await world.store(refreshers={"github": script})
    await world.expired(store)
    callers = [asyncio.create_task(store.load_fresh_tokens("github", "u1")) for _ in range(3)]
    await script.called.wait()
    assert await store.delete_tokens("github", "u1")
    script.answer.set()
    assert await asyncio.gather(*callers) == [None] * 3
    assert await world.sealed() is None


@on_every_row
async def test_a_row_that_is_resealed_during_the_call_is_refreshed(world: World) -> None:
    """Resealing with another key changes neither the generation nor the lease."""
    script = Script()
    script.hold()
    store = await world.store(refreshers={"github": script})
    old = await world.expired(store)
    caller = asyncio.create_task(fresh(store))
    await script.called.wait()
    keys = Keyring({"k2": bytes(32), "k1": bytes(range(32))})
    newer = await world.store(keyring=keys, refreshers={"github": script})
    assert await newer.reseal_tokens("github", "u1")
    script.answer.set()
    record = await caller
    assert (pair(record), record["generation"]) == (NEW_PAIR, old["generation"] + 1)
    assert record == await newer.load_tokens("github", "u1") | {"updated_at": record["updated_at"]}  # type: ignore[operator]


@on_memory
async def test_a_row_that_does_not_open_gets_no_lease(world: World) -> None:
    """Nothing would end the lease, so a process that has the key would wait until it expires."""
    revoker = Revoker()
    owner = await world.store(refreshers={"github": revoker})
    await world.expired(owner)
    other = await world.store(keyring=Keyring({"other": bytes(32)}), refreshers={"github": revoker})
    with pytest.raises(UnknownKeyError):
        await other.revoke_tokens("github", "u1")
    assert [type(result.error) for result in await due(other, within=0)] == [UnknownKeyError]
    with pytest.raises(UnknownKeyError):
        await fresh(other)
    row = await world.sealed()
    assert row is not None
    assert row.lease_holder is None
    assert revoker.calls == 0
    assert pair(await fresh(owner)) == NEW_PAIR
