"""Event loops that end while a refresh is under way: the grant lives, and no pair is lost.

The provider runs in a thread of its own and revokes a grant whose refresh token comes twice. A pair that the provider
has issued to nobody therefore shows in its counters at the next refresh.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import Context
from typing import Any
from unittest import mock

import pytest
import uvloop
from asgiref.sync import async_to_sync
from flask import Flask

from matrix import Row, params
from refreshes import NEW, OLD, Script, Stop, World, failing, on_memory, on_rows, settled
from short_jobs import ENDINGS, Client, Jobs, Work, process_running
from stepping import stepped
from tokenstore import (
    AuthTokenStore,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    StoreClosedError,
    TokenRecord,
    TokensNotStoredError,
)
from tokenstore.records import TokenKey
from tokenstore.refresh import loop_end
from tokenstore.testing.provider import StrictRotatingProvider
from watch import until

_LATENCY = 0.1
_DATABASES = ["sqlite", "postgresql+asyncpg", "mariadb+asyncmy"]
_KEY = TokenKey("github", "u1")

each_database = pytest.mark.parametrize("row", params(names=_DATABASES))
sqlite = pytest.mark.parametrize("row", params(names=["sqlite"]))
one_store_or_one_a_job = pytest.mark.parametrize("shared", [True, False], ids=["one store", "a store per job"])
# A store that is left open leaves its connections open. If the warning of that is an error, uvloop does not close.
stores_may_be_left_open = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

Runner = Callable[[Work], object]


@pytest.fixture
def provider() -> Iterator[StrictRotatingProvider]:
    with StrictRotatingProvider(latency=_LATENCY) as provider:
        yield provider


def check(provider: StrictRotatingProvider, received: int, at_least: int) -> None:
    """Each response has been received, and no refresh token was sent twice."""
    stats = provider.stats()
    assert (stats.reuses, stats.revoked_grants) == (0, 0)
    assert stats.refreshes == received
    assert received > at_least


# -- jobs, views, processes --------------------------------------------------------------------------------


@each_database
@one_store_or_one_a_job
@stores_may_be_left_open
def test_jobs_that_end_before_their_refresh(row: Row, url: str, shared: bool, provider: StrictRotatingProvider) -> None:
    """As with Celery or cron: each job is an `asyncio.run`, which ends while the provider has the request."""
    received = Jobs(url, Client.of(provider), shared=shared).run(10, provider.new_grant("user"))
    check(provider, received, 10)


@pytest.mark.soak
@each_database
@one_store_or_one_a_job
@stores_may_be_left_open
def test_two_hundred_jobs_that_end_before_their_refresh(
    row: Row, url: str, shared: bool, provider: StrictRotatingProvider
) -> None:
    """Jobs that take a third of the time that the provider takes."""
    provider.latency = 0.3
    jobs = Jobs(url, Client.of(provider), shared=shared, work=lambda: asyncio.sleep(0.1))
    check(provider, jobs.run(200, provider.new_grant("user")), 100)


@each_database
@pytest.mark.parametrize("ending", ENDINGS)
@stores_may_be_left_open
def test_ways_in_which_a_job_can_end(row: Row, url: str, ending: str, provider: StrictRotatingProvider) -> None:
    jobs = Jobs(url, Client.of(provider), shared=ending != "closing", ending=ending)
    check(provider, jobs.run(2, provider.new_grant("user")), 2)


@each_database
@stores_may_be_left_open
def test_jobs_on_uvloop(row: Row, url: str, provider: StrictRotatingProvider) -> None:

    def run(job: Work) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(job())

    check(provider, Jobs(url, Client.of(provider)).run(3, provider.new_grant("user"), run), 3)


@each_database
@one_store_or_one_a_job
@stores_may_be_left_open
def test_flask_views_that_end_before_their_refresh(
    row: Row, url: str, shared: bool, provider: StrictRotatingProvider
) -> None:
    app = Flask(__name__)
    views: list[Work] = []

    @app.get("/")
    async def view() -> str:
        await views[-1]()
        return "done"

    def run(job: Work) -> None:
        views.append(job)
        response = app.test_client().get("/")
        assert (response.status_code, response.text) == (200, "done")

    check(provider, Jobs(url, Client.of(provider), shared=shared).run(5, provider.new_grant("user"), run), 5)


@each_database
@one_store_or_one_a_job
@stores_may_be_left_open
def test_calls_by_async_to_sync_that_end_before_their_refresh(
    row: Row, url: str, shared: bool, provider: StrictRotatingProvider
) -> None:
    def run(job: Work) -> None:
        async_to_sync(job)()

    check(provider, Jobs(url, Client.of(provider), shared=shared).run(5, provider.new_grant("user"), run), 5)


@each_database
@one_store_or_one_a_job
def test_worker_processes_that_end_after_a_few_jobs(
    row: Row, url: str, shared: bool, provider: StrictRotatingProvider
) -> None:
    """As a prefork server replaces its children."""
    users = ["user 1", "user 2"]
    client = Client.of(provider)
    processes = [process_running(url, client, user, provider.new_grant(user), 3, shared) for user in users]
    for process in processes:
        process.join(60)
        code = process.exitcode
        process.kill()
        process.join()
        process.close()
        assert code == 0
    check(provider, provider.stats().refreshes, 6)


# -- where the refresh is when the event loop ends ---------------------------------------------------------


async def fresh(store: AuthTokenStore, **options: Any) -> TokenRecord | None:
    return await store.load_fresh_tokens("github", "u1", **options)


def pair(record: Any) -> tuple[str, str]:
    return record["access_token"], record["refresh_token"]


async def _end(at_every_turn: bool = False) -> None:
    """Cancel all tasks but this one, as the end of an event loop does, and wait for them."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    while at_every_turn and any(not task.done() for task in tasks):
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)


