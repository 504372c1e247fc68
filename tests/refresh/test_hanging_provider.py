"""A provider that hangs, is overloaded or is down costs its own users alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from support.polling import until
from support.refresh_world import World, on_memory, settled
from support.refreshers import NEW, NEW_PAIR, OLD, Revoker, Script, pair
from support.store_calls import due, fresh
from tokenstore import (
    InvalidInputError,
    Keyring,
    ProviderRefusedError,
    ProviderUnavailableError,
    RefreshTimeoutError,
    TokenRecord,
    open_store,
)
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.testing.provider import StrictRotatingProvider

USERS = [f"u{number}" for number in range(400)]
LIMIT = 32


@asynccontextmanager
async def hanging_server() -> AsyncIterator[tuple[str, list[asyncio.StreamWriter]]]:
    """The URL of a server that accepts connections and never answers, and its connections so far."""
    connections: list[asyncio.StreamWriter] = []

    def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/token", connections
    finally:
        server.close()
        for writer in connections:
            writer.close()
        await server.wait_closed()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_400_users_of_a_provider_that_hangs_stop_no_others(keyring: Keyring, caplog: pytest.LogCaptureFixture) -> None:
    """The calls in flight, and so the descriptors, are bounded. When calls fail, the others fail without a call."""

    async def main() -> None:
        with StrictRotatingProvider() as healthy:
            async with hanging_server() as (url, connections):
                refreshers = {
                    # The test ends the calls, so a busy machine may take its time.
                    "hanging": OAuth2Refresher(url, "id", "secret", timeout=120),
                    "healthy": OAuth2Refresher(healthy.token_url, healthy.client_id, healthy.client_secret),
                }
                async with open_store(
                    "memory://", keyring=keyring, refreshers=refreshers, refresh_timeout=150
                ) as store:
                    expired = datetime.now(UTC) - timedelta(hours=1)
                    for user in USERS:
                        await store.store_tokens("hanging", user, *OLD, expired)
                    for user in USERS[:50]:
                        grant = healthy.new_grant(user)
                        await store.store_tokens(
                            "healthy", user, grant["access_token"], grant["refresh_token"], expired
                        )
                    before = descriptors()
                    callers = [asyncio.create_task(store.load_fresh_tokens("hanging", user)) for user in USERS]
                    await until(lambda: len(connections) == LIMIT)
                    assert descriptors() <= before + 2 * LIMIT  # both ends are in this process
                    for user in USERS[:50]:
                        assert await store.load_fresh_tokens("healthy", user)
                    assert healthy.stats().refreshes == 50
                    assert len(connections) == LIMIT
                    assert not any(caller.done() for caller in callers)
                    with caplog.at_level(logging.WARNING, "tokenstore.refresh"):
                        for writer in connections:
                            writer.close()
                        results = await asyncio.gather(*callers, return_exceptions=True)
                    assert {type(result) for result in results} == {ProviderUnavailableError}
                    assert len(connections) == LIMIT, "nobody else called"

    asyncio.run(main())
    pauses = [record for record in caplog.records if vars(record)["tokenstore_event"] == "provider_paused"]
    assert len(pauses) == 1
    assert vars(pauses[0])["tokenstore_code"] == "network_error"
    assert 5 <= vars(pauses[0])["tokenstore_pause"] <= 6.25


@on_memory
@pytest.mark.parametrize("concurrency", [1, 3])
async def test_the_calls_in_flight_are_bounded(world: World, concurrency: int) -> None:
    """By `provider_concurrency`; each of the waiting refreshes has its turn, and cancelled callers change nothing."""
    in_flight = most = 0
    go = asyncio.Event()

    async def counting(record: TokenRecord) -> Mapping[str, Any]:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await go.wait()
        await asyncio.sleep(0)
        in_flight -= 1
        return NEW

    store = await world.store(refreshers={"github": counting}, provider_concurrency=concurrency)
    for user in USERS[:20]:
        await world.expired(store, user)
    callers = [asyncio.create_task(fresh(store, user)) for user in USERS[:20]]
    await until(lambda: in_flight == concurrency)
    for caller in callers[::3]:
        caller.cancel()
    go.set()
    await asyncio.gather(*callers, return_exceptions=True)
    await settled(store)
    assert [pair(await world.stored(user)) for user in USERS[:20]] == [NEW_PAIR] * 20
    assert most == concurrency


@on_memory
async def test_a_place_that_never_becomes_free_is_a_timeout(world: World) -> None:
    """The row is not leased meanwhile; a wait ends like that for another process."""
    script = Script()
    script.hold()
    store = await world.store(refreshers={"github": script}, provider_concurrency=1, refresh_timeout=0.1)
    gate = store._engine._settings.gates.of("github")
    assert await gate.enter()
    await world.expired(store)
    with pytest.raises(RefreshTimeoutError, match="provider_concurrency"):
        await fresh(store)
    row = await world.sealed()
    assert row is not None
    assert row.lease_holder is None
    assert script.calls == 0
    gate.leave(asyncio.get_running_loop())


@on_memory
async def test_a_store_that_is_closed_does_not_wait_for_its_queue(world: World) -> None:
    """Refreshes that wait for a place end when the call in flight has ended."""
    script = Script()
    script.hold()
    store = await world.store(refreshers={"github": script}, provider_concurrency=1)
    for user in USERS[:5]:
        await world.expired(store, user)
    callers = [asyncio.create_task(fresh(store, user)) for user in USERS[:5]]
    await script.called.wait()
    closing = asyncio.create_task(store.aclose())
    await asyncio.sleep(0)
    script.answer.set()
    await closing
    await asyncio.gather(*callers, return_exceptions=True)
    assert script.calls == 1


@on_memory
async def test_revocations_have_the_same_limit(world: World) -> None:
    """They call the provider, too."""
    revoker = Revoker()
    revoker.hold()
    store = await world.store(refreshers={"github": revoker}, provider_concurrency=2)
    for user in USERS[:6]:
        await world.expired(store, user)
    calls = [asyncio.create_task(store.revoke_tokens("github", user)) for user in USERS[:6]]
    await revoker.revoking.wait()
    gate = store._engine._settings.gates.of("github")
    await until(lambda: gate.in_flight == 2)
    revoker.answer.set()
    assert await asyncio.gather(*calls) == [True] * 6
    assert gate.in_flight == 0


def test_a_bad_limit_is_refused(keyring: Keyring) -> None:
    for limit in (0, -1, 1.5, True):
        with pytest.raises(InvalidInputError, match="provider_concurrency"):
            open_store("memory://", keyring=keyring, provider_concurrency=limit)  # type: ignore[arg-type]


# -- pauses ------------------------------------------------------------------------------------------


class Moody:
    """Fails with an error for as long as it has one, and counts its calls by user."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.calls: list[str] = []

    async def __call__(self, record: TokenRecord) -> Mapping[str, Any]:
        self.calls.append(record["user_id"])
        if self.error is not None:
            raise self.error
        return NEW


