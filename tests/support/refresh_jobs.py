"""What worker processes do with the refresh engine: callers that come and go, refreshers that stand still."""

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
from tokenstore.records import RefreshableRecord, TokenKey, TokenRecord
from tokenstore.registry import backend_for_url
from tokenstore.store import AuthTokenStore
from tokenstore.testing.provider import ProviderError, StrictRotatingProvider, _tls_context, refresh_over_http

PROVIDER = "provider"
_KEYRING = Keyring({"k1": bytes(range(32))})
_A_WHILE = timedelta(hours=1)


class Stop(Enum):
    """Where a refreshing process stands still, once."""

    BEFORE_THE_CALL = "holds the lease"
    AFTER_THE_RESPONSE = "has read the response"
    BEFORE_THE_WRITE = "is about to complete the lease"
    AFTER_THE_WRITE = "has completed the lease, and told nobody"
    AFTER_A_READ = "has read the row"


@dataclass(frozen=True)
class Terms:
    """How a worker opens its store.

    Attributes:
        url: The store's.
        token_url: The provider's.
        client: Its client and secret.
        user_id: Whose row the jobs are about.
        timeout: ``refresh_timeout``; a lease lasts 1.5 times as long.
        clock_error: How far this process's clock is ahead, in seconds.
        stop: Where to meet the test.
        fault: What is wrong with the backend.
    """

    url: str
    token_url: str
    client: tuple[str, str] = field(repr=False)
    user_id: str = "user"
    timeout: float = 20.0
    clock_error: float = 0.0
    stop: Stop | None = None
    fault: Fault | None = None

    @classmethod
    def at(cls, url: str, provider: StrictRotatingProvider, **others: Any) -> Terms:
        """Those of a running provider."""
        return cls(url, provider.token_url, (provider.client_id, provider.client_secret), **others)


class Answer(NamedTuple):
    """What a caller got: a valid access token, or the name and code of an error; and when, by the machine's clock."""

    token: str | None
    error: str | None
    at: float


class _Refresher:
    def __init__(self, terms: Terms, link: Link) -> None:
        self._terms = terms
        self._stand = _standing(terms, link)

    async def __call__(self, record: RefreshableRecord) -> dict[str, Any]:
        self._stand(Stop.BEFORE_THE_CALL)
        client_id, secret = self._terms.client
        try:
            response = await refresh_over_http(
                self._terms.token_url, record["refresh_token"], client_id=client_id, client_secret=secret, timeout=60
            )
        except ProviderError as error:
            if error.error == "invalid_grant":
                raise ReauthorizationRequiredError("the provider knows no such grant") from None
            raise
        self._stand(Stop.AFTER_THE_RESPONSE)
        return response

    async def revoke(self, record: TokenRecord) -> None:
        url = self._terms.token_url.removesuffix("token") + "revoke"
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            answer = await client.post(url, data={"token": record["refresh_token"]}, auth=self._terms.client)
        _ = answer.raise_for_status()


def _standing(terms: Terms, link: Link) -> Callable[[Stop], None]:
    """What meets the test at the stop of these terms, and there once."""
    left = [terms.stop]

    def stand(stop: Stop) -> None:
        if stop in left:
            left.clear()
            link.meet()

    return stand


async def opened(link: Link, terms: Terms) -> AuthTokenStore:
    """The worker's store, on new connections unless the last job wanted the same."""
    if link.opened != terms:
        await link.close()
        _ = _tls_context()  # takes longer than a refresh, and is kept
        refresher = _Refresher(terms, link)
        backend: Any = backend_for_url(terms.url, {}) if terms.fault is None else terms.fault.backend(terms.url)
        _make_stand(backend, refresher._stand)
        store = open_store(
            backend,
            keyring=_KEYRING,
            clock=lambda: time.time() + terms.clock_error,
            refreshers={PROVIDER: refresher},
            refresh_timeout=terms.timeout,
        )
        link.opened, link.stores = terms, [Store(store, backend, _KEYRING)]
    return link.stores[0].tokens


def _make_stand(backend: Any, stand: Callable[[Stop], None]) -> None:
    get, complete_lease = backend.get, backend.complete_lease

    async def get_and_stand(*args: Any, **named: Any) -> Any:
        rows = await get(*args, **named)
        stand(Stop.AFTER_A_READ)
        return rows

    async def complete_and_stand(*args: Any, **named: Any) -> Any:
        stand(Stop.BEFORE_THE_WRITE)
        written = await complete_lease(*args, **named)
        stand(Stop.AFTER_THE_WRITE)
        return written

    backend.get, backend.complete_lease = get_and_stand, complete_and_stand


