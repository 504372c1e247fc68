"""Jobs of worker processes that use the refresh engine: callers that are cancelled, refreshes that pause at a point."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, NamedTuple

import httpx

from support.broken_backends import Fault
from support.generated_programs import Store
from support.workers import Link
from tokenstore import Keyring, open_store
from tokenstore.errors import ReauthorizationRequiredError, RefreshError
from tokenstore.integrations.machine import ClientCredentials
from tokenstore.records import RefreshableRecord, TokenKey, TokenRecord
from tokenstore.registry import backend_for_url
from tokenstore.store import AuthTokenStore
from tokenstore.testing.provider import ProviderError, StrictRotatingProvider, refresh_over_http
from tokenstore.testing.provider.client import _tls_context

PROVIDER = "provider"
_KEYRING = Keyring({"k1": bytes(range(32))})
_A_WHILE = timedelta(hours=1)


class Stop(Enum):
    """The point at which a refreshing process pauses once, until the test tells it to continue."""

    BEFORE_THE_CALL = "holds the lease"
    AFTER_THE_RESPONSE = "has read the response"
    BEFORE_THE_WRITE = "is about to complete the lease"
    AFTER_THE_WRITE = "has completed the lease, and has not yet returned"
    AFTER_A_READ = "has read the row"


@dataclass(frozen=True)
class Terms:
    """How a worker opens its store.

    Attributes:
        url: The store's URL.
        token_url: The URL of the provider's token endpoint.
        client: The client's id and secret at the provider.
        user_id: The user whose row the jobs use.
        timeout: ``refresh_timeout`` in seconds; a lease lasts 1.5 times as long.
        clock_error: By how many seconds this process's clock is ahead.
        stop: Where a refresh pauses.
        fault: The fault of the backend; None: a correct backend.
        issues: Whether the refresher has tokens issued without a refresh token.
    """

    url: str
    token_url: str
    client: tuple[str, str] = field(repr=False)
    user_id: str = "user"
    timeout: float = 20.0
    clock_error: float = 0.0
    stop: Stop | None = None
    fault: Fault | None = None
    issues: bool = False

    @classmethod
    def at(cls, url: str, provider: StrictRotatingProvider, **others: Any) -> Terms:
        """Make the terms for a running provider."""
        return cls(url, provider.token_url, (provider.client_id, provider.client_secret), **others)


class Answer(NamedTuple):
    """The result of a caller.

    Attributes:
        token: A valid access token, or None.
        error: The name and the code of an error, or None.
        at: When the caller got it, by the machine's monotonic clock.
    """

    token: str | None
    error: str | None
    at: float


class _Refresher:
    def __init__(self, terms: Terms, link: Link) -> None:
        self._terms = terms
        self._pause = _pausing(terms, link)
        self.issues = terms.issues

    async def __call__(self, record: RefreshableRecord) -> dict[str, Any]:
        self._pause(Stop.BEFORE_THE_CALL)
        client_id, secret = self._terms.client
        if self.issues:
            response = await ClientCredentials(self._terms.token_url, client_id, secret, timeout=60)(record)
            self._pause(Stop.AFTER_THE_RESPONSE)
            return response
        try:
            response = await refresh_over_http(
                self._terms.token_url, record["refresh_token"], client_id=client_id, client_secret=secret, timeout=60
            )
        except ProviderError as error:
            if error.error == "invalid_grant":
                raise ReauthorizationRequiredError("the provider refused the refresh token") from None
            raise
        self._pause(Stop.AFTER_THE_RESPONSE)
        return response

    async def revoke(self, record: TokenRecord) -> None:
        url = self._terms.token_url.removesuffix("token") + "revoke"
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            answer = await client.post(url, data={"token": record["refresh_token"]}, auth=self._terms.client)
        _ = answer.raise_for_status()


def _pausing(terms: Terms, link: Link) -> Callable[[Stop], None]:
    """Return a function that pauses when it is first called with the stop of these terms."""
    left = [terms.stop]

    def pause(stop: Stop) -> None:
        if stop in left:
            left.clear()
            link.meet()

    return pause


async def opened(link: Link, terms: Terms) -> AuthTokenStore:
    """Return the worker's store; it is opened anew unless the last job had the same terms."""
    if link.opened != terms:
        await link.close()
        _ = _tls_context()  # slow, and cached: made now so that the first refresh is not delayed
        refresher = _Refresher(terms, link)
        backend: Any = backend_for_url(terms.url, {}) if terms.fault is None else terms.fault.backend(terms.url)
        _pause_at_calls(backend, refresher._pause)
        store = open_store(
            backend,
            keyring=_KEYRING,
            clock=lambda: time.time() + terms.clock_error,
            refreshers={PROVIDER: refresher},
            refresh_timeout=terms.timeout,
        )
        link.opened, link.stores = terms, [Store(store, backend, _KEYRING)]
    return link.stores[0].tokens