@on_memory
@pytest.mark.parametrize(
    ("error", "low", "high"),
    [
        (ProviderUnavailableError("slow down", code="slow_down", retry_after=20), 20, 25),
        (ProviderUnavailableError("x", code="http_503"), 4, 7.5),
        (ProviderUnavailableError("x", code="http_429"), 4, 7.5),
        (ProviderUnavailableError("x", retry_after=3600), 60, 75),
    ],
)
async def test_a_provider_that_asks_for_a_pause_gets_one(
    world: World, error: Exception, low: float, high: float
) -> None:
    """From all users of this process, whatever they want; at most a minute, as it may have meant one user."""
    moody = Moody(error)
    store = await world.store(refreshers={"github": moody})
    for user in "abc":
        await world.expired(store, user)
    for user in "ab":
        for force in (False, True):
            with pytest.raises(ProviderUnavailableError) as caught:
                await fresh(store, user, force=force)
            assert caught.value.retry_after is not None
            if user == "b":
                assert low - 1 <= caught.value.retry_after <= high
    assert [result.outcome for result in await due(store, within=0)] == ["deferred"] * 3
    assert moody.calls == ["a"]
    moody.error = None
    world.ahead += high + 1
    assert pair(await fresh(store, "b")) == NEW_PAIR


@on_memory
async def test_repeated_outages_begin_a_pause_that_doubles(world: World) -> None:
    """Three users' calls have to fail; afterwards one failed call is enough, until a call succeeds."""
    moody = Moody(ProviderUnavailableError("down"))
    store = await world.store(refreshers={"github": moody})
    for user in USERS[:12]:
        await world.expired(store, user)

    async def calls(*users: str) -> int:
        before = len(moody.calls)
        for user in users:
            with pytest.raises(ProviderUnavailableError):
                await fresh(store, user)
        return len(moody.calls) - before

    for _ in range(5):  # one user's failures are no outage of the provider
        assert await calls("u0") == 1
        world.ahead += 7
    assert await calls("u1", "u2", "u3", "u4") == 2
    world.ahead += 6.5
    assert await calls("u3", "u4") == 1
    world.ahead += 6.5
    assert await calls("u4") == 0, "ten seconds at least"
    world.ahead += 6.5
    moody.error = None
    assert pair(await fresh(store, "u4")) == NEW_PAIR
    moody.error = ProviderUnavailableError("down")
    assert await calls("u5", "u6") == 2
    moody.error = ProviderRefusedError("x")  # an answer: the provider is up
    with pytest.raises(ProviderRefusedError):
        await fresh(store, "u7")
    moody.error = ProviderUnavailableError("down")
    assert await calls("u8", "u9", "u10", "u11") == 3


