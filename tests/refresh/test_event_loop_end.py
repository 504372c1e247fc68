"""Event loops that end during a refresh: the refresh either releases its lease, or finishes."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from contextvars import Context
from typing import Any
from unittest import mock

import pytest

from support.event_loop_end import end_event_loop
from support.interceptor import Stop, failing
from support.polling import until
from support.refresh_world import World, assert_idle, on_memory, on_rows, settled
from support.refreshers import NEW, NEW_PAIR, OLD, Revoker, Script, pair
from support.stepping import stepped
from support.store_calls import fresh
from tokenstore import (
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    StoreClosedError,
    TokenRecord,
    TokensNotStoredError,
)
from tokenstore.records import TokenKey
from tokenstore.refresh import loop_end

_KEY = TokenKey("github", "u1")

# -- where the refresh is when the event loop ends ---------------------------------------------------------


each_way = pytest.mark.parametrize("at_every_turn", [False, True], ids=["once", "at every turn"])


@on_rows("memory", "sqlite", "postgresql+asyncpg", "mariadb+asyncmy")
@each_way
@pytest.mark.parametrize("carried_out", [False, True], ids=["before", "after"])
async def test_a_lease_claimed_as_the_event_loop_ends_is_released(
    world: World, carried_out: bool, at_every_turn: bool
) -> None:
    """The provider is not called, and the next job does not have to wait for a dead holder's lease."""
    script = Script()
    store, interceptor = await world.intercepted(script)
    await world.expired(store)
    stop = Stop()
    (interceptor.after if carried_out else interceptor.before)["claim_lease"] = stop
    caller = asyncio.create_task(fresh(store))
    await stop.reached.wait()
    joined = asyncio.shield(store._engine._attempts[_KEY].result)
    asyncio.get_running_loop().call_later(0.01, stop.go_on.set)
    await end_event_loop(at_every_turn=at_every_turn)
    assert caller.cancelled()
    assert script.calls == 0
    await assert_idle(world, OLD)
    error = (await joined).error
    assert error is not None
    assert isinstance(error(), StoreClosedError)
    assert pair(await fresh(store)) == NEW_PAIR


@on_memory
async def test_a_claim_that_is_not_answered_does_not_keep_the_event_loop_from_ending(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_end, "_LEASE_GRACE", 0.05)
    script = Script()
    store, interceptor = await world.intercepted(script)
    await world.expired(store)
    stop = interceptor.before["claim_lease"] = Stop()
    caller = asyncio.create_task(fresh(store))
    await stop.reached.wait()
    await end_event_loop()
    assert caller.cancelled()
    assert script.calls == 0


@on_rows("memory", "sqlite", "postgresql+asyncpg", "mariadb+asyncmy")
@each_way
@pytest.mark.parametrize("carried_out", [False, True], ids=["before", "after"])
async def test_the_provider_s_refusal_is_stored_in_the_row(
    world: World, carried_out: bool, at_every_turn: bool
) -> None:
    """No other process calls the provider again, and the listener for new logins is called."""
    told: list[ReauthorizationRequiredError] = []
    store, interceptor = await world.intercepted(
        Script(ReauthorizationRequiredError("no such grant")), on_reauthorization_required=told.append
    )
    await world.expired(store)
    stop = Stop()
    (interceptor.after if carried_out else interceptor.before)["release_lease"] = stop
    caller = asyncio.create_task(fresh(store))
    await stop.reached.wait()
    asyncio.get_running_loop().call_later(0.01, stop.go_on.set)
    await end_event_loop(at_every_turn=at_every_turn)
    assert caller.cancelled()
    await assert_idle(world, OLD, "invalid_grant")
    assert [error.code for error in told] == ["invalid_grant"]


@on_memory
@each_way
async def test_callers_that_still_wait_get_the_new_pair(world: World, at_every_turn: bool) -> None:
    """A handler cancels only the refresh's task: the callers get the stored pair, and the listener is called."""
    news: list[TokenRecord] = []

    async def tell(record: TokenRecord) -> None:
        await asyncio.sleep(0)
        news.append(record)

    script = Script()
    script.hold()
    store = await world.store(refreshers={"github": script}, on_refreshed=tell)
    await world.expired(store)
    callers = [asyncio.create_task(fresh(store)) for _ in range(3)]
    await script.called.wait()
    (task,) = store._engine._tasks
    assert not task.cancel()
    script.answer.set()
    while at_every_turn and not task.done():
        assert not task.cancel()
        await asyncio.sleep(0)
    records = await asyncio.gather(*callers)
    await settled(store)
    assert [pair(record) for record in (*records, *news)] == [NEW_PAIR] * 4


