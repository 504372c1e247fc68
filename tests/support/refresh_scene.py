"""A table behind connection faults, a store that goes round them, and a provider."""

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

# How long the access token lasts at the beginning: expired, so that the caller waits, or due, so that nobody does.
EXPIRED, DUE = -1.0, 90.0
MARGIN = 600.0
PATIENCE, SOAK_PATIENCE = 60.0, 300.0


class Recorder(Refresher):
    """Keeps what the provider answered, by user.

    Args:
        provider: Whom to call.
        beside: A store that shows whether the row is leased.

    Attributes:
        issued: The answers to each user's refreshes.
        unleased: For whom the provider was called without a lease.
        answered: Called between an answer and its delivery to the store.
        retry_after: What an outage tells callers.
    """

    def __init__(self, provider: StrictRotatingProvider, beside: AuthTokenStore) -> None:
        super().__init__(provider)
        self._backend = beside._backend
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
    """A table behind faults, a store that goes round them, and a provider."""

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
        """A new user's grant, in the table with an access token that lasts so long."""
        user = f"u{next(self._users)}"
        grant = self.provider.new_grant(user)
        expires_at = datetime.now(UTC) + timedelta(seconds=expires_in)
        await self.direct.store_tokens("github", user, grant["access_token"], grant["refresh_token"], expires_at)
        return await load(self.direct, user)

    async def open(self, old: TokenRecord, url: str = "", **options: Any) -> AuthTokenStore:
        """Another store, by way of the faults if nothing else is said. It has a connection."""
        options = {"refresh_margin": MARGIN, **options}
        store = open_store(
            url or self.faults.url, keyring=self.keyring, refreshers={"github": self.recorder}, **options
        )
        assert await load(store, old["user_id"]) == old
        return store

    @asynccontextmanager
    async def store(self, old: TokenRecord, url: str = "", **options: Any) -> AsyncIterator[AuthTokenStore]:
        """The same for a while: at its end every connection has been returned."""
        async with await self.open(old, url, **options) as store:
            yield store
            assert checked_out(store) == 0

    @asynccontextmanager
    async def held(self, store: AuthTokenStore, user: str) -> AsyncIterator[asyncio.Task[TokenRecord]]:
        """A caller, whose request has used up the refresh token; the answer comes when the block ends."""
        before = self.provider.stats().requests
        with self.provider.hold():
            caller = asyncio.create_task(fresh(store, user))
            await asyncio.to_thread(self.provider.wait_for_requests, before + 1)
            yield caller

    def go_away(self) -> None:
        """The database is gone, until it is said not to refuse connections any more."""
        self.faults.refuse = True
        self.faults.cut_all()

    async def check(self, old: TokenRecord, told: TokenRecord | None = None) -> None:
        """One refresh has been made and is in the row, which is as one leaves it; the next refresh works."""
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
        await fresh(self.direct, user, force=True, refresh=self.recorder)
        assert self.provider.stats().refreshes_by_user[user] == 2
        assert self.provider.stats().reuses == 0


@asynccontextmanager
async def scene_of(url: str, keyring: Keyring, patience: float = PATIENCE) -> AsyncIterator[Scene]:
    """Also sees to it that nothing fails behind everybody's back."""
    problems: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(str(context)))
    async with asyncio.timeout(patience):
        with StrictRotatingProvider() as provider:
            async with open_store(url, keyring=keyring) as direct, faulty(url) as faults:
                await direct.setup()
                recorder = Recorder(provider, direct)
                yield Scene(url, keyring, faults, direct, recorder)
            assert provider.stats().reuses == 0
            assert not recorder.unleased
    assert not problems, problems


def checked_out(store: AuthTokenStore) -> int:
    """How many connections are in use."""
    return source_of(store).in_use


@contextmanager
def spied(store: AuthTokenStore) -> Iterator[mock.AsyncMock]:
    """The writes of new tokens, to be counted as they begin."""
    complete = store._backend.complete_lease
    with mock.patch.object(store._backend, "complete_lease", mock.AsyncMock(wraps=complete)) as spy:
        yield spy


@contextmanager
def noted(*what: object) -> Iterator[None]:
    """Which of many runs failed."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"with {', '.join(map(str, what))}")
        raise
