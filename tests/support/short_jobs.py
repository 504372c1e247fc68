"""Jobs that each run in a new event loop, and end before their refresh does.

Celery workers call `asyncio.run` for each job, and a Flask view or asgiref's `async_to_sync` does so for each request.
The token of these jobs is within the refresh margin: the job gets the token at once, and the refresh runs in the
background. The provider is slower than the job.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from multiprocessing.process import BaseProcess
from typing import Any

import anyio
import httpx

from tokenstore import AuthTokenStore, Keyring, RefreshableRecord, open_store
from tokenstore.errors import ReauthorizationRequiredError
from tokenstore.records import TokenKey
from tokenstore.testing.provider import ProviderError, StrictRotatingProvider, refresh_over_http

__all__ = ["ENDINGS", "Client", "Ending", "Jobs", "process_running"]

_KEYRING = Keyring({"k1": bytes(range(32))})
_MARGIN = 600.0
# Time until the access token expires: still valid but within the margin, or expired.
_DUE, _EXPIRED = timedelta(seconds=90), timedelta(seconds=-90)

Work = Callable[[], Coroutine[Any, Any, Any]]
Ending = Callable[[AuthTokenStore, str, Work], Awaitable[None]]
"""Loads a token and does some work. The refresh is still running when the event loop ends."""


@dataclass(frozen=True)
class Client:
    """A client of the provider; it can be pickled for another process."""

    token_url: str
    client_id: str
    client_secret: str = field(repr=False)

    @classmethod
    def of(cls, provider: StrictRotatingProvider) -> Client:
        return cls(provider.token_url, provider.client_id, provider.client_secret)


class Refresher:
    """Refreshes over HTTP, and records the responses."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.received: list[Mapping[str, Any]] = []

    async def __call__(self, record: RefreshableRecord) -> Mapping[str, Any]:
        client = self._client
        try:
            response = await refresh_over_http(
                client.token_url,
                record["refresh_token"],
                client_id=client.client_id,
                client_secret=client.client_secret,
                timeout=60,
            )
        except ProviderError as error:
            if error.error == "invalid_grant":
                raise ReauthorizationRequiredError("the provider refused the refresh token") from None
            raise
        self.received.append(response)
        return response


# -- endings of a job ------------------------------------------------------------------------------------


async def in_the_background(store: AuthTokenStore, user: str, work: Work) -> None:
    """The token is still valid, so the caller gets it at once."""
    assert await store.load_fresh_tokens("provider", user) is not None
    await work()


async def in_a_timeout(store: AuthTokenStore, user: str, work: Work) -> None:
    """The caller waits for the new token with a timeout, which is too short."""
    scope = asyncio.timeout(None)

    async def use() -> None:
        async with scope:
            await store.load_fresh_tokens("provider", user)

    using = asyncio.create_task(use())
    await work()
    scope.reschedule(0)
    await asyncio.wait([using])
    assert scope.expired()
    assert isinstance(using.exception(), TimeoutError)


async def in_wait_for(store: AuthTokenStore, user: str, work: Work) -> None:
    """The caller waits with `wait_for`, whose timeout of 0 expires at once."""
    caller = asyncio.create_task(store.load_fresh_tokens("provider", user))
    await work()
    try:
        await asyncio.wait_for(caller, 0)
    except TimeoutError:
        return


async def in_a_cancel_scope(store: AuthTokenStore, user: str, work: Work) -> None:
    """A cancel scope of anyio cancels the caller at every step of the event loop."""
    with anyio.move_on_after(60) as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(store.load_fresh_tokens, "provider", user)
            await work()
            scope.cancel()


async def closing(store: AuthTokenStore, user: str, work: Work) -> None:
    """The caller is cancelled while it closes the store."""
    async with asyncio.TaskGroup() as group:

        async def use() -> None:
            async with store:
                await in_the_background(store, user, work)

        using = group.create_task(use())
        await work()
        using.cancel()


async def shut_down(store: AuthTokenStore, user: str, work: Work) -> None:
    """A shutdown handler cancels all tasks, and waits for them, before the event loop ends."""
    assert await store.load_fresh_tokens("provider", user) is not None
    await work()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def shut_down_at_every_turn(store: AuthTokenStore, user: str, work: Work) -> None:
    """A shutdown handler cancels all tasks at every step of the event loop until there are none."""
    assert await store.load_fresh_tokens("provider", user) is not None
    await work()
    while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0)


