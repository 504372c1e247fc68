"""Refreshes through several stores over several servers of one database, of which some may be killed meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from support.refreshers import Refresher, pair
from support.store_calls import fresh, load
from tokenstore import AuthTokenStore, BackendError, RefreshableRecord, TokenRecord, TokensNotStoredError
from tokenstore.testing.provider import StrictRotatingProvider

T = TypeVar("T")

_AN_HOUR = timedelta(hours=1)
_PAUSE = 0.05
# Seconds.
_CATCH_UP = 10.0


class ClusterTraffic(Refresher):
    """Users whose tokens expire again and again, and callers in all stores that want valid ones.

    The newest pair of a user is known here, and not read from a store: a read may be out of date.

    Args:
        provider: The provider that the stores call; they have this object as refresher of "github".
        users: How many users there are.

    Attributes:
        newest: Each user's newest response of the provider.
        failures: How many calls of stores failed and were repeated.
        rounds: How many times tokens have expired and were refreshed.
    """

    def __init__(self, provider: StrictRotatingProvider, users: int) -> None:
        super().__init__(provider)
        names = [f"user {number}" for number in range(users)]
        self.newest: dict[str, Mapping[str, Any]] = {name: provider.new_grant(name) for name in names}
        self.failures = self.rounds = 0

    async def __call__(self, record: RefreshableRecord) -> Mapping[str, Any]:
        answer = await super().__call__(record)
        self.newest[record["user_id"]] = answer
        return answer

    async def run(self, stores: Sequence[AuthTokenStore], rounds: int) -> None:
        """Let each user's tokens expire so many times."""
        await asyncio.gather(*(self._run_user(user, stores, rounds) for user in self.newest))

    async def _run_user(self, user: str, stores: Sequence[AuthTokenStore], rounds: int) -> None:
        for number in range(rounds):
            # Each time through another store.
            await self.expire(user, stores[number % len(stores)])
            before = pair(self.newest[user])
            records = await asyncio.gather(*(self._fresh(user, store) for store in stores))
            # A store whose node is behind may still see the tokens before they expired.
            assert pair(self.newest[user]) != before
            assert pair(self.newest[user]) in {pair(record) for record in records}
            self.rounds += 1

    async def expire(self, user: str, store: AuthTokenStore) -> None:
        """Store the newest pair with an access token that has expired."""
        tokens = pair(self.newest[user])
        await self._repeated(lambda: store.store_tokens("github", user, *tokens, datetime.now(UTC) - _AN_HOUR))

    async def _fresh(self, user: str, store: AuthTokenStore) -> TokenRecord:
        return await self._repeated(lambda: fresh(store, user))

    async def check(self, store: AuthTokenStore) -> None:
        """Check that each user's newest pair is stored, as soon as the store's server has caught up with the others."""
        async with asyncio.timeout(_CATCH_UP):
            for user in self.newest:
                while pair(await load(store, user)) != pair(self.newest[user]):  # noqa: ASYNC110 - no one else tells
                    await asyncio.sleep(_PAUSE)

    async def _repeated(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat a call, as a caller would, while the database is not available."""
        while True:
            try:
                return await call()
            except (BackendError, TokensNotStoredError):
                self.failures += 1
                await asyncio.sleep(_PAUSE)
