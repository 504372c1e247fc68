"""A cancelled call leaves the old row or the new one, returns its connection, and leaves no statement in the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from support.database import Place, app_engine, connection_settings, is_whole
from support.matrix import server_rows, shared_rows
from support.polling import until
from support.tagged_tokens import load_tag, opened, store_in_transaction, store_tag
from tokenstore import AuthTokenStore, Keyring, open_store


async def _alone(store: AuthTokenStore) -> None:
    await store_tag(store, "new")


@shared_rows
@pytest.mark.parametrize("action", [_alone, store_in_transaction])
@pytest.mark.parametrize("own", [True, False], ids=["own", "engine"])
def test_a_call_cancelled_at_any_point_leaves_the_old_or_the_new_row(
    place: Place, action: Callable[[AuthTokenStore], Awaitable[None]], own: bool, keyring: Keyring
) -> None:
    """All connections are returned, with their session settings, and no transaction is half stored."""

    async def main() -> None:
        async with (
            opened(place, keyring) as other,
            app_engine(place, pool_size=2, max_overflow=0) as borrowed,
            open_store(
                place.url if own else borrowed,
                keyring=keyring,
                **cast(dict[str, Any], {"pool_size": 2} if own else place.options),
            ) as store,
        ):
            # The store's own connections have settings that the store made.
            before = None if own else await connection_settings(borrowed, place.row, 2)
            started = time.perf_counter()
            await action(store)
            took = time.perf_counter() - started
            for point in range(16):
                await store_tag(other, "old")
                await store_tag(other, "old", "u2")
                task = asyncio.ensure_future(action(store))
                if point % 2:
                    for _ in range(point):
                        await asyncio.sleep(0)
                else:
                    await asyncio.sleep(took * point / 13)
                task.cancel()
                await asyncio.wait([task])
                await until(lambda: is_whole(store))
                tags = [await load_tag(other), await load_tag(other, "u2")]
                assert tags[0] in ("old", "new")
                if action is store_in_transaction:
                    assert tags[0] == tags[1], "half of a transaction was stored"
            await place.until_idle()
            if not own:
                assert await connection_settings(borrowed, place.row, 2) == before
            await asyncio.gather(*(action(store) for _ in range(4)))

    asyncio.run(main())


async def _lock_on_session(engine: AsyncEngine, place: Place, keyring: Keyring) -> None:
    async with AsyncSession(engine) as session:
        await load_tag(AuthTokenStore(session, keyring=keyring, **place.options), for_update=True)


async def _store_on_session(engine: AsyncEngine, place: Place, keyring: Keyring) -> None:
    async with AsyncSession(engine) as session:
        await store_tag(AuthTokenStore(session, keyring=keyring, **place.options), "ghost")


async def _lock_on_engine(engine: AsyncEngine, place: Place, keyring: Keyring) -> None:
    async with open_store(engine, keyring=keyring, **place.options) as store, store.transaction() as tx:
        await load_tag(tx, for_update=True)


async def _store_on_engine(engine: AsyncEngine, place: Place, keyring: Keyring) -> None:
    async with open_store(engine, keyring=keyring, **place.options) as store:
        await store_tag(store, "ghost")


async def _store_by_url(engine: AsyncEngine, place: Place, keyring: Keyring) -> None:
    async with open_store(place.url, keyring=keyring) as store:
        await store_tag(store, "ghost")


@server_rows
@pytest.mark.parametrize(
    "wait", [_lock_on_session, _store_on_session, _lock_on_engine, _store_on_engine, _store_by_url]
)
def test_cancelling_a_waiting_call_also_ends_its_statement_in_the_server(
    place: Place, wait: Callable[[AsyncEngine, Place, Keyring], Awaitable[None]], keyring: Keyring
) -> None:
    """The server cancels the statement before the lock is free, so it can neither take the lock nor write later."""

    async def main() -> None:
        async with opened(place, keyring) as other, app_engine(place) as engine:
            async with place.held():
                waiter = asyncio.ensure_future(wait(engine, place, keyring))
                await place.until_waiting()
                started = time.monotonic()
                waiter.cancel()
                await asyncio.wait([waiter])
                assert waiter.cancelled()
                assert time.monotonic() - started < 4  # lock_timeout, after which it would end by itself, is 5 s
                await until(lambda: place.waiting() == 0)
            assert await load_tag(other) == "old"
            await store_tag(other, "next")
            await place.until_idle()
            assert await load_tag(other) == "next"

    asyncio.run(main())
