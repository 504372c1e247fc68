"""Tokens that the provider issues without a refresh token: once for all, also for a row that does not exist."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest

from support.refresh_world import World, on_every_row, on_memory, on_rows, settled
from support.refreshers import Script, pair
from tokenstore import (
    AuthTokenStore,
    ConfigurationError,
    InsufficientScopeError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    TokenRecord,
)
from tokenstore.integrations.machine import ClientCredentials
from tokenstore.records import EMPTY_ROW_LIFETIME, TokenKey, empty_tokens

ISSUED: Mapping[str, Any] = {"access_token": "issued-access-secret", "expires_in": 3600}
KEY = TokenKey("github", "u1")


class Issuer(Script):
    """A refresh callable that issues tokens."""

    issues = True


def client_of(world: World, **options: Any) -> ClientCredentials:
    provider = world.provider
    return ClientCredentials(provider.token_url, provider.client_id, provider.client_secret, **options)


async def listed(store: AuthTokenStore) -> list[str]:
    return [entry["status"] async for entry in store.list_tokens()]


@on_every_row
async def test_a_missing_row_gets_tokens_once_for_all_callers(world: World) -> None:
    """Two stores with 25 callers each, as in two processes. Until the provider answers, no call sees the row."""
    stores = [await world.store(refreshers={"github": client_of(world)}) for _ in range(2)]
    with world.provider.hold():
        callers = [asyncio.create_task(store.load_fresh_tokens("github", "u1")) for store in stores for _ in range(25)]
        await world.requests(1)
        row = await world.sealed()
        assert row is not None
        assert row.tokens.is_empty
        assert await stores[0].load_tokens("github", "u1") is None
        assert await listed(stores[0]) == []
    records = await asyncio.gather(*callers)
    assert world.provider.stats().issues == 1
    tokens = {record["access_token"] for record in records if record is not None}
    assert len(records) == 50
    assert tokens == {(await world.stored())["access_token"]}
    assert await listed(stores[0]) == ["valid"]


@on_every_row
async def test_an_expired_token_is_issued_anew(world: World) -> None:
    """The status says that the next load gets another token; a forced load does so at once."""
    past = {"access_token": "first", "expires_at": "2001-01-01T00:00:00Z"}
    issuer = Issuer(past, *({**ISSUED, "access_token": name} for name in ("second", "third")))
    store = await world.store(refreshers={"github": issuer})
    first = await store.load_fresh_tokens("github", "u1", missing="raise")
    assert first["refresh_token"] is None
    assert await listed(store) == ["expired"]
    assert [entry["user_id"] async for entry in store.list_tokens(status="reauthorization_required")] == []
    second = await store.load_fresh_tokens("github", "u1", missing="raise")
    third = await store.load_fresh_tokens("github", "u1", force=True, missing="raise")
    assert [record["access_token"] for record in (first, second, third)] == ["first", "second", "third"]
    assert (await store.load_fresh_tokens("github", "u1", missing="raise"))["access_token"] == "third"
    assert issuer.calls == 3


@on_memory
async def test_a_refresher_gets_a_record_without_tokens_at_first(world: World) -> None:
    """It has all keys of a record that is loaded."""
    seen: list[TokenRecord] = []

    async def issue(record: TokenRecord) -> Mapping[str, Any]:
        seen.append(record)
        return ISSUED

    issue.issues = True  # type: ignore[attr-defined]
    store = await world.store(refreshers={"github": issue})
    loaded = await store.load_fresh_tokens("github", "u1", account="work", missing="raise")
    [given] = seen
    assert given.keys() == loaded.keys()
    assert (given["provider"], given["user_id"], given["account"]) == ("github", "u1", "work")
    assert (given["access_token"], given["refresh_token"], given["extra"]) == ("", None, {})


@on_rows("memory", "postgresql+asyncpg")
async def test_a_failed_issue_leaves_an_empty_row_that_nobody_sees(world: World) -> None:
    """The failure is shared: the provider is not called again before its time. An operator can clear it."""
    issuer = Issuer(ProviderRefusedError("wrong secret", code="invalid_client"), ISSUED)
    store = await world.store(refreshers={"github": issuer})
    for _ in range(2):
        with pytest.raises(ProviderRefusedError, match="invalid_client"):
            await store.load_fresh_tokens("github", "u1")
    assert issuer.calls == 1
    assert await store.load_tokens("github", "u1") is None
    assert await listed(store) == []
    assert await store.clear_failure("github", "u1")
    record = await store.load_fresh_tokens("github", "u1", missing="raise")
    assert record["access_token"] == ISSUED["access_token"]


@on_memory
@pytest.mark.parametrize("stored", [False, True])
async def test_no_failure_of_issued_tokens_is_for_good(world: World, stored: bool) -> None:
    """There is no refresh token that a login could replace: a refusal in any spelling is one of the client."""
    issuer = Issuer(ReauthorizationRequiredError("no", code="invalid_grant"), ISSUED)
    store = await world.store(refreshers={"github": issuer})
    if stored:
        await store.store_tokens("github", "u1", "old", None, world.at(-1))
    with pytest.raises(ProviderRefusedError, match="invalid_grant"):
        await store.load_fresh_tokens("github", "u1")
    row = await world.sealed()
    assert row is not None
    assert row.failure is not None
    assert row.failure.retry_in is not None
    world.ahead += 61
    record = await store.load_fresh_tokens("github", "u1", missing="raise")
    assert (record["access_token"], issuer.calls) == (ISSUED["access_token"], 2)


@on_rows("memory", "sqlite", "postgresql+psycopg", "mariadb+aiomysql")
async def test_every_other_call_takes_an_empty_row_for_none(world: World) -> None:
    issuer = Issuer(ProviderUnavailableError("down"))
    store = await world.store(refreshers={"issued": issuer, "github": Script()})

    async def leave_an_empty_row(user: str) -> None:
        with pytest.raises(ProviderUnavailableError):
            await store.load_fresh_tokens("github", user, refresh=issuer)

    for user in ("u1", "u2", "u3"):
        await leave_an_empty_row(user)
    assert await store.load_fresh_tokens("github", "u1") is None
    assert await store.load_fresh_tokens("github", "u1", force=True) is None
    assert not await store.reseal_tokens("github", "u1")
    async with store.transaction() as transaction:
        assert await transaction.load_tokens("github", "u1", for_update=True) is None
    assert await store.store_tokens("github", "u1", "a", "r", world.at(3600), if_absent=True)
    assert not await store.store_tokens("github", "u1", "b", "r", world.at(3600), if_absent=True)
    assert (await world.stored())["access_token"] == "a"
    assert (await store.store_token_response("github", "u2", {"access_token": "login"}))["access_token"] == "login"
    async with store.transaction() as transaction:
        record = await transaction.store_token_response("github", "u3", {"access_token": "login"}, if_absent=True)
    assert record["access_token"] == "login"


@on_rows("memory", "sqlite", "postgresql+asyncpg", "mariadb+asyncmy")
async def test_tokens_stored_during_an_issue_win(world: World) -> None:
    """The token that the provider issues afterwards replaces nothing; the callers get the stored one."""
    issued, answered = asyncio.Event(), asyncio.Event()

    async def issue(_: TokenRecord) -> Mapping[str, Any]:
        issued.set()
        await answered.wait()
        return ISSUED

    issue.issues = True  # type: ignore[attr-defined]
    store = await world.store(refreshers={"github": issue})
    caller = asyncio.create_task(store.load_fresh_tokens("github", "u1"))
    await issued.wait()
    assert await store.store_tokens("github", "u1", "imported", "r", world.at(3600), if_absent=True)
    answered.set()
    record = await caller
    assert record is not None
    assert pair(record) == pair(await world.stored()) == ("imported", "r")


@on_rows("memory", "sqlite", "postgresql+asyncpg", "mariadb+aiomysql")
async def test_a_row_that_is_deleted_during_an_issue_gets_tokens_again(world: World) -> None:
    calls = 0

    async def issue(_: TokenRecord) -> Mapping[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 1:
            assert await store.delete_tokens("github", "u1")
        return {**ISSUED, "access_token": f"issued {calls}"}

    issue.issues = True  # type: ignore[attr-defined]
    store = await world.store(refreshers={"github": issue})
    record = await store.load_fresh_tokens("github", "u1", missing="raise")
    assert (record["access_token"], calls) == ("issued 2", 2)


@on_every_row
async def test_a_sweep_renews_issued_tokens_and_deletes_old_empty_rows(world: World) -> None:
    """The sweep keeps an empty row whose lease a refresh holds, and yields no result for empty rows."""
    issuer = Issuer(ISSUED)
    store = await world.store(refreshers={"github": issuer})
    backend = world.backend()
    now = await backend.clock()
    for user, deleted_at in (("old", now - 1), ("leased", now - 1), ("new", now + 1_000_000_000)):
        assert await backend.insert(TokenKey("github", user), empty_tokens(deleted_at))
    leased = await backend.get(TokenKey("github", "leased"))
    assert leased is not None
    assert await backend.claim_lease(leased.key, generation=leased.generation, holder="h", duration=60.0)
    _ = await store.load_fresh_tokens("github", "u1")
    results = [(result.user_id, result.outcome) async for result in store.refresh_due(within=7200)]
    assert results == [("u1", "refreshed")]
    assert issuer.calls == 2
    assert await backend.get(TokenKey("github", "old")) is None
    for user in ("leased", "new"):
        assert await backend.get(TokenKey("github", user)) is not None
    await backend.aclose()


@on_memory
async def test_an_empty_row_may_be_deleted_after_a_day(world: World) -> None:
    store = await world.store(refreshers={"github": Issuer(ProviderUnavailableError("down"))})
    with pytest.raises(ProviderUnavailableError):
        await store.load_fresh_tokens("github", "u1")
    [row] = await world.backend().scan_due(provider="github", within=EMPTY_ROW_LIFETIME, limit=2)
    assert row.is_empty
    world.ahead += EMPTY_ROW_LIFETIME - 60
    assert [result async for result in store.refresh_due(within=0)] == []
    assert await world.sealed() is not None
    world.ahead += 61
    assert [result async for result in store.refresh_due(within=0)] == []
    assert await world.sealed() is None


@on_memory
async def test_a_sweep_issues_nothing_for_a_row_that_was_deleted(world: World) -> None:
    issuer = Issuer(ISSUED)
    store, interceptor = await world.intercepted(issuer)
    await store.store_tokens("github", "u1", "a", "r", world.at(-1))

    async def delete(*_: object) -> None:
        await world.backend().delete(KEY)

    interceptor.before["get"] = delete
    assert [result.outcome async for result in store.refresh_due(within=0)] == ["gone"]
    assert issuer.calls == 0


@on_memory
async def test_an_issued_token_within_its_margin_is_renewed_in_the_background(world: World) -> None:
    issuer = Issuer(ISSUED, {**ISSUED, "access_token": "second"})
    store = await world.store(refreshers={"github": issuer})
    first = await store.load_fresh_tokens("github", "u1", missing="raise")
    world.ahead += 3500
    second = await store.load_fresh_tokens("github", "u1", missing="raise")
    assert second["access_token"] == first["access_token"]
    await settled(store)
    assert (await world.stored())["access_token"] == "second"


@on_memory
async def test_tokens_for_another_audience_are_not_used(world: World) -> None:
    """Two audiences are two rows; a lack of scopes shows where the response names none."""
    first, second = client_of(world, audience="https://a", scope="read"), client_of(world, audience="https://b")
    store = await world.store(refreshers={"github": first})
    record = await store.load_fresh_tokens("github", "u1", missing="raise")
    assert record["extra"]["audience"] == "https://a"
    again = await store.load_fresh_tokens("github", "u1", scopes=["read"], missing="raise")
    assert again["access_token"] == record["access_token"]
    with pytest.raises(ConfigurationError, match="another audience"):
        await store.load_fresh_tokens("github", "u1", refresh=second)
    other = await store.load_fresh_tokens("github", "u1", account="b", refresh=second, missing="raise")
    assert other["access_token"] != record["access_token"]
    with pytest.raises(InsufficientScopeError, match="write"):
        await store.load_fresh_tokens("github", "u1", scopes=["write"])


@on_memory
async def test_a_lifetime_that_no_response_tells_is_the_refreshers(world: World) -> None:
    issuer = Issuer({"access_token": "a"}, {"access_token": "b"})
    issuer.max_lifetime = timedelta(hours=1)  # type: ignore[attr-defined]
    store = await world.store(refreshers={"github": issuer})
    first = await store.load_fresh_tokens("github", "u1", missing="raise")
    assert not first["access_token_expiry_known"]
    world.ahead += 3601
    second = await store.load_fresh_tokens("github", "u1", missing="raise")
    assert (first["access_token"], second["access_token"]) == ("a", "b")
