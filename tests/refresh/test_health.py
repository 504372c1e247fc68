"""The health of a connection: its status, searches for it, and what ends a failure."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.refresh_world import World, on_every_row, on_memory, settled
from support.refreshers import NEW, NEW_PAIR, OLD, Script, pair
from support.store_calls import fresh
from tokenstore import (
    AuthTokenStore,
    InvalidInputError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
    TokenEntry,
    TokenRecord,
)
from tokenstore.health import STATUSES, after_prefix
from tokenstore.records import TokenKey

HOUR = 3600.0


async def entries(store: AuthTokenStore, **filters: Any) -> dict[str, TokenEntry]:
    """The entries of the list, by user id."""
    return {entry["user_id"]: entry async for entry in store.list_tokens(**filters)}


async def fill(world: World, store: AuthTokenStore) -> dict[str, str]:
    """Store a row of each status, and rows with borderline values; return their statuses by user id."""

    async def put(user: str, expires_in: float | None, refresh_token: str | None = "rt", **more: Any) -> None:
        expiry = None if expires_in is None else world.at(expires_in)
        await store.store_tokens("github", user, "at", refresh_token, expiry, **more)

    await put("valid", HOUR)
    await put("valid-for-ever", None)
    await put("valid-without-refresh-token", HOUR, None)
    await put("valid-with-dead-refresh-token", HOUR, refresh_token_expires_at=world.at(-1))
    await store.store_token_response("github", "valid-unknown", {"access_token": "at"})
    await put("expiring", 200)
    await put("expired", -1)
    await put("reauthorization_required-none", -1, None)
    await put("reauthorization_required-ended", -1, refresh_token_expires_at=world.at(-1))
    failures: dict[str, RefreshError] = {
        "reauthorization_required": ReauthorizationRequiredError("no"),
        "refused": ProviderRefusedError("no", code="invalid_client", retry_after=600),
        "expired-retry-time-passed": ProviderUnavailableError("no", retry_after=0),
        "retrying": ProviderUnavailableError("no", code="http_503", retry_after=600),
    }
    for user, error in failures.items():
        await put(user, -1)
        with pytest.raises(type(error)):
            await store.load_fresh_tokens("github", user, refresh=Script(error))
    await put("refreshing", -1)
    row = await world.sealed("refreshing")
    assert row is not None
    backend = world.backend()
    assert await backend.claim_lease(
        TokenKey("github", "refreshing"), generation=row.generation, holder="h", duration=600
    )
    await backend.aclose()
    statuses = {
        user: max((status for status in STATUSES if user.startswith(status)), key=len) for user in await entries(store)
    }
    assert set(statuses.values()) == STATUSES
    return statuses


@on_every_row
async def test_each_row_has_a_status_by_which_it_is_found(world: World) -> None:
    """A search returns the rows of the whole list that match, in its order."""
    store = await world.store(refreshers={})
    expected = await fill(world, store)
    all_entries = await entries(store)
    assert {user: entry["status"] for user, entry in all_entries.items()} == expected
    for status in STATUSES:
        found = await entries(store, status=status, provider="github")
        assert list(found) == [user for user in expected if expected[user] == status]
        assert {user: all_entries[user] | {} for user in found} == found
        assert await entries(store, status=status, provider="gitlab") == {}
        assert list(await entries(store, status=status, user_id="refused")) == ["refused"] * (status == "refused")
    assert list(await entries(store, user_prefix="valid-")) == [user for user in expected if user.startswith("valid-")]
    assert list(await entries(store, user_prefix="v", status="valid", expiring_within=7200)) == [
        user for user in expected if expected[user] == "valid" and all_entries[user]["access_token_expires_at"]
    ]
    soon = await entries(store, expiring_within=timedelta(seconds=300))
    assert set(soon) == {user for user in expected if not user.startswith("valid")}


@on_every_row
async def test_a_failure_is_shown(world: World) -> None:
    """Its code, without the mark of a refusal, and its times by the database's clock. New tokens end it."""
    store = await world.store(refreshers={})
    await fill(world, store)
    found = await entries(store)
    codes = {user: entry["failure_code"] for user, entry in found.items() if entry["failure_code"] is not None}
    assert codes == {
        "reauthorization_required": "invalid_grant",
        "refused": "invalid_client",
        "retrying": "http_503",
        "expired-retry-time-passed": "temporarily_unavailable",
    }
    for user, entry in found.items():
        failed_at, retry_at = entry["failed_at"], entry["retry_at"]
        assert (failed_at is not None) is (user in codes)
        if user in ("refused", "retrying"):
            assert failed_at is not None
            assert retry_at is not None
            assert abs((retry_at - failed_at).total_seconds() - 600) < 1
            assert abs((failed_at - world.at(0)).total_seconds()) < 30
        elif user == "reauthorization_required":
            assert retry_at is None
    await store.store_tokens("github", "refused", *OLD, world.at(HOUR))
    [entry] = (await entries(store, user_id="refused")).values()
    assert (entry["status"], entry["failure_code"], entry["failed_at"]) == ("valid", None, None)


