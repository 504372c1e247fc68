"""A table with connection faults, a store that connects to it directly, and a provider."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import mock

from support.connection_faults import Faults, faulty
from support.database import source_of
from support.refreshers import Refresher, pair
from support.store_calls import fresh, load
from tokenstore import AuthTokenStore, Keyring, ProviderUnavailableError, RefreshableRecord, TokenRecord, open_store
from tokenstore.records import TokenKey, is_leased
from tokenstore.testing.provider import StrictRotatingProvider

# Seconds until the access token expires: with an expired token the caller waits for the refresh; with a token that is
# due the refresh runs in the background.
EXPIRED, DUE = -1.0, 90.0
MARGIN = 600.0
TIMEOUT, SOAK_TIMEOUT = 60.0, 300.0


class Recorder(Refresher):
    """A refresher that records the provider's responses by user.

    Args:
        provider: The provider to call.
        direct: A store that reads whether the row is leased.

    Attributes:
        issued: The responses to each user's refreshes.
        unleased: The users for whom the provider was called although their row was not leased.
        answered: Called after the provider's response, before it is passed to the store.
        retry_after: ``retry_after`` of the error that an outage of the provider raises.
    """

    def __init__(self, provider: StrictRotatingProvider, direct: AuthTokenStore) -> None:
        super().__init__(provider)
        self._backend = direct._backend
        self.issued: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
        self.unleased: list[str] = []
        self.answered: Callable[[], None] = lambda: None
        self.retry_after: float | None = None

    async def __call__(self, record: RefreshableRecord) -> Mapping[str, Any]:
        row = await self._backend.get(TokenKey("github", record["user_id"]))
        if row is None or not is_leased(row):
            self.unleased.append(record["user_id"])
        try:
            answer = await super().__call__(record)
        except ProviderUnavailableError as error:
            error.retry_after = self.retry_after
            raise
        self.issued[record["user_id"]].append(answer)
        self.answered()
        return answer


@dataclass
class Scene:
    """A table with connection faults, a store that connects to it directly, and a provider."""

    url: str
    keyring: Keyring
    faults: Faults
    direct: AuthTokenStore
    recorder: Recorder
    _users: Iterator[int] = field(default_factory=itertools.count)

    @property
    def provider(self) -> StrictRotatingProvider:
        return self.recorder.provider

    async def log_in(self, expires_in: float = EXPIRED) -> TokenRecord:
        """Store the grant of a new user with an access token, issued for an hour, that expires in so many seconds."""
        user = f"u{next(self._users)}"
        grant = self.provider.new_grant(user)
        expires_at = datetime.now(UTC) + timedelta(seconds=expires_in)
        tokens, hour = (grant["access_token"], grant["refresh_token"]), {"expires_in": 3600}
        await self.direct.store_tokens("github", user, *tokens, expires_at, extra=hour)
        return await load(self.direct, user)

    async def open(self, old: TokenRecord, url: str = "", **options: Any) -> AuthTokenStore:
        """Open another store, by default one whose connections can be cut. It has an open connection."""
        options = {"refresh_margin": MARGIN, **options}
        store = open_store(
            url or self.faults.url, keyring=self.keyring, refreshers={"github": self.recorder}, **options
        )
        assert await load(store, old["user_id"]) == old
        return store

    @asynccontextmanager
    async def store(self, old: TokenRecord, url: str = "", **options: Any) -> AsyncIterator[AuthTokenStore]:
        """Open another store, and at the end check that all its connections were returned."""
        async with await self.open(old, url, **options) as store:
            yield store
            assert checked_out(store) == 0

    @asynccontextmanager
    async def held(self, store: AuthTokenStore, user: str) -> AsyncIterator[asyncio.Task[TokenRecord]]:
        """Start a caller whose request has consumed the refresh token; the provider responds when the block ends."""
        before = self.provider.stats().requests
        with self.provider.hold():
            caller = asyncio.create_task(fresh(store, user))
            await asyncio.to_thread(self.provider.wait_for_requests, before + 1)
            yield caller

    def go_away(self) -> None:
        """Cut all connections and refuse new ones, until ``faults.refuse`` is False again."""
        self.faults.refuse = True
        self.faults.cut_all()

    async def check(self, old: TokenRecord, told: TokenRecord | None = None) -> None:
        """Check that one refresh was made and stored, that the row has no lease, and that it can be refreshed again."""
        user = old["user_id"]
        [issued] = self.recorder.issued[user]
        assert self.provider.stats().refreshes_by_user[user] == 1
        stored = await load(self.direct, user)
        assert pair(stored) == pair(issued)
        assert stored["generation"] == old["generation"] + 1
        if told is not None:
            assert (pair(told), told["generation"]) == (pair(stored), stored["generation"])
        sealed = await self.direct._backend.get(TokenKey("github", user))
        assert sealed is not None
        assert (sealed.lease_holder, sealed.failure) == (None, None)
        await fresh(self.direct, user, force=True, force_min_age=0, refresh=self.recorder)
        assert self.provider.stats().refreshes_by_user[user] == 2
        assert self.provider.stats().reuses == 0


@asynccontextmanager
async def scene_of(url: str, keyring: Keyring, timeout: float = TIMEOUT) -> AsyncIterator[Scene]:
    """Make a scene. At the end, check that no task failed unnoticed and that no refresh token was used twice."""
    problems: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(str(context)))
    async with asyncio.timeout(timeout):
        with StrictRotatingProvider() as provider:
            async with open_store(url, keyring=keyring) as direct, faulty(url) as faults:
                await direct.setup()
                recorder = Recorder(provider, direct)
                yield Scene(url, keyring, faults, direct, recorder)
            assert provider.stats().reuses == 0
            assert not recorder.unleased
    assert not problems, problems


def checked_out(store: AuthTokenStore) -> int:
    """Return how many connections of the store are in use."""
    return source_of(store).in_use


@contextmanager
def spied(store: AuthTokenStore) -> Iterator[mock.AsyncMock]:
    """Count the calls that store new tokens, as they begin."""
    complete = store._backend.complete_lease
    with mock.patch.object(store._backend, "complete_lease", mock.AsyncMock(wraps=complete)) as spy:
        yield spy


@contextmanager
def noted(*parameters: object) -> Iterator[None]:
    """Add the parameters of this run to an error, so that it says which of many runs failed."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"with {', '.join(map(str, parameters))}")
        raise
