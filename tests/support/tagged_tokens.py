"""Tokens that differ only in their access token, the tag, so that a test knows which write it reads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from support.database import Place
from tokenstore import AuthTokenStore, Keyring, open_store

REFRESH = "ghr_plaintext_refresh"


async def store_tag(store: Any, tag: str, user_id: str = "u1") -> None:
    """Store tokens that expire in an hour, with a store or a transaction."""
    await store.store_tokens("github", user_id, tag, REFRESH, datetime.now(UTC) + timedelta(hours=1))


async def load_tag(store: Any, user_id: str = "u1", *, for_update: bool = False) -> str | None:
    """Return the access token that a store or a transaction reads."""
    record = await store.load_tokens("github", user_id, for_update)
    return None if record is None else str(record["access_token"])


async def set_up(place: Place, keyring: Keyring) -> None:
    """Create the table, with one row that has the tag "old"."""
    async with open_store(place.url, keyring=keyring) as store:
        await store.setup()
        await store_tag(store, "old")


@asynccontextmanager
async def opened(place: Place, keyring: Keyring, **options: Any) -> AsyncIterator[AuthTokenStore]:
    """Open a store by URL; its table has two rows with the tag "old"."""
    async with open_store(place.url, keyring=keyring, **options) as store:
        await store.setup()
        for user_id in ("u1", "u2"):
            await store_tag(store, "old", user_id)
        yield store


async def store_in_transaction(store: AuthTokenStore) -> None:
    """Store the tag "new" in two rows, in a transaction that locks the first one before."""
    async with store.transaction() as tx:
        await load_tag(tx, for_update=True)
        await tx.store_tokens("github", "u1", "new", None, None)
        await tx.store_tokens("github", "u2", "new", None, None)
