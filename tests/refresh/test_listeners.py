"""Listeners are called once, and their errors and delays affect no caller."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from support.refresh_world import World, on_memory, settled, until_waiting
from support.refreshers import NEW, NEW_PAIR, OLD, Gone, Script, pair
from support.store_calls import fresh, many
from tokenstore import AuthTokenStore, ReauthorizationRequiredError, TokenRecord
from tokenstore.records import TokenKey

KEY = TokenKey("github", "u1")


@on_memory
@pytest.mark.parametrize("kind", ["plain", "coroutine", "raising", "raising coroutine"])
async def test_listeners_are_called_once(world: World, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """They are called for new tokens and for a dead refresh token. Their errors are logged without text, not raised."""
    told_of: list[Any] = []

    def plain(news: Any) -> None:
        told_of.append(news)
        if kind.startswith("raising"):
            raise Gone(OLD[1])

    async def coroutine(news: Any) -> None:
        await asyncio.sleep(0)
        plain(news)

    listener = coroutine if kind.endswith("coroutine") else plain
    script = Script(NEW, ReauthorizationRequiredError("used"))
    options: dict[str, Any] = {"on_refreshed": listener, "on_reauthorization_required": listener}
    store = await world.store(refreshers={"github": script}, **options)
    await world.expired(store)
    records = await many(3, store)
    await settled(store)
    assert [(pair(news), news["generation"]) for news in told_of] == [(NEW_PAIR, records[0]["generation"])]
    errors = await many(3, store, force=True) + await many(2, store, force=True)
    await settled(store)
    _, error = told_of
    assert isinstance(error, ReauthorizationRequiredError)
    assert (error.provider, error.user_id, error.account) == KEY
    assert all(isinstance(other, ReauthorizationRequiredError) and other is not error for other in errors)
    problems = [record for record in caplog.records if record.levelno >= logging.WARNING and "callback" in record.msg]
    assert len([record for record in caplog.records if "callback" in record.getMessage()]) == (
        2 if kind.startswith("raising") else 0
    )
    assert not any(OLD[1] in str(vars(record)) for record in problems + caplog.records)


@on_memory
async def test_only_the_store_that_refreshed_calls_its_listener(world: World) -> None:
    """Other stores read the tokens that it stored, and call no listener."""
    news: dict[str, list[TokenRecord]] = {"one": [], "two": []}
    script = Script()
    script.hold()
    one = await world.store(refreshers={"github": script}, on_refreshed=news["one"].append)
    two = await world.store(refreshers={"github": script}, on_refreshed=news["two"].append)
    await world.expired(one)
    first = asyncio.create_task(fresh(one))
    await script.called.wait()
    second = asyncio.create_task(fresh(two))
    await until_waiting(two)
    script.answer.set()
    await asyncio.gather(first, second)
    await settled(one)
    assert (len(news["one"]), len(news["two"])) == (1, 0)


@on_memory
async def test_a_listener_may_use_the_store(world: World) -> None:
    """The refresh has ended when the listener is called."""
    found: list[object] = []

    async def listener(record: TokenRecord) -> None:
        found.append(pair(await fresh(store)))

    store = await world.store(refreshers={"github": Script()}, on_refreshed=listener)
    await world.expired(store)
    await fresh(store)
    await settled(store)
    assert found == [NEW_PAIR]


@on_memory
async def test_a_listener_that_does_not_end_delays_only_closing(world: World) -> None:
    """Closing waits for it at most ``refresh_timeout``; a listener that closes the store does not wait for itself."""
    stores: list[AuthTokenStore] = []

    async def hang(record: TokenRecord) -> None:
        await asyncio.Event().wait()

    async def close(record: TokenRecord) -> None:
        await stores[-1].aclose()

    for listener in (hang, close):
        stores.append(await world.store(refreshers={"github": Script()}, on_refreshed=listener, refresh_timeout=0.05))
        await world.expired(stores[-1])
        assert pair(await fresh(stores[-1])) == NEW_PAIR
        await stores[-1].aclose()
