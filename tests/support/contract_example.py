"""The example of the documentation word for word, with a provider and an application's engine to run it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from secrets import token_hex
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from support.database import Place, app_engine
from tokenstore import AuthTokenStore, Keyring, open_store


class CountingProvider:
    """Counts its refreshes; a refresh with an old refresh token fails."""

    def __init__(self, *, fails: bool = False) -> None:
        self.current = "ghr_xyz"
        self.calls = 0
        self.fails = fails

    async def refresh(self, refresh_token: str) -> dict[str, Any]:
        self.calls += 1
        assert refresh_token == self.current, "a refresh token was used twice"
        await asyncio.sleep(0)
        if self.fails:
            raise ConnectionError("the provider is unavailable")
        self.current = f"ghr_{token_hex(4)}"
        return {
            "access_token": f"gho_{self.calls}",
            "refresh_token": self.current,
            "expires_at": datetime.utcnow() + timedelta(hours=8),
        }


async def refresh_as_in_the_contract(store: AuthTokenStore, provider: CountingProvider) -> None:
    """Load for update, refresh, store: the three steps, word for word."""
    record = await store.load_tokens(provider="github", user_id="user-123", for_update=True)
    if record and not store.is_access_token_valid(record) and store.is_refresh_token_valid(record):
        assert record["refresh_token"] is not None
        new = await provider.refresh(record["refresh_token"])
        await store.store_tokens(
            provider="github",
            user_id="user-123",
            access_token=new["access_token"],
            refresh_token=new["refresh_token"],
            access_token_expires_at=new["expires_at"],
        )


async def store_as_in_the_contract(store: AuthTokenStore, *, expired: bool = True) -> None:
    await store.store_tokens(
        provider="github",
        user_id="user-123",
        access_token="gho_abc",
        refresh_token="ghr_xyz",
        access_token_expires_at=datetime.utcnow() + timedelta(hours=-1 if expired else 8),
        refresh_token_expires_at=datetime.utcnow() + timedelta(days=180),
    )


@asynccontextmanager
async def app(place: Place, keyring: Keyring, **arguments: Any) -> AsyncIterator[tuple[AsyncEngine, AuthTokenStore]]:
    """Make an application's engine, and a store with its own connections to look at the rows; creates the table."""
    async with (
        open_store(place.url, keyring=keyring, lock_timeout=2) as other,
        app_engine(place, **arguments) as engine,
    ):
        await other.setup()
        yield engine, other


async def seen(other: AuthTokenStore, user_id: str = "user-123") -> str | None:
    """Return the access token that another process reads; fails if a lock was left behind."""
    async with other.transaction() as tx:
        record = await tx.load_tokens("github", user_id, for_update=True)
    return None if record is None else str(record["access_token"])
