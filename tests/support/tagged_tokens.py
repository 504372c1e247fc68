"""Tokens that differ in their access token alone, which tells a test which write it sees."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from support.database import Place
from tokenstore import AuthTokenStore, Keyring, open_store

REFRESH = "ghr_plaintext_refresh"


async def store_tag(store: Any, tag: str, user_id: str = "u1") -> None:
    """Store tokens through a store or a transaction; they last an hour."""
    await store.store_tokens("github", user_id, tag, REFRESH, datetime.now(UTC) + timedelta(hours=1))


async def load_tag(store: Any, user_id: str = "u1", *, for_update: bool = False) -> str | None:
    """The access token that a store or a transaction shows."""
    record = await store.load_tokens("github", user_id, for_update)
    return None if record is None else str(record["access_token"])


async def set_up(place: Place, keyring: Keyring) -> None:
    """Create the table, and one row in it that holds "old"."""
    async with open_store(place.url, keyring=keyring) as store:
        await store.setup()
        await store_tag(store, "old")


@asynccontextmanager
async def opened(place: Place, keyring: Keyring, **options: Any) -> AsyncIterator[AuthTokenStore]:
    """A store by URL whose table exists and holds two rows, both of them "old"."""
    async with open_store(place.url, keyring=keyring, **options) as store:
        await store.setup()
        for user_id in ("u1", "u2"):
            await store_tag(store, "old", user_id)
        yield store


async def store_in_transaction(store: AuthTokenStore) -> None:
    """Store "new" in two rows, in one transaction that has locked the first."""
    async with store.transaction() as tx:
        await load_tag(tx, for_update=True)
        await tx.store_tokens("github", "u1", "new", None, None)
        await tx.store_tokens("github", "u2", "new", None, None)
