"""A refresh by hand, under the row lock: for whoever has to change the tokens in a transaction of their own.

``load_fresh_tokens`` (examples/refresh.py) does more, and holds nothing while the provider answers. Runs as it stands:
SQLite, and a strict token endpoint on loopback in place of a provider.

    python examples/row_lock.py
"""

from __future__ import annotations

import asyncio
import tempfile
from datetime import UTC, datetime, timedelta
from typing import Any

from tokenstore import AuthTokenStore, BackendError, Keyring, generate_key, open_store
from tokenstore.testing.provider import StrictRotatingProvider, refresh_over_http


class LoginRequiredError(Exception):
    """No refresh token is left that could be used: the user has to grant access again."""


async def valid_access_token(store: AuthTokenStore, endpoint: StrictRotatingProvider, user_id: str) -> str:
    """The user's access token, refreshed if it has to be."""
    record = await store.load_tokens("strict", user_id)  # no lock: most of the time the token is valid
    if record is not None and store.is_access_token_valid(record):
        return str(record["access_token"])
    fresh: dict[str, Any] = {}
    try:
        async with store.transaction() as tx:
            record = await tx.load_tokens("strict", user_id, for_update=True)
            if record is None:
                raise LoginRequiredError(user_id)
            if store.is_access_token_valid(record):  # somebody else refreshed it while this task waited for the lock
                return str(record["access_token"])
            if not store.is_refresh_token_valid(record):
                raise LoginRequiredError(user_id)
            # Less than the store's lock_timeout, or those who wait for the lock give up before the provider does.
            async with asyncio.timeout(5):
                answer = await refresh_over_http(
                    endpoint.token_url,
                    record["refresh_token"],
                    client_id=endpoint.client_id,
                    client_secret=endpoint.client_secret,
                )
            fresh = {
                "access_token": answer["access_token"],
                # A provider that does not rotate sends none: the old one stays (RFC 6749 section 6).
                "refresh_token": answer.get("refresh_token", record["refresh_token"]),
                "access_token_expires_at": datetime.now(UTC) + timedelta(seconds=answer["expires_in"]),
            }
            await tx.store_tokens("strict", user_id, **fresh)
    except BackendError:
        if not fresh:
            raise
        # The old refresh token is spent, and this is the only copy of its successor: once more, on a new connection.
        await store.store_tokens("strict", user_id, **fresh)
    return str(fresh["access_token"])


async def main() -> None:
    """Fifty tasks, one expired token."""
    with tempfile.TemporaryDirectory() as folder, StrictRotatingProvider(latency=0.2) as endpoint:
        keyring = Keyring.from_string(generate_key())  # a real application's keys outlive it
        async with open_store(f"sqlite:///{folder}/tokens.db", keyring=keyring) as store:
            await store.setup()
            grant = endpoint.new_grant("user-123")
            expired = datetime.now(UTC) - timedelta(minutes=1)
            await store.store_tokens("strict", "user-123", grant["access_token"], grant["refresh_token"], expired)
            tokens = await asyncio.gather(*(valid_access_token(store, endpoint, "user-123") for _ in range(50)))
        stats = endpoint.stats()
    print(f"{len(tokens)} tasks, {len(set(tokens))} token, {stats.refreshes} refresh, {stats.reuses} reuses")


if __name__ == "__main__":
    asyncio.run(main())
