"""One async store for each event loop, which the end of the event loop closes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import uvloop

from tokenstore import AuthTokenStore, Keyring, UnsupportedOperationError, open_store
from tokenstore.integrations._loop_stores import LoopStores
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.records import RefreshableRecord
from tokenstore.testing.provider import StrictRotatingProvider


@pytest.fixture
def opened() -> list[AuthTokenStore]:
    return []


@pytest.fixture
def stores(opened: list[AuthTokenStore], keyring: Keyring) -> Iterator[LoopStores]:
    def opener() -> AuthTokenStore:
        opened.append(open_store("memory://", keyring=keyring))
        return opened[-1]

    stores = LoopStores(opener)
    yield stores
    assert (stores._stores, stores._ends) == ({}, {})


async def _use(stores: LoopStores) -> AuthTokenStore:
    store = stores.get()
    await store.put_value("a", "b", 1)
    assert stores.get() is store
    return store


@pytest.mark.parametrize("new_event_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_the_end_of_an_event_loop_closes_its_store(
    new_event_loop: type, stores: LoopStores, opened: list[AuthTokenStore]
) -> None:
    for _ in range(2):
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            store = runner.run(_use(stores))
            assert runner.run(_use(stores)) is store
            assert not store._closed
        assert store._closed
    assert len(opened) == 2


def test_event_loops_of_several_threads_have_a_store_each(stores: LoopStores, opened: list[AuthTokenStore]) -> None:
    barrier = Barrier(4)

    async def view() -> None:
        await _use(stores)
        barrier.wait(30)

    threads = [Thread(target=lambda: asyncio.run(view())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4
    assert all(store._closed for store in opened)


def test_a_store_that_its_user_has_closed_is_replaced(stores: LoopStores) -> None:
    async def main() -> None:
        async with stores.get() as store:
            pass
        assert await _use(stores) is not store

    asyncio.run(main())


def test_after_a_change_of_the_settings_both_stores_are_closed_at_the_end(
    stores: LoopStores, opened: list[AuthTokenStore]
) -> None:
    async def main() -> None:
        before = await _use(stores)
        stores.forget()
        assert await _use(stores) is not before
        assert not before._closed

    asyncio.run(main())
    assert [store._closed for store in opened] == [True, True]


def test_the_stores_of_an_event_loop_can_be_closed_earlier(stores: LoopStores, opened: list[AuthTokenStore]) -> None:
    async def main() -> None:
        await _use(stores)
        await stores.aclose()
        assert opened[0]._closed

    asyncio.run(main())


def test_an_event_loop_that_was_closed_without_an_end_is_forgotten(stores: LoopStores) -> None:
    """Its store is not closed, as nothing can run in it any more; the memory is freed at the next opening."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(_use(stores))
    loop.close()
    asyncio.run(_use(stores))


def test_there_has_to_be_an_event_loop(stores: LoopStores) -> None:
    with pytest.raises(UnsupportedOperationError, match="no event loop is running"):
        stores.get()


@pytest.mark.sqlite
def test_the_end_of_the_event_loop_waits_for_a_refresh(tmp_path: Path, keyring: Keyring) -> None:
    """The view has a valid token, and its event loop ends while the provider refreshes it."""
    with StrictRotatingProvider(latency=0.3) as provider:
        refresher = OAuth2Refresher(provider.token_url, provider.client_id, provider.client_secret)
        called = asyncio.Event()

        async def refresh(record: RefreshableRecord) -> Mapping[str, Any]:
            called.set()
            return await refresher(record)

        url = f"sqlite:///{tmp_path}/store.db"
        stores = LoopStores(lambda: open_store(url, keyring=keyring, refreshers={"github": refresh}))
        grant = provider.new_grant("user")

        async def view() -> None:
            store = stores.get()
            await store.setup()
            soon = datetime.now(UTC) + timedelta(seconds=90)
            tokens = grant["access_token"], grant["refresh_token"]
            await store.store_tokens("github", "user", *tokens, soon, extra={"expires_in": 3600})
            record = await store.load_fresh_tokens("github", "user")
            assert record is not None
            assert record["access_token"] == grant["access_token"]
            await called.wait()

        async def stored() -> str | None:
            record = await stores.get().load_tokens("github", "user")
            assert record is not None
            return record["refresh_token"]

        asyncio.run(view())
        assert asyncio.run(stored()) != grant["refresh_token"]
        assert provider.stats().refreshes == 1