async def _ask(store: AuthTokenStore, user_id: str) -> Answer:
    try:
        record = await store.load_fresh_tokens(PROVIDER, user_id)
    except RefreshError as error:
        return Answer(None, f"{type(error).__name__} {error.code}", time.monotonic())
    return Answer(None if record is None else record["access_token"], None, time.monotonic())


async def _idle(store: AuthTokenStore) -> None:
    """Until the store's refreshes have ended, which nobody need wait for any more."""
    while tasks := store._engine._tasks:
        _ = await asyncio.wait(tasks)


async def _told(link: Link) -> None:
    """Wait for the test's word as `Link.meet` does, but let the process live on meanwhile."""
    loop, word = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(link.commands.fileno(), word.set)
    try:
        _ = await word.wait()
    finally:
        loop.remove_reader(link.commands.fileno())
    link.commands.recv()


# Jobs


async def grant(link: Link, terms: Terms, refresh_tokens: dict[str, str]) -> None:
    """Create the table, and store for each user what a provider granted, with an access token that has expired."""
    store = await opened(link, terms)
    link.meet()
    await store.setup()
    for user_id, refresh_token in refresh_tokens.items():
        await store.store_tokens(PROVIDER, user_id, "expired", refresh_token, datetime.now(UTC) - _A_WHILE)


async def expire(link: Link, terms: Terms) -> str:
    """Let the row's access token have expired; return it."""
    store = await opened(link, terms)
    link.meet()
    record = await store.load_tokens(PROVIDER, terms.user_id)
    assert record is not None
    token: str = record["access_token"]
    past = datetime.now(UTC) - _A_WHILE
    await store.store_tokens(PROVIDER, terms.user_id, f"expired {token}", record["refresh_token"], past)
    return token


async def stored(link: Link, terms: Terms) -> str | None:
    """The access token in the row."""
    store = await opened(link, terms)
    link.meet()
    record = await store.load_tokens(PROVIDER, terms.user_id)
    return None if record is None else record["access_token"]


async def ask(link: Link, terms: Terms, callers: int) -> list[Answer]:
    """Callers that all want a valid token at once."""
    store = await opened(link, terms)
    link.meet()
    return await asyncio.gather(*(_ask(store, terms.user_id) for _ in range(callers)))


async def log_in(link: Link, terms: Terms, response: dict[str, Any]) -> None:
    """Store what a provider granted."""
    store = await opened(link, terms)
    link.meet()
    expires_at = datetime.now(UTC) + timedelta(seconds=response["expires_in"])
    await store.store_tokens(PROVIDER, terms.user_id, response["access_token"], response["refresh_token"], expires_at)


async def come_and_go(link: Link, terms: Terms, stays: Sequence[int | None], until_told: bool) -> list[Answer | None]:
    """Callers of whom some are cancelled, and what the others got; ends when no refresh is left.

    Args:
        link: The line to the test.
        terms: How to open the store.
        stays: For each caller after how many steps of the event loop it is cancelled, or None: never.
        until_told: Cancel all when the test says so.
    """
    store = await opened(link, terms)
    link.meet()
    callers = [asyncio.create_task(_ask(store, terms.user_id)) for _ in stays]
    leavers = {caller: steps for caller, steps in zip(callers, stays, strict=True) if steps is not None}
    patience = [asyncio.create_task(_cancel_after(steps, caller)) for caller, steps in leavers.items()]
    if until_told:
        await _told(link)
        for caller in callers:
            leavers[caller] = 0
            _ = caller.cancel()
        _ = await asyncio.wait(callers)
        link.answers.send(("here", None))
    _ = await asyncio.wait([*callers, *patience])
    await _idle(store)
    return [None if caller in leavers and caller.cancelled() else caller.result() for caller in callers]


async def _cancel_after(steps: int, caller: asyncio.Task[Any]) -> None:
    for _ in range(steps):
        await asyncio.sleep(0)
    _ = caller.cancel()


async def outlast(link: Link, terms: Terms) -> None:
    """Look at the row until the lease on it has expired, and do nothing about it."""
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
    """Tasks that want a valid token and get it as the contract says: load for update, refresh if need be, store."""
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
    """Refresh what is due, and return whose rows came to what."""
    store = await opened(link, terms)
    link.meet()
    return [(result.user_id, result.outcome) async for result in store.refresh_due(within=600)]


async def revoke(link: Link, terms: Terms, callers: int) -> list[bool]:
    """Callers that all revoke the tokens."""
    store = await opened(link, terms)
    link.meet()
    return await asyncio.gather(*(store.revoke_tokens(PROVIDER, terms.user_id) for _ in range(callers)))