@on_memory
async def test_a_refresher_that_ignores_its_timeout_is_cancelled_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cancellation by the end of the event loop came before the timeout, and takes effect after it."""
    monkeypatch.setattr(loop_end, "_CALL_GRACE", 0.05)
    called = asyncio.Event()

    async def stubborn(record: TokenRecord) -> Any:
        called.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    store = await world.store(refreshers={"github": stubborn}, refresh_timeout=0.05)
    await world.expired(store)
    caller = asyncio.create_task(fresh(store))
    await called.wait()
    async with asyncio.timeout(10):
        await end_event_loop()
    assert caller.cancelled()
    await assert_idle(world, OLD, "refresh_failed")


@on_memory
async def test_a_refresher_that_cancels_its_own_task_has_failed(world: World) -> None:
    async def confused(record: TokenRecord) -> Any:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_soon(task.cancel)
        await asyncio.Event().wait()

    store = await world.store(refreshers={"github": confused})
    await world.expired(store)
    with pytest.raises(ProviderUnavailableError, match="refresh_failed"):
        await fresh(store)
    await assert_idle(world, OLD, "refresh_failed")


@on_rows("memory", "sqlite")
@pytest.mark.parametrize("late", ["at once", "later"])
async def test_a_refresher_that_leaves_a_cancellation_behind_loses_no_pair(world: World, late: str) -> None:
    """The refresher did not stop a timer, or a cancellation comes together with the response."""

    async def careless(record: TokenRecord) -> Any:
        task = asyncio.current_task()
        assert task is not None
        if late == "at once":
            task.cancel()
        else:
            for turns in range(5):
                asyncio.get_running_loop().call_later(turns / 1000, task.cancel)
        return NEW

    store = await world.store(refreshers={"github": careless})
    await world.expired(store)
    assert pair(await fresh(store)) == NEW_PAIR
    await assert_idle(world, NEW_PAIR)


@on_rows("memory", "sqlite", "postgresql+asyncpg", "mariadb+asyncmy")
@each_way
async def test_tokens_that_the_provider_may_have_revoked_are_deleted(world: World, at_every_turn: bool) -> None:
    revoker = Revoker()
    revoker.hold()
    store = await world.store(refreshers={"github": revoker})
    await world.expired(store)
    revoking = asyncio.create_task(store.revoke_tokens("github", "u1"))
    await revoker.revoking.wait()
    asyncio.get_running_loop().call_later(0.01, revoker.answer.set)
    await end_event_loop(at_every_turn=at_every_turn)
    assert revoking.cancelled()
    assert await world.sealed() is None


@on_memory
@each_way
@pytest.mark.parametrize("carried_out", [False, True], ids=["before", "after"])
async def test_a_revocation_that_has_not_begun_is_cancelled(
    world: World, carried_out: bool, at_every_turn: bool
) -> None:
    revoker = Revoker()
    store, interceptor = await world.intercepted(revoker)
    await world.expired(store)
    stop = Stop()
    (interceptor.after if carried_out else interceptor.before)["claim_lease"] = stop
    revoking = asyncio.create_task(store.revoke_tokens("github", "u1"))
    await stop.reached.wait()
    asyncio.get_running_loop().call_later(0.01, stop.go_on.set)
    await end_event_loop(at_every_turn=at_every_turn)
    assert revoking.cancelled()
    assert not revoker.revoking.is_set()
    await assert_idle(world, OLD)


@on_memory
async def test_tokens_that_a_cancelled_close_could_not_store_are_in_the_error_of_the_next(world: World) -> None:
    """The caller of the first ``aclose()`` was cancelled and got no error."""
    store, interceptor = await world.intercepted(Script(), refresh_timeout=0.05)
    await world.expired(store)
    interceptor.before["complete_lease"] = failing()
    caller = asyncio.create_task(fresh(store))
    await until(lambda: interceptor.calls["complete_lease"] > 0)
    await end_event_loop()
    closing = asyncio.create_task(store.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, caller, return_exceptions=True)
    assert closing.cancelled()
    with pytest.raises(TokensNotStoredError) as caught:
        await store.aclose()
    assert [pair(record) for record in caught.value.records] == [NEW_PAIR]


# -- at every step of the event loop -------------------------------------------------------------------------


@on_rows("memory", "sqlite", "postgresql+asyncpg", "mariadb+asyncmy")
async def test_a_refresh_finishes_or_leaves_no_lease_if_all_tasks_are_cancelled_at_any_step(world: World) -> None:
    """From some step of the event loop on, all tasks are cancelled at every step."""
    at, calls = 0, set[int]()
    while True:
        script = Script()
        store = await world.store(refreshers={"github": script})
        await world.expired(store)
        caller = asyncio.create_task(fresh(store))
        for _ in range(at):
            await asyncio.sleep(0)
        ended = caller.done()
        await end_event_loop(at_every_turn=True)
        await assert_idle(world, NEW_PAIR if script.calls else OLD)
        await store.aclose()
        calls.add(script.calls)
        if ended:
            break
        at += 1 + at // 4
    assert calls == {0, 1}


async def _ended_at(world: World, at: int) -> bool:
    """Cancel all tasks but this one at the n-th suspension of a refresh. Returns whether there were so many."""
    test, steps = asyncio.current_task(), 0

    def cancel_all() -> None:
        for task in asyncio.all_tasks() - {test}:
            task.cancel()

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == at:  # in a new context, so that this does not count as a cancellation by the refresh itself
            asyncio.get_running_loop().call_soon(cancel_all, context=Context())

    script = Script()
    store = await world.store(refreshers={"github": script})
    await world.expired(store)
    perform = store._engine._perform
    with mock.patch.object(store._engine, "_perform", lambda attempt: stepped(perform(attempt), step)):
        await asyncio.wait([asyncio.create_task(fresh(store))])
        await settled(store)
    await assert_idle(world, NEW_PAIR if script.calls else OLD)
    await store.aclose()
    return steps >= at


@on_rows("sqlite", "postgresql+asyncpg", "mariadb+asyncmy")
async def test_a_refresh_finishes_or_leaves_no_lease_if_the_event_loop_ends_at_any_suspension(world: World) -> None:
    """The event loop ends at each suspension of the refresh in turn."""
    at = 1
    while await _ended_at(world, at):
        at += 1
    assert at > 2


# -- closing -----------------------------------------------------------------------------------------


@on_rows("memory", "sqlite")
@pytest.mark.parametrize("carried_out", [False, True])
async def test_issued_tokens_are_stored_although_the_event_loop_ends(world: World, carried_out: bool) -> None:
    """The provider has issued a new pair when all tasks are cancelled."""
    store, interceptor = await world.intercepted(Script())
    await world.expired(store)
    stop = Stop()
    (interceptor.after if carried_out else interceptor.before)["complete_lease"] = stop
    caller = asyncio.create_task(fresh(store))
    await stop.reached.wait()
    assert not await end_event_loop(within=3)
    assert caller.cancelled()
    assert pair(await world.stored()) == NEW_PAIR


@on_memory
async def test_an_event_loop_without_a_database_can_end(world: World) -> None:
    """Storing the tokens is retried only for the usual time, so that Ctrl-C ends the program."""
    store, interceptor = await world.intercepted(Script(), refresh_timeout=0.05)
    await world.expired(store)
    interceptor.before["complete_lease"] = failing()
    caller = asyncio.create_task(fresh(store))
    await until(lambda: interceptor.calls["complete_lease"] > 0)
    left = await end_event_loop(within=3)
    interceptor.before.clear()
    await asyncio.gather(caller, *left, return_exceptions=True)
    assert not left, "a task is still running, so the program would not end"
    with suppress(TokensNotStoredError):
        await store.aclose()


@on_memory
async def test_an_event_loop_that_ends_during_the_call_waits_for_the_new_pair(world: World) -> None:
    """The caller ends at once; the refresh ends after the provider has answered and the pair is stored."""
    script = Script()
    script.hold()
    store = await world.store(refreshers={"github": script})
    await world.expired(store)
    caller = asyncio.create_task(fresh(store))
    await script.called.wait()
    asyncio.get_running_loop().call_later(0.01, script.answer.set)
    assert not await end_event_loop(within=3)
    assert caller.cancelled()
    assert pair(await world.stored()) == NEW_PAIR
