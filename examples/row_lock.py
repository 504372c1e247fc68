"""A refresh by hand, under the row lock, for applications that must change the tokens in their own transaction.

``load_fresh_tokens`` (examples/refresh.py) does more, and holds no connection or lock while the provider answers. The
program needs no account at a provider: it uses SQLite, and a strict token endpoint on loopback. Install `.[oauth]`.

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
    """There is no usable refresh token: the user has to log in again."""


async def valid_access_token(store: AuthTokenStore, endpoint: StrictRotatingProvider, user_id: str) -> str:
    """Return the user's access token, after a refresh if it has expired."""
    record = await store.load_tokens("strict", user_id)  # no lock: most of the time the token is valid
    if record is not None and store.is_access_token_valid(record):
        return str(record["access_token"])
    fresh: dict[str, Any] = {}
    try:
        async with store.transaction() as tx:
            record = await tx.load_tokens("strict", user_id, for_update=True)
            if record is None:
                raise LoginRequiredError(user_id)
            if store.is_access_token_valid(record):  # another task refreshed it during the wait
                return str(record["access_token"])
            if not store.is_refresh_token_valid(record):
                raise LoginRequiredError(user_id)
            # Less than the store's lock_timeout; otherwise tasks that wait for the lock time out before the provider.
            async with asyncio.timeout(5):
                answer = await refresh_over_http(
                    endpoint.token_url,
                    record["refresh_token"],
                    client_id=endpoint.client_id,
                    client_secret=endpoint.client_secret,
                )
            fresh = {
                "access_token": answer["access_token"],
                # A provider that does not rotate sends no refresh token: keep the old one (RFC 6749 section 6).
                "refresh_token": answer.get("refresh_token", record["refresh_token"]),
                "access_token_expires_at": datetime.now(UTC) + timedelta(seconds=answer["expires_in"]),
            }
            await tx.store_tokens("strict", user_id, **fresh)
    except BackendError:
        if not fresh:
            raise
        # The old refresh token is used up, and `fresh` is the only copy of the new one: store it on a new connection.
        await store.store_tokens("strict", user_id, **fresh)
    return str(fresh["access_token"])


async def main() -> None:
    """Fifty tasks, one expired token."""
    with tempfile.TemporaryDirectory() as folder, StrictRotatingProvider(latency=0.2) as endpoint:
        keyring = Keyring.from_string(generate_key())  # a real application stores its keys
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