ENDINGS: Mapping[str, tuple[Ending, timedelta]] = {
    "in the background": (in_the_background, _DUE),
    "timeout": (in_a_timeout, _EXPIRED),
    "wait_for": (in_wait_for, _EXPIRED),
    "move_on_after": (in_a_cancel_scope, _EXPIRED),
    "closing": (closing, _DUE),
    "all tasks cancelled": (shut_down, _DUE),
    "all tasks cancelled at every turn": (shut_down_at_every_turn, _DUE),
}


# -- the jobs ----------------------------------------------------------------------------------------------


class Jobs:
    """Jobs that use one row, each in a new event loop.

    Args:
        url: The store's URL.
        client: The provider's client.
        user: The user whose row the jobs use.
        shared: Whether all jobs use one store object; otherwise each job opens one.
        ending: How the jobs end, a name in ``ENDINGS``.
        work: The work of a job besides its refresh; default: it waits until the provider has the request.
    """

    def __init__(
        self,
        url: str,
        client: Client,
        user: str = "user",
        *,
        shared: bool = True,
        ending: str = "in the background",
        work: Work | None = None,
    ) -> None:
        self._url = url
        self._client = client
        self._user = user
        self._begun = 0
        self._ending, self._expires_in = ENDINGS[ending]
        self._work = work or self._until_requested
        self._refresher = Refresher(client)
        self._store = self._open() if shared else None
        self._used: list[AuthTokenStore] = []
        self._grant: Mapping[str, Any] = {}

    def _open(self) -> AuthTokenStore:
        return open_store(self._url, keyring=_KEYRING, refreshers={"provider": self._refresher}, refresh_margin=_MARGIN)

    async def _until_requested(self) -> None:
        stats = self._client.token_url.removesuffix("token") + "stats"
        async with asyncio.timeout(60), httpx.AsyncClient(trust_env=False, verify=False) as client:
            while (await client.get(stats)).json()["refreshes_by_user"].get(self._user, 0) < self._begun:
                pass

    async def log_in(self, grant: Mapping[str, Any]) -> None:
        """Store the tokens of a new grant."""
        self._grant = grant
        async with self._open() as store:
            await store.setup()
            await self._put(store, grant)

    async def _put(self, store: AuthTokenStore, tokens: Mapping[str, Any]) -> None:
        expires_at = datetime.now(UTC) + self._expires_in
        pair = tokens["access_token"], tokens["refresh_token"]
        # It was issued for an hour: a token that lasts less than the margin would not be due yet.
        await store.store_tokens("provider", self._user, *pair, expires_at, extra={"expires_in": 3600})

    async def job(self) -> None:
        """Run one job."""
        self._begun += 1
        store = self._store or self._open()
        if self._store is None:
            self._used.append(store)
        await self._ending(store, self._user, self._work)

    async def expire(self) -> bool:
        """Check that the row has the last pair, and make it due again. Returns whether the pair was new."""
        while self._used:
            await self._used.pop().aclose()
        async with self._open() as store:
            record = await store.load_tokens("provider", self._user)
            assert record is not None
            last = self._refresher.received[-1] if self._refresher.received else self._grant
            assert record["refresh_token"] == last["refresh_token"], "the row does not have the last refresh token"
            row = await store._backend.get(TokenKey("provider", self._user))
            assert row is not None
            assert (row.lease_holder, row.failure) == (None, None)
            new = last is not self._grant
            self._grant = last
            await self._put(store, last)
        return new

    async def close(self) -> int:
        """Check with a refresh that the grant is not revoked; return how many responses were received in all."""
        async with self._open() as store:
            assert await store.load_fresh_tokens("provider", self._user, force=True, force_min_age=0) is not None
        if self._store is not None:
            await self._store.aclose()
        return len(self._refresher.received)

    def run(
        self, count: int, grant: Mapping[str, Any], run: Callable[[Work], object] = lambda job: asyncio.run(job())
    ) -> int:
        """Run so many jobs; return how many responses were received."""
        asyncio.run(self.log_in(grant))
        refreshed = 0
        for _ in range(count):
            run(self.job)
            refreshed += asyncio.run(self.expire())
        assert refreshed == len(self._refresher.received)
        return asyncio.run(self.close())


# -- in processes that end ---------------------------------------------------------------------------------


def process_running(
    url: str, client: Client, user: str, grant: Mapping[str, Any], count: int, shared: bool
) -> BaseProcess:
    """Start a process that runs so many jobs of a user. Its exit code is 0 if no pair was lost."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_run, args=(url, client, user, grant, count, shared), daemon=True)
    process.start()
    return process


def _run(url: str, client: Client, user: str, grant: Mapping[str, Any], count: int, shared: bool) -> None:
    Jobs(url, client, user, shared=shared).run(count, grant)