def _pause_at_calls(backend: Any, pause: Callable[[Stop], None]) -> None:
    get, complete_lease = backend.get, backend.complete_lease

    async def get_and_pause(*args: Any, **named: Any) -> Any:
        rows = await get(*args, **named)
        pause(Stop.AFTER_A_READ)
        return rows

    async def pause_and_complete(*args: Any, **named: Any) -> Any:
        pause(Stop.BEFORE_THE_WRITE)
        written = await complete_lease(*args, **named)
        pause(Stop.AFTER_THE_WRITE)
        return written

    backend.get, backend.complete_lease = get_and_pause, pause_and_complete


async def _ask(store: AuthTokenStore, user_id: str) -> Answer:
    try:
        record = await store.load_fresh_tokens(PROVIDER, user_id)
    except RefreshError as error:
        return Answer(None, f"{type(error).__name__} {error.code}", time.monotonic())
    return Answer(None if record is None else record["access_token"], None, time.monotonic())


async def _until_idle(store: AuthTokenStore) -> None:
    """Wait until the store's refreshes have ended, also those whose callers have all been cancelled."""
    while tasks := store._engine._tasks:
        _ = await asyncio.wait(tasks)


async def _until_told(link: Link) -> None:
    """Wait until the test says to go on, as `Link.meet` does, but without blocking the event loop."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(link.commands.fileno(), told.set)
    try:
        _ = await told.wait()
    finally:
        loop.remove_reader(link.commands.fileno())
    link.commands.recv()


# Jobs


async def grant(link: Link, terms: Terms, refresh_tokens: dict[str, str]) -> None:
    """Create the table, and store each user's refresh token with an expired access token."""
    store = await opened(link, terms)
    link.meet()
    await store.setup()
    for user_id, refresh_token in refresh_tokens.items():
        await store.store_tokens(PROVIDER, user_id, "expired", refresh_token, datetime.now(UTC) - _A_WHILE)


async def set_up(link: Link, terms: Terms) -> None:
    """Create the table."""
    store = await opened(link, terms)
    link.meet()
    await store.setup()


async def expire(link: Link, terms: Terms) -> str:
    """Replace the row's access token by an expired one; return the old one."""
    store = await opened(link, terms)
    link.meet()
    record = await store.load_tokens(PROVIDER, terms.user_id)
    assert record is not None
    token: str = record["access_token"]
    past = datetime.now(UTC) - _A_WHILE
    await store.store_tokens(PROVIDER, terms.user_id, f"expired {token}", record["refresh_token"], past)
    return token


async def stored(link: Link, terms: Terms) -> str | None:
    """Return the access token in the row."""
    store = await opened(link, terms)
    link.meet()
    record = await store.load_tokens(PROVIDER, terms.user_id)
    return None if record is None else record["access_token"]


async def ask(link: Link, terms: Terms, callers: int) -> list[Answer]:
    """Let that many callers load a valid token at the same time."""
    store = await opened(link, terms)
    link.meet()
    return await asyncio.gather(*(_ask(store, terms.user_id) for _ in range(callers)))