async def _assert_idle(world: World, tokens: tuple[str, str], code: str | None = None) -> None:
    row = await world.sealed()
    assert row is not None
    assert row.lease_holder is None
    assert (row.failure.code if row.failure else None) == code
    assert pair(await world.stored()) == tokens


each_way = pytest.mark.parametrize("at_every_turn", [False, True], ids=["once", "at every turn"])


@on_rows("memory", "sqlite", "postgresql+asyncpg", "mariadb+asyncmy")
@each_way
@pytest.mark.parametrize("carried_out", [False, True], ids=["before", "after"])
async def test_a_claim_is_released_again(world: World, carried_out: bool, at_every_turn: bool) -> None:
    """The provider is not called, and the next job need not wait for the lease of one that is gone."""
    script = Script()
    store, meddler = await world.meddled(script)
    await world.expired(store)
    stop = Stop()
    (meddler.after if carried_out else meddler.before)["claim_lease"] = stop
    caller = asyncio.create_task(fresh(store))
    await stop.reached.wait()
    joined = asyncio.shield(store._engine._attempts[_KEY].result)
    asyncio.get_running_loop().call_later(0.01, stop.go_on.set)
    await _end(at_every_turn)
    assert caller.cancelled()
    assert script.calls == 0
    await _assert_idle(world, OLD)
    error = (await joined).error
    assert error is not None
    assert isinstance(error(), StoreClosedError)
    assert pair(await fresh(store)) == pair(NEW)


@on_memory
async def test_a_claim_without_an_answer_does_not_keep_the_loop_from_ending(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_end, "_LEASE_GRACE", 0.05)
    script = Script()
    store, meddler = await world.meddled(script)
    await world.expired(store)
    stop = meddler.before["claim_lease"] = Stop()
    caller = asyncio.create_task(fresh(store))
    await stop.reached.wait()
    await _end()
    assert caller.cancelled()
    assert script.calls == 0


@on_rows("memory", "sqlite", "postgresql+asyncpg", "mariadb+asyncmy")
@each_way
@pytest.mark.parametrize("carried_out", [False, True], ids=["before", "after"])
async def test_a_refusal_is_left_in_the_row(world: World, carried_out: bool, at_every_turn: bool) -> None:
    """No other process asks the provider again. Whoever has to ask the user for a new login is told."""
    told: list[ReauthorizationRequiredError] = []
    store, meddler = await world.meddled(
        Script(ReauthorizationRequiredError("no such grant")), on_reauthorization_required=told.append
    )
    await world.expired(store)
    stop = Stop()
    (meddler.after if carried_out else meddler.before)["release_lease"] = stop
    caller = asyncio.create_task(fresh(store))
    await stop.reached.wait()
    asyncio.get_running_loop().call_later(0.01, stop.go_on.set)
    await _end(at_every_turn)
    assert caller.cancelled()
    await _assert_idle(world, OLD, "invalid_grant")
    assert [error.code for error in told] == ["invalid_grant"]


@on_memory
@each_way
async def test_callers_that_still_wait_get_the_new_pair(world: World, at_every_turn: bool) -> None:
    """A handler that cancels the refresh's task alone: the callers get what was stored, and the listener is told."""
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
    assert [pair(record) for record in (*records, *news)] == [pair(NEW)] * 4


