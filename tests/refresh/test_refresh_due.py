"""`refresh_due`: each row that is due is refreshed once, with limited concurrency, and yields its outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from datetime import timedelta
from typing import Any

from support.interceptor import failing
from support.refresh_world import World, on_every_row, on_memory, settled, until_joined
from support.refreshers import NEW, NEW_PAIR, OLD, Gone, Script, pair
from support.store_calls import due, fresh
from tokenstore import BackendError, ProviderUnavailableError, ReauthorizationRequiredError, TokenRecord
from tokenstore.records import Failure, TokenKey

HOUR = 3600.0


@on_every_row
async def test_each_due_row_is_refreshed_once(world: World) -> None:
    """Two machines run `refresh_due` at once, page by page; each one yields an outcome for exactly the due rows."""
    one, two = await world.store(), await world.store()
    for user in "aceg":
        await world.log_in(one, user, expires_in=500)
    await world.log_in(one, "b", expires_in=700)
    await one.store_tokens("github", "d", "at", None, world.at(500))
    await one.store_tokens("github", "f", "at", "rt", None)
    await one.store_tokens("gitlab", "a", "at", "rt", world.at(500))
    options = {"within": timedelta(seconds=600), "provider": "github", "concurrency": 2, "page_size": 2}
    mine, theirs = await asyncio.gather(due(one, **options), due(two, **options))
    for results in (mine, theirs):
        assert {(result.provider, result.error) for result in results} == {("github", None)}
        assert {result.outcome for result in results} <= {"refreshed", "not_due", "busy"}
        users = [result.user_id for result in results]
        assert len(set(users)) == len(users)
        assert set(users) <= set("aceg")
    refreshed = [result.user_id for result in mine + theirs if result.outcome == "refreshed"]
    assert sorted(refreshed) == list("aceg")
    assert world.provider.stats().refreshes_by_user == dict.fromkeys("aceg", 1)
    assert await due(one, **options) == []


@on_memory
async def test_refresh_due_runs_as_many_refreshes_at_once_as_its_concurrency(world: World) -> None:
    """It uses the full concurrency, and never exceeds it."""
    script = Script()
    script.hold()
    in_flight = most = 0

    async def counting(record: TokenRecord) -> Mapping[str, Any]:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        if in_flight == 3:
            script.answer.set()
        await script(record)
        await asyncio.sleep(0)
        in_flight -= 1
        return NEW

    store = await world.store(refreshers={"github": counting})
    users = [f"u{n}" for n in range(10)]
    for user in users:
        await world.expired(store, user)
    results = await due(store, within=0, concurrency=3, page_size=4)
    assert sorted(result.user_id for result in results) == users
    assert {result.outcome for result in results} == {"refreshed"}
    assert most == 3


@on_memory
async def test_refresh_due_yields_an_error_for_each_failed_row(world: World) -> None:
    """The error names the row, and the other rows are refreshed."""

    async def moody(record: TokenRecord) -> Mapping[str, Any]:
        if record["user_id"] == "b":
            raise ReauthorizationRequiredError("used")
        if record["user_id"] == "c":
            raise Gone(record["refresh_token"])
        return NEW

    store, interceptor = await world.intercepted(moody)
    for user in "abcd":
        await world.expired(store, user)
    results = {result.user_id: result for result in await due(store, within=60)}
    assert {user: result.outcome for user, result in results.items()} == {
        "a": "refreshed",
        "b": "failed",
        "c": "failed",
        "d": "refreshed",
    }
    assert isinstance(results["b"].error, ReauthorizationRequiredError)
    assert isinstance(results["c"].error, ProviderUnavailableError)
    assert results["c"].error.user_id == "c"
    assert results["a"].error is None
    assert OLD[1] not in repr(results)
    interceptor.before["claim_lease"] = failing(error=BackendError("no space"))
    await world.expired(store, "a")
    results = {result.user_id: result for result in await due(store, within=60)}
    assert {user: (result.outcome, type(result.error)) for user, result in results.items()} == {
        "a": ("failed", BackendError),
        "c": ("deferred", ProviderUnavailableError),
    }


@on_memory
async def test_refresh_due_leaves_a_dead_row_alone_until_the_user_logs_in(world: World) -> None:
    """The row is found once, by the call that shows that its grant is gone."""
    dead = True

    async def refresh(record: TokenRecord) -> Mapping[str, Any]:
        if dead:
            raise ReauthorizationRequiredError("revoked")
        return NEW

    store = await world.store(refreshers={"github": refresh})
    await world.expired(store)
    assert [result.outcome for result in await due(store, within=60)] == ["failed"]
    assert await due(store, within=60) == []
    dead = False
    await world.expired(store)
    assert [result.outcome for result in await due(store, within=60)] == ["refreshed"]


@on_memory
async def test_refresh_due_reports_a_row_that_dies_after_it_was_found(world: World) -> None:
    """Another process has learned that the user has to log in again."""
    script = Script()
    store, interceptor = await world.intercepted(script)
    generation = (await world.expired(store))["generation"]
    lease: dict[str, Any] = {"generation": generation, "holder": "x"}

    async def die() -> None:
        key, backend = TokenKey("github", "u1"), interceptor.backend
        assert await backend.claim_lease(key, duration=HOUR, **lease)
        assert await backend.release_lease(key, failure=Failure("invalid_grant"), **lease)

    interceptor.after["scan_due"] = die
    [result] = await due(store, within=60)
    assert (result.outcome, type(result.error)) == ("dead", ReauthorizationRequiredError)
    assert script.calls == 0


@on_memory
async def test_refresh_due_reads_only_the_pages_with_due_rows(world: World) -> None:
    """The pages are read as the refreshes need them, each row once, also rows that stay due."""
    script = Script()
    store, interceptor = await world.intercepted(script)
    for user in "abcdefgh":
        await world.log_in(store, user, expires_in=-1 if user < "e" else HOUR)
    failed, deferred = TokenKey("github", "a"), Failure("unavailable", HOUR)
    lease: dict[str, Any] = {"generation": (await world.stored("a"))["generation"], "holder": "x"}
    assert await interceptor.claim_lease(failed, duration=HOUR, **lease)
    assert await interceptor.release_lease(failed, failure=deferred, **lease)
    interceptor.calls.clear()
    seen = []
    async for result in store.refresh_due(within=60, concurrency=1, page_size=1):
        seen.append((result.user_id, result.outcome))
        assert interceptor.calls["scan_due"] <= len(seen) + 1
    assert sorted(seen) == [("a", "deferred"), ("b", "refreshed"), ("c", "refreshed"), ("d", "refreshed")]
    assert interceptor.calls["scan_due"] == 5
    assert interceptor.calls["scan"] == 0


@on_memory
async def test_refresh_due_refreshes_a_row_once_although_its_new_token_is_due_again(world: World) -> None:
    """The provider's tokens live for five minutes, and the sweep wants an hour."""
    lives = {"access_token": NEW["access_token"], "refresh_token": NEW["refresh_token"], "expires_in": 300}
    script = Script(lives)
    store = await world.store(refreshers={"github": script})
    for user in "abcd":
        await world.expired(store, user)
    results = await due(store, within=HOUR, concurrency=1, page_size=1)
    assert [(result.user_id, result.outcome) for result in results] == [(user, "refreshed") for user in "abcd"]
    assert script.calls == 4
    assert len(await due(store, within=HOUR)) == 4