async def log_in(link: Link, terms: Terms, response: dict[str, Any]) -> None:
    """Store a provider's token response."""
    store = await opened(link, terms)
    link.meet()
    expires_at = datetime.now(UTC) + timedelta(seconds=response["expires_in"])
    await store.store_tokens(PROVIDER, terms.user_id, response["access_token"], response["refresh_token"], expires_at)


async def come_and_go(link: Link, terms: Terms, stays: Sequence[int | None], until_told: bool) -> list[Answer | None]:
    """Start callers, cancel some of them, and wait until no refresh is running.

    Args:
        link: The connection to the test.
        terms: How to open the store.
        stays: For each caller: after how many steps of the event loop it is cancelled, or None: never.
        until_told: Cancel all callers when the test says so.

    Returns:
        Each caller's result; None if it was cancelled.
    """
    store = await opened(link, terms)
    link.meet()
    callers = [asyncio.create_task(_ask(store, terms.user_id)) for _ in stays]
    cancelled = {caller: steps for caller, steps in zip(callers, stays, strict=True) if steps is not None}
    timers = [asyncio.create_task(_cancel_after(steps, caller)) for caller, steps in cancelled.items()]
    if until_told:
        await _until_told(link)
        for caller in callers:
            cancelled[caller] = 0
            _ = caller.cancel()
        _ = await asyncio.wait(callers)
        link.answers.send(("here", None))
    _ = await asyncio.wait([*callers, *timers])
    await _until_idle(store)
    return [None if caller in cancelled and caller.cancelled() else caller.result() for caller in callers]


async def _cancel_after(steps: int, caller: asyncio.Task[Any]) -> None:
    for _ in range(steps):
        await asyncio.sleep(0)
    _ = caller.cancel()


async def outlast(link: Link, terms: Terms) -> None:
    """Poll the row until its lease has expired."""
    _ = await opened(link, terms)
    backend, key = link.stores[0].backend, TokenKey(PROVIDER, terms.user_id)
    link.meet()
    while True:
        row = await backend.get(key)
        assert row is not None
        assert row.lease_expires_in is not None
        if row.lease_expires_in <= 0:
            return
        await asyncio.sleep(0.01)


async def lock_and_refresh(link: Link, terms: Terms, tasks: int) -> list[Answer]:
    """Let tasks get a valid token under the row lock: load for update, refresh if expired, store."""
    store = await opened(link, terms)
    refresher = _Refresher(terms, link)
    link.meet()

    async def valid_token() -> Answer:
        async with store.transaction() as transaction:
            record = await transaction.load_tokens(PROVIDER, terms.user_id, for_update=True)
            assert record is not None
            if not store.is_access_token_valid(record):
                assert store.is_refresh_token_valid(record)
                new = await refresher(record)
                expires_at = datetime.now(UTC) + timedelta(seconds=new["expires_in"])
                names = {name: new[name] for name in ("access_token", "refresh_token")}
                await transaction.store_tokens(PROVIDER, terms.user_id, **names, access_token_expires_at=expires_at)
                record = TokenRecord(new)
        return Answer(record["access_token"], None, time.monotonic())

    return await asyncio.gather(*(valid_token() for _ in range(tasks)))


async def refresh_due(link: Link, terms: Terms) -> list[tuple[str, str]]:
    """Refresh the rows that are due; return each user with the outcome."""
    store = await opened(link, terms)
    link.meet()
    return [(result.user_id, result.outcome) async for result in store.refresh_due(within=600)]


async def revoke(link: Link, terms: Terms, callers: int) -> list[bool]:
    """Let that many callers revoke the tokens at the same time."""
    store = await opened(link, terms)
    link.meet()
    return await asyncio.gather(*(store.revoke_tokens(PROVIDER, terms.user_id) for _ in range(callers)))
