"""Fifty tasks find the same access token expired, and one refresh gives all of them a valid one.

The program needs no account at a provider: it uses SQLite, and a strict token endpoint on loopback. Install `.[oauth]`.

    python examples/refresh.py
"""

from __future__ import annotations

import asyncio
import tempfile
from datetime import UTC, datetime, timedelta

from tokenstore import AuthTokenStore, Keyring, ReauthorizationRequiredError, generate_key, open_store
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.testing.provider import StrictRotatingProvider


async def call_the_api(store: AuthTokenStore, user_id: str) -> str:
    """Return a valid access token, as a task needs it before it calls the provider's API."""
    try:
        record = await store.load_fresh_tokens("strict", user_id)
    except ReauthorizationRequiredError:
        return "ask the user to log in again"
    if record is None:
        return "ask the user to log in"
    return str(record["access_token"])


async def main() -> None:
    """Fifty tasks, one expired token."""
    with tempfile.TemporaryDirectory() as folder, StrictRotatingProvider(latency=0.2) as endpoint:
        refresher = OAuth2Refresher(endpoint.token_url, endpoint.client_id, endpoint.client_secret)
        keyring = Keyring.from_string(generate_key())  # a real application stores its keys
        url = f"sqlite:///{folder}/tokens.db"
        async with open_store(url, keyring=keyring, refreshers={"strict": refresher}) as store:
            await store.setup()
            grant = endpoint.new_grant("user-123")
            expired = datetime.now(UTC) - timedelta(minutes=1)
            await store.store_tokens("strict", "user-123", grant["access_token"], grant["refresh_token"], expired)
            tokens = await asyncio.gather(*(call_the_api(store, "user-123") for _ in range(50)))
        stats = endpoint.stats()
    print(f"{len(tokens)} tasks, {len(set(tokens))} token, {stats.refreshes} refresh, {stats.reuses} reuses")


if __name__ == "__main__":
    asyncio.run(main())
