"""Several accounts of one user at one provider: each has a row of its own in every call of a store."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support.fresh_store import on_every_row
from support.keys import NORTH, SOUTH
from tokenstore import AuthTokenStore, Keyring, TamperedError
from tokenstore.records import TokenKey

ACCOUNTS = ("", "home", "work")


async def _fill(store: AuthTokenStore) -> None:
    for account in ACCOUNTS:
        await store.store_tokens("github", "u1", f"at-{account}", f"rt-{account}", None, account=account)


async def _stored(store: AuthTokenStore) -> dict[str, str]:
    """The access token of each account that has a row."""
    records = {account: await store.load_tokens("github", "u1", account=account) for account in ACCOUNTS}
    assert all(record is None or record["account"] == account for account, record in records.items())
    return {account: record["access_token"] for account, record in records.items() if record is not None}


@on_every_row
async def test_each_account_has_tokens_of_its_own(store: AuthTokenStore) -> None:
    """A write or a deletion of one account leaves the others as they are; without an account it is the empty one."""
    await _fill(store)
    assert await _stored(store) == {account: f"at-{account}" for account in ACCOUNTS}
    await store.store_tokens("github", "u1", "new", None, None, account="home")
    assert await _stored(store) == {"": "at-", "home": "new", "work": "at-work"}
    await store.store_tokens("github", "u1", "empty", None, None)
    assert await _stored(store) == {"": "empty", "home": "new", "work": "at-work"}
    assert not await store.delete_tokens("github", "u1", account="Home")
    assert await store.delete_tokens("github", "u1", account="home")
    assert not await store.delete_tokens("github", "u1", account="home")
    assert await _stored(store) == {"": "empty", "work": "at-work"}
    assert await store.delete_tokens("github", "u1")
    assert await _stored(store) == {"work": "at-work"}


@on_every_row
async def test_a_transaction_locks_and_writes_one_account(store: AuthTokenStore) -> None:
    """Another account of the same user can be written while the lock is held, except on SQLite, which has one lock."""
    await _fill(store)
    async with store.transaction() as tx:
        record = await tx.load_tokens("github", "u1", for_update=True, account="work")
        assert record is not None
        assert record["access_token"] == "at-work"
        if "SQLite" not in repr(store._backend):
            await store.store_tokens("github", "u1", "beside", None, None, account="home")
        await tx.store_tokens("github", "u1", "locked", None, None, account="work")
        await tx.delete_tokens("github", "u1", account="")
    found = await _stored(store)
    assert (found["work"], found.get("")) == ("locked", None)


@on_every_row
async def test_accounts_are_listed_in_order_and_by_pages(store: AuthTokenStore) -> None:
    """A page may begin or end within the accounts of one user; the empty account comes first."""
    keys = sorted(
        TokenKey(provider, user, account)
        for provider in ("github", "gitlab")
        for user in ("a", "b")
        for account in ("", "W", "w", "w ", "\ufb00", "😀")
    )
    for key in reversed(keys):
        await store.store_tokens(key.provider, key.user_id, "at", None, None, account=key.account)
    for page_size in (1, 4, 5, 6, 7, 23, 24, 25):
        entries = [entry async for entry in store.list_tokens(page_size=page_size)]
        assert [(entry["provider"], entry["user_id"], entry["account"]) for entry in entries] == keys
        mine = [entry async for entry in store.list_tokens(provider="gitlab", user_id="a", page_size=page_size)]
        assert [entry["account"] for entry in mine] == [key.account for key in keys if key[:2] == ("gitlab", "a")]


@on_every_row
async def test_one_account_is_resealed(store: AuthTokenStore) -> None:
    """The other accounts keep the key that sealed them."""
    backend = store._backend
    north, both = (Keyring({"north": NORTH}), Keyring({"south": SOUTH, "north": NORTH}))
    await _fill(AuthTokenStore(backend=backend, keyring=north))
    newer = AuthTokenStore(backend=backend, keyring=both)
    assert await newer.reseal_tokens("github", "u1", account="work")
    assert not await newer.reseal_tokens("github", "u1", account="work")
    assert not await newer.reseal_tokens("github", "u1", account="nothing")
    assert [entry["key_id"] async for entry in newer.list_tokens()] == ["north", "north", "south"]


@on_every_row
async def test_a_value_of_another_account_does_not_open(store: AuthTokenStore) -> None:
    """Each field is bound to its account, also that of the empty account; the error names the account."""
    await _fill(store)
    for mine, theirs in (("home", "work"), ("", "work"), ("work", "")):
        key = TokenKey("github", "u1", mine)
        rows = [await store._backend.get(one) for one in (key, TokenKey("github", "u1", theirs))]
        good, stolen = (row.tokens for row in rows if row is not None)
        named = f"user 'u1', account '{mine}'" if mine else "user 'u1' does"
        for bad in (
            replace(good, access_token=stolen.access_token),
            replace(good, refresh_token=stolen.refresh_token),
            stolen,
        ):
            await store._backend.put(key, bad)
            with pytest.raises(TamperedError, match=named):
                await store.load_tokens("github", "u1", account=mine)
        await store._backend.put(key, good)
    assert await _stored(store) == {account: f"at-{account}" for account in ACCOUNTS}


def test_the_text_of_a_key_names_the_account_only_if_there_is_one() -> None:
    assert str(TokenKey("github", "u1")) == "provider 'github', user 'u1'"
    assert str(TokenKey("github", "u1", "a\n")) == "provider 'github', user 'u1', account 'a\\n'"