@on_memory
async def test_after_an_outage_one_call_tries_the_provider(world: World) -> None:
    """The others wait for its outcome, and go on when it succeeds."""
    moody, script = Moody(ProviderUnavailableError("down")), Script()

    async def refresh(record: TokenRecord) -> Mapping[str, Any]:
        return await (moody(record) if moody.error else script(record))

    store = await world.store(refreshers={"github": refresh})
    for user in USERS[:10]:
        await world.expired(store, user)
    for user in USERS[:3]:
        with pytest.raises(ProviderUnavailableError):
            await fresh(store, user)
    world.ahead += 7
    moody.error = None
    script.hold()
    callers = [asyncio.create_task(fresh(store, user)) for user in USERS[3:10]]
    await script.called.wait()
    gate = store._engine._settings.gates.of("github")
    await until(lambda: len(gate._queue) == 6)
    assert script.calls == 1
    script.answer.set()
    assert {pair(record) for record in await asyncio.gather(*callers)} == {NEW_PAIR}
    assert script.calls == 7


@on_memory
async def test_a_pause_within_the_margin_is_nobodys_error(world: World) -> None:
    """A token that is still valid is returned, and no refresh is begun."""
    moody = Moody(ProviderUnavailableError("x", retry_after=20))
    store = await world.store(refreshers={"github": moody}, refresh_margin=600)
    await world.expired(store, "a")
    await world.expired(store, "b", expires_in=90)
    with pytest.raises(ProviderUnavailableError):
        await fresh(store, "a")
    assert pair(await fresh(store, "b")) == OLD
    assert not store._engine._tasks
    assert moody.calls == ["a"]


@on_memory
async def test_refresh_due_takes_turns_between_providers(world: World) -> None:
    """A provider that hangs has its share of the concurrency, and the others are done meanwhile."""
    hanging, healthy = Script(), Script()
    hanging.hold()
    store = await world.store(refreshers={"a-hanging": hanging, "b-healthy": healthy})
    for user in USERS[:10]:
        for provider in ("a-hanging", "b-healthy"):
            await store.store_tokens(provider, user, *OLD, world.at(-1))
    done: list[str] = []

    async def run() -> None:
        async for result in store.refresh_due(within=0, concurrency=4, page_size=3):
            done.append(result.provider)  # noqa: PERF401 - the test looks at it meanwhile

    task = asyncio.create_task(run())
    await until(lambda: len(done) == 10)
    assert set(done) == {"b-healthy"}
    assert hanging.calls <= 4
    hanging.answer.set()
    await task
    assert done[10:] == ["a-hanging"] * 10