@on_memory
async def test_a_refresher_that_ignores_its_timeout_is_cancelled_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the event loop came before the timeout, and is not lost."""
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
        await _end()
    assert caller.cancelled()
    await _assert_idle(world, OLD, "refresh_failed")


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
    await _assert_idle(world, OLD, "refresh_failed")


@on_rows("memory", "sqlite")
@pytest.mark.parametrize("late", ["at once", "later"])
async def test_a_refresher_that_leaves_a_cancellation_behind_loses_no_pair(world: World, late: str) -> None:
    """A timer that it did not stop, or a cancellation that comes with the response."""

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
    assert pair(await fresh(store)) == pair(NEW)
    await _assert_idle(world, pair(NEW))


class Revoker(Script):
    """Revokes, once it may answer."""

    async def revoke(self, record: TokenRecord) -> None:
        await self(record)


@on_rows("memory", "sqlite", "postgresql+asyncpg", "mariadb+asyncmy")
@each_way
async def test_what_the_provider_may_have_revoked_is_deleted(world: World, at_every_turn: bool) -> None:
    revoker = Revoker()
    revoker.hold()
    store = await world.store(refreshers={"github": revoker})
    await world.expired(store)
    revoking = asyncio.create_task(store.revoke_tokens("github", "u1"))
    await revoker.called.wait()
    asyncio.get_running_loop().call_later(0.01, revoker.answer.set)
    await _end(at_every_turn)
    assert revoking.cancelled()
    assert await world.sealed() is None


@on_memory
@each_way
@pytest.mark.parametrize("carried_out", [False, True], ids=["before", "after"])
async def test_a_revocation_that_has_not_begun_is_given_up(
    world: World, carried_out: bool, at_every_turn: bool
) -> None:
    revoker = Revoker()
    store, meddler = await world.meddled(revoker)
    await world.expired(store)
    stop = Stop()
    (meddler.after if carried_out else meddler.before)["claim_lease"] = stop
    revoking = asyncio.create_task(store.revoke_tokens("github", "u1"))
    await stop.reached.wait()
    asyncio.get_running_loop().call_later(0.01, stop.go_on.set)
    await _end(at_every_turn)
    assert revoking.cancelled()
    assert revoker.calls == 0
    await _assert_idle(world, OLD)


@on_memory
async def test_tokens_that_a_cancelled_close_could_not_store_are_handed_over_by_the_next(world: World) -> None:
    """The error of the first close had no caller any more."""
    store, meddler = await world.meddled(Script(), refresh_timeout=0.05)
    await world.expired(store)
    meddler.before["complete_lease"] = failing()
    caller = asyncio.create_task(fresh(store))
    await until(lambda: meddler.calls["complete_lease"] > 0)
    await _end()
    closing = asyncio.create_task(store.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, caller, return_exceptions=True)
    assert closing.cancelled()
    with pytest.raises(TokensNotStoredError) as caught:
        await store.aclose()
    assert [pair(record) for record in caught.value.records] == [pair(NEW)]


# -- at every turn -------------------------------------------------------------------------------------------


@on_rows("memory", "sqlite", "postgresql+asyncpg", "mariadb+asyncmy")
async def test_all_tasks_are_cancelled_from_any_turn_on(world: World) -> None:
    """The refresh has not begun and leaves nothing behind, or it comes to its end."""
    at, calls = 0, set[int]()
    while True:
        script = Script()
        store = await world.store(refreshers={"github": script})
        await world.expired(store)
        caller = asyncio.create_task(fresh(store))
        for _ in range(at):
            await asyncio.sleep(0)
        ended = caller.done()
        await _end(at_every_turn=True)
        await _assert_idle(world, pair(NEW) if script.calls else OLD)
        await store.aclose()
        calls.add(script.calls)
        if ended:
            break
        at += 1 + at // 4
    assert calls == {0, 1}


async def _ended_at(world: World, at: int) -> bool:
    """Cancel all tasks but this one at the n-th wait of a refresh. Returns whether it had so many."""
    test, steps = asyncio.current_task(), 0

    def cancel_all() -> None:
        for task in asyncio.all_tasks() - {test}:
            task.cancel()

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == at:  # in a context of its own: it is not the refresh that cancels
            asyncio.get_running_loop().call_soon(cancel_all, context=Context())

    script = Script()
    store = await world.store(refreshers={"github": script})
    await world.expired(store)
    perform = store._engine._perform
    with mock.patch.object(store._engine, "_perform", lambda attempt: stepped(perform(attempt), step)):
        await asyncio.wait([asyncio.create_task(fresh(store))])
        await settled(store)
    await _assert_idle(world, pair(NEW) if script.calls else OLD)
    await store.aclose()
    return steps >= at


@on_rows("sqlite", "postgresql+asyncpg", "mariadb+asyncmy")
async def test_the_event_loop_ends_at_any_wait_of_the_refresh(world: World) -> None:
    """The same, one wait after another of the refresh itself."""
    at = 1
    while await _ended_at(world, at):
        at += 1
    assert at > 2
