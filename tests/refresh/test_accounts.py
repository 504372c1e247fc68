"""Several accounts of one user at one provider are refreshed and revoked each for itself."""

from __future__ import annotations

import asyncio

import pytest

from support.observer import Observer
from support.refresh_world import World, on_every_row, on_memory
from support.refreshers import NEW_PAIR, OLD, Gone, Revoker, Script, pair
from support.store_calls import due, fresh
from tokenstore import AuthTokenStore, ProviderCallFailure, ReauthorizationRequiredError, TokenRecord

HOUR = 3600.0


async def _log_in(world: World, store: AuthTokenStore, *accounts: str) -> None:
    """Store a grant with an expired access token for each account of the user."""
    for account in accounts:
        grant = world.provider.new_grant(f"u1/{account}")
        tokens = grant["access_token"], grant["refresh_token"]
        await store.store_tokens("github", "u1", *tokens, world.at(-1.0), account=account, extra={"expires_in": 3600})


@on_every_row
async def test_two_accounts_that_are_refreshed_at_once_get_a_pair_each(world: World) -> None:
    """Two machines with several callers each: the provider is called once for each account."""
    one, two = await world.store(), await world.store()
    await _log_in(world, one, "", "work")
    before = {account: pair(await fresh_row(world, account)) for account in ("", "work")}
    records = await asyncio.gather(
        *(fresh(store, account=account) for account in ("", "work") for store in (one, two) for _ in range(3))
    )
    empty, work = records[:6], records[6:]
    assert {record["account"] for record in empty} == {""}
    assert {record["account"] for record in work} == {"work"}
    pairs = {pair(record) for record in empty}, {pair(record) for record in work}
    assert [len(one) for one in pairs] == [1, 1]
    assert pairs[0] != pairs[1]
    assert pairs[0] == {pair(await fresh_row(world, ""))} != {before[""]}
    assert pairs[1] == {pair(await fresh_row(world, "work"))} != {before["work"]}
    assert world.provider.stats().refreshes_by_user == {"u1/": 1, "u1/work": 1}


async def fresh_row(world: World, account: str) -> TokenRecord:
    """The record that a new store reads for an account."""
    store = await world.store()
    record = await store.load_tokens("github", "u1", account=account)
    assert record is not None
    return record


@on_every_row
async def test_refresh_due_refreshes_each_account(world: World) -> None:
    """Each result names the account."""
    store = await world.store()
    await _log_in(world, store, "", "home", "work")
    results = await due(store, within=60, page_size=2)
    assert sorted((one.user_id, one.account, one.outcome) for one in results) == [
        ("u1", account, "refreshed") for account in ("", "home", "work")
    ]
    assert world.provider.stats().refreshes_by_user == {"u1/": 1, "u1/home": 1, "u1/work": 1}


@on_every_row
async def test_one_account_is_revoked(world: World) -> None:
    """The tokens of the other account stay valid."""
    store = await world.store()
    await _log_in(world, store, "", "work")
    assert await store.revoke_tokens("github", "u1", account="work")
    assert await store.load_tokens("github", "u1", account="work") is None
    assert not await store.revoke_tokens("github", "u1", account="work")
    assert world.provider.stats().revoked_grants == 1
    assert (await fresh(store))["account"] == ""


@on_memory
async def test_a_failure_names_its_account_everywhere(world: World, seen: Observer) -> None:
    """The row, the error, the callbacks, the refresher's record and the log; the other account has no failure."""
    failures: list[ProviderCallFailure] = []
    told_of: list[ReauthorizationRequiredError] = []
    accounts: list[str] = []
    script = Script(ReauthorizationRequiredError("gone"))

    async def refresh(record: TokenRecord) -> object:
        accounts.append(record["account"])
        return await script(record)

    store = await world.store(
        refreshers={"github": refresh}, on_error=failures.append, on_reauthorization_required=told_of.append
    )
    for account in ("", "work\n"):
        await store.store_tokens("github", "u1", *OLD, world.at(-1.0), account=account)
    with pytest.raises(ReauthorizationRequiredError, match=r"user 'u1', account 'work\\n': there is no") as caught:
        await fresh(store, account="work\n")
    await store.aclose()
    assert (caught.value.provider, caught.value.user_id, caught.value.account) == ("github", "u1", "work\n")
    assert accounts == ["work\n"]
    assert [(one.user_id, one.account) for one in failures] == [("u1", "work\n")]
    assert [(one.user_id, one.account) for one in told_of] == [("u1", "work\n")]
    [log] = [one for one in seen.records if one.levelname == "WARNING"]
    assert vars(log)["tokenstore_account"] == "work\\n"
    assert "account 'work\\n'" in log.getMessage()
    assert "\n" not in log.getMessage()
    row = await world.sealed()
    assert row is not None
    assert row.failure is None


@on_memory
async def test_on_error_names_the_account_of_a_revocation(world: World) -> None:
    failures: list[ProviderCallFailure] = []
    store = await world.store(refreshers={"github": Revoker(Gone("secret"))}, on_error=failures.append)
    await store.store_tokens("github", "u1", *NEW_PAIR, None, account="work")
    with pytest.raises(Exception, match="account 'work': the tokens could not be revoked"):
        await store.revoke_tokens("github", "u1", account="work")
    await store.aclose()
    assert [(one.user_id, one.account, one.operation) for one in failures] == [("u1", "work", "revoke")]