@on_memory
async def test_a_search_reads_page_after_page(world: World) -> None:
    """The rows that it finds are far apart, and some pages have none."""
    store = await world.store(refreshers={})
    for number in range(30):
        await store.store_tokens("github", f"u{number:02}", *OLD, world.at(-1 if number in (3, 17, 29) else HOUR))
    backend: Any = store._backend
    search, ends = backend.search, []

    async def narrow(where: Any, *, limit: int, **rest: Any) -> Any:
        page = await search(where, limit=4, **rest)
        ends.append(page.end)
        return page

    backend.search = narrow
    assert list(await entries(store, status="expired")) == ["u03", "u17", "u29"]
    assert len(ends) == 8


@pytest.mark.parametrize(
    "filters",
    [
        {"status": "dead"},
        {"status": ""},
        {"status": 7},
        {"expiring_within": -1},
        {"expiring_within": "5"},
        {"user_prefix": ""},
        {"user_prefix": "a\0"},
        {"user_prefix": 7},
        {"user_prefix": "x" * 513},
    ],
)
@on_memory
async def test_filters_that_find_nothing_are_refused(world: World, filters: dict[str, Any]) -> None:
    store = await world.store()
    with pytest.raises(InvalidInputError):
        await entries(store, **filters)


@given(prefix=st.text(min_size=1, max_size=4), text=st.text(max_size=6))
def test_the_end_of_a_prefix(prefix: str, text: str) -> None:
    """The texts with the prefix are those from the prefix on, before its end."""
    end = after_prefix(prefix)
    for one in (text, prefix + text):
        assert one.startswith(prefix) is (one >= prefix and (end is None or one < end))
    if end is not None:
        _ = end.encode()


# -- what ends a failure -----------------------------------------------------------------------------


@on_every_row
async def test_a_cleared_failure_lets_the_provider_be_called(world: World) -> None:
    """Also if the failure was for good; the row is due for a sweep again. Nothing else of the row changes."""
    for error in (
        ReauthorizationRequiredError("no"),
        ProviderRefusedError("no", retry_after=600),
        ProviderUnavailableError("no", retry_after=600),
    ):
        script = Script(error, NEW)
        store = await world.store(refreshers={"github": script})
        before = await world.expired(store)
        assert await store.clear_failure("github", "u1") is False
        with pytest.raises(type(error)):
            await fresh(store)
        assert await store.clear_failure("github", "nobody") is False
        assert await store.clear_failure("github", "u1", account="work") is False
        assert await store.clear_failure("github", "u1") is True
        assert await world.stored() == before
        other = await world.store(refreshers={"github": script})  # its calls of the provider are not paused
        assert [result.outcome async for result in other.refresh_due(within=60)] == ["refreshed"]
        assert pair(await fresh(other)) == NEW_PAIR
        assert script.calls == 2


@on_every_row
async def test_force_calls_a_provider_again_that_has_refused_the_client(world: World) -> None:
    """But not within the shortest age, and not if the user has to log in again or the provider is down."""
    script = Script(ProviderRefusedError("no", code="invalid_client", retry_after=600), NEW)
    store = await world.store(refreshers={"github": script})
    generation = (await world.expired(store))["generation"]
    calls: list[dict[str, Any]] = [{}, {}, {"force": True, "force_min_age": 60}]
    for call in calls:
        with pytest.raises(ProviderRefusedError):
            await fresh(store, **call)
    assert script.calls == 1
    records = await asyncio.gather(*(fresh(store, force=True, generation=generation) for _ in range(5)))
    assert {pair(record) for record in records} == {NEW_PAIR}
    assert script.calls == 2
    for error in (ReauthorizationRequiredError("no"), ProviderUnavailableError("no", retry_after=600)):
        script = Script(error, NEW)
        await world.expired(store)
        for force in (False, True):
            with pytest.raises(type(error)):
                await fresh(store, refresh=script, force=force)
        assert script.calls == 1


@on_every_row
async def test_on_recovered(world: World) -> None:
    """It is called in the process that refreshed, after a failure that was over, was cleared, or was overruled."""
    recovered: list[TokenRecord] = []
    script = Script(
        NEW,
        ProviderUnavailableError("no", retry_after=0),
        NEW,
        ProviderRefusedError("no", retry_after=600),
        NEW,
        NEW,
    )
    store = await world.store(refreshers={"github": script}, on_recovered=recovered.append)
    await world.expired(store)
    await fresh(store)
    for error, force in ((ProviderUnavailableError, False), (ProviderRefusedError, True)):
        await world.expired(store)
        with pytest.raises(error):
            await fresh(store)
        assert recovered == []
        record = await fresh(store, force=force)
        await settled(store)
        assert [one["generation"] for one in recovered] == [record["generation"]]
        assert pair(recovered.pop()) == NEW_PAIR
    await world.expired(store)
    await fresh(store)
    await settled(store)
    assert (recovered, script.calls) == ([], 6)
