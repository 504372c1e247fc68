"""Listing: order and pages, also while rows change."""

from __future__ import annotations

from typing import Any

from support.fresh_store import on_every_row
from tokenstore import AuthTokenStore, Keyring
from tokenstore.listing import scan_providers

ACCESS, REFRESH, SCOPE = "gho_access-secret", "ghr_refresh-secret", "repo-secret"
NORTH, SOUTH = bytes(range(32)), bytes(range(32, 64))


@on_every_row
async def test_listing_returns_rows_in_order_without_tokens(store: AuthTokenStore) -> None:
    """Rows are selected by user, by provider or all, in the order of UTF-8 bytes; no sealed value is opened."""
    keys = [(provider, user) for provider in ("github", "gitlab", "é") for user in ("Z", "a", "b", "ß", "😀")]
    for provider, user in keys:
        await store.store_tokens(provider, user, ACCESS, None if user == "a" else REFRESH, None)

    async def listed(**options: Any) -> list[tuple[str, str]]:
        return [(entry["provider"], entry["user_id"]) async for entry in store.list_tokens(**options)]

    for page_size in (1, 2, 3, 15, 16, 500):
        assert await listed(page_size=page_size) == keys
        assert await listed(provider="gitlab", page_size=page_size) == [key for key in keys if key[0] == "gitlab"]
        assert await listed(user_id="ß", page_size=page_size) == [key for key in keys if key[1] == "ß"]
        assert await listed(provider="é", user_id="b", page_size=page_size) == [("é", "b")]
    assert await listed(provider="none") == []
    blind = AuthTokenStore(backend=store._backend, keyring=Keyring({"other": SOUTH}))
    entries = [entry async for entry in blind.list_tokens(user_id="a")]
    assert [entry["has_refresh_token"] for entry in entries] == [False] * 3
    assert all(blind.needs_reseal(entry) and not store.needs_reseal(entry) for entry in entries)
    assert ACCESS not in repr(entries)


@on_every_row
async def test_rows_may_change_while_they_are_listed(store: AuthTokenStore) -> None:
    """The next page starts after the last row even if that row was deleted, and contains rows that were added."""
    for user in "bdfh":
        await store.store_tokens("github", user, "at", None, None)
    seen = []
    async for entry in store.list_tokens(page_size=1):
        seen.append(entry["user_id"])
        if entry["user_id"] == "d":
            await store.delete_tokens("github", "d")
            await store.delete_tokens("github", "f")
            await store.store_tokens("github", "a", "at", None, None)
            await store.store_tokens("github", "g", "at", None, None)
    assert seen == ["b", "d", "g", "h"]


@on_every_row
async def test_providers_are_found_without_reading_all_their_rows(store: AuthTokenStore) -> None:
    """Providers come in the order of UTF-8 bytes; a user id may be the last one that is possible."""
    last = "\U0010ffff" * 128
    names = ["GitHub", "github", "github!", "é", "\ufb00", "😀"]
    backend: Any = store._backend
    for name in reversed(names):
        for user in ("a", "b", last):
            for account in ("", "\U0010ffff" * 63 + "\uffff"):
                await store.store_tokens(name, user, ACCESS, None, None, account=account)
    assert [name async for name in scan_providers(backend)] == names