@on_memory
async def test_refresh_due_tells_an_expired_refresh_token_from_a_failure(world: World) -> None:
    """Nothing was tried: the row itself shows that the user has to log in again."""
    script = Script()
    store = await world.store(refreshers={"github": script})
    await store.store_tokens("github", "u1", *OLD, world.at(-2), world.at(-1))
    [result] = await due(store, within=60)
    assert (result.outcome, type(result.error)) == ("dead", ReauthorizationRequiredError)
    assert script.calls == 0


@on_memory
async def test_refresh_due_of_several_providers(world: World) -> None:
    """Without `provider`, all providers with a refresher are refreshed; with it, one, also with a passed callable."""
    hub, lab, mine = Script(), Script(), Script()
    store = await world.store(refreshers={"github": hub, "gitlab": lab})
    for provider in ("github", "gitlab", "slack"):
        await store.store_tokens(provider, "u1", *OLD, world.at(-1))
    results = await due(store, within=60)
    assert sorted((result.provider, result.outcome) for result in results) == [
        ("github", "refreshed"),
        ("gitlab", "refreshed"),
    ]
    assert await due(store, within=60) == []
    [result] = await due(store, within=60, provider="slack", refresh=mine)
    assert (result.provider, result.outcome) == ("slack", "refreshed")
    assert [script.calls for script in (hub, lab, mine)] == [1, 1, 1]
    assert await due(await world.store(refreshers={}), within=60) == []


@on_memory
async def test_refresh_due_yields_busy_for_a_leased_row_and_gone_for_a_deleted_one(world: World) -> None:
    """Another process is refreshing the first row; the second one was deleted after it was listed."""
    script = Script()
    store, interceptor = await world.intercepted(script)
    busy = await world.expired(store, "a")
    assert await interceptor.claim_lease(
        TokenKey("github", "a"), generation=busy["generation"], holder="x", duration=HOUR
    )
    await world.expired(store, "b")

    async def delete() -> None:
        await interceptor.backend.delete(TokenKey("github", "b"))

    interceptor.before["get"] = delete
    results = await due(store, within=60)
    assert sorted((result.user_id, result.outcome) for result in results) == [("a", "busy"), ("b", "gone")]
    assert script.calls == 0


@on_memory
async def test_an_iteration_that_ends_early_starts_no_further_refresh(world: World) -> None:
    """Refreshes that have begun are finished."""
    script = Script()
    store = await world.store(refreshers={"github": script})
    users = [f"u{n}" for n in range(8)]
    for user in users:
        await world.expired(store, user)
    async with aclosing(store.refresh_due(within=60, concurrency=2, page_size=3)) as results:
        async for result in results:
            assert result.outcome == "refreshed"
            script.hold()
            break
    script.answer.set()
    await settled(store)
    assert len(asyncio.all_tasks()) == 1
    states = [pair(await world.stored(user)) for user in users]
    assert states.count(NEW_PAIR) == script.calls <= 3
    assert [row.lease_holder for user in users if (row := await world.sealed(user))] == [None] * 8


@on_memory
async def test_a_caller_joins_a_refresh_that_refresh_due_has_begun(world: World) -> None:
    """The caller's token has expired."""
    script = Script()
    script.hold()
    store = await world.store(refreshers={"github": script})
    await world.expired(store)
    results = asyncio.create_task(due(store, within=60))
    await script.called.wait()
    caller = asyncio.create_task(fresh(store))
    await until_joined(store, 1)
    script.answer.set()
    assert pair(await caller) == NEW_PAIR
    assert [result.outcome for result in await results] == ["refreshed"]
    assert script.calls == 1
