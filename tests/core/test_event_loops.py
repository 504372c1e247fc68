"""A store serves one event loop of asyncio at a time, on every backend alike."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import trio

from support.matrix import Row, every_row, params
from tokenstore import AuthTokenStore, Keyring, UnsupportedOperationError, open_store

_THREADS = 8


@every_row
def test_of_several_threads_with_a_loop_each_one_is_served(row: Row, url: str, keyring: Keyring) -> None:
    """The others get an error that names the remedy, whatever they call, while the first event loop runs."""
    store = open_store(url, keyring=keyring)
    met, served = threading.Barrier(_THREADS), threading.Barrier(_THREADS)

    async def call(store: AuthTokenStore) -> None:
        await asyncio.to_thread(met.wait)
        try:
            await store.setup()
            await store.store_tokens("github", "u1", "access", None, None)
        finally:
            await asyncio.to_thread(served.wait)  # until then every loop runs
        await store.aclose()

    def thread() -> str:
        try:
            asyncio.run(call(store))
        except UnsupportedOperationError as error:
            return str(error)
        return "served"

    with ThreadPoolExecutor(_THREADS) as pool:
        outcomes = [future.result() for future in [pool.submit(thread) for _ in range(_THREADS)]]
    assert outcomes.count("served") == 1
    assert all("one store for each event loop" in outcome for outcome in outcomes if outcome != "served")


@pytest.mark.memory
def test_a_store_in_memory_moves_to_the_next_event_loop(keyring: Keyring) -> None:
    """After the first has ended, also if a task held a lock at its end. Other backends have tests of their own."""
    store = open_store("memory://", keyring=keyring)

    async def first() -> None:
        await store.setup()
        await store.store_tokens("github", "u1", "access", None, None)

        async def hold() -> None:
            async with store.transaction() as tx:
                await tx.load_tokens("github", "u1", for_update=True)
                await asyncio.Event().wait()

        _ = asyncio.get_running_loop().create_task(hold())
        await asyncio.sleep(0)

    async def second() -> None:
        assert await store.load_tokens("github", "u1") is not None
        await store.store_tokens("github", "u1", "access", None, None)

    async def last() -> None:
        await second()
        await store.aclose()

    for main in (first, second, last):
        asyncio.run(main())


@pytest.mark.parametrize("row", params(names=["memory", "sqlite", "postgresql+asyncpg", "mariadb+asyncmy"]))
def test_trio_gets_an_error_of_the_library(row: Row, url: str, keyring: Keyring) -> None:
    store = open_store(url, keyring=keyring)

    async def refresh(_: object) -> dict[str, object]:
        raise AssertionError

    async def main() -> None:
        with pytest.raises(UnsupportedOperationError, match="asyncio, not with trio"):
            await store.load_tokens("github", "u1")
        with pytest.raises(UnsupportedOperationError, match="asyncio, not with trio"):
            await store.store_tokens("github", "u1", "access", None, None)
        with pytest.raises(UnsupportedOperationError, match="asyncio, not with trio"):
            await store.load_fresh_tokens("github", "u1", refresh=refresh)
        with pytest.raises(UnsupportedOperationError, match="asyncio, not with trio"):
            _ = [entry async for entry in store.list_tokens()]
        with pytest.raises(UnsupportedOperationError, match="asyncio, not with trio"):
            await store.setup()

    trio.run(main)
