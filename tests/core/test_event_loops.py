"""On every backend, a store can be used from one asyncio event loop at a time."""

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
def test_of_several_threads_with_an_event_loop_each_only_one_can_use_the_store(
    row: Row, url: str, keyring: Keyring
) -> None:
    """While the first event loop runs, all calls in the others raise an error that says what to do."""
    store = open_store(url, keyring=keyring)
    met, served = threading.Barrier(_THREADS), threading.Barrier(_THREADS)

    async def call(store: AuthTokenStore) -> None:
        await asyncio.to_thread(met.wait)
        try:
            await store.setup()
            await store.store_tokens("github", "u1", "access", None, None)
        finally:
            await asyncio.to_thread(served.wait)  # all event loops run until then
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
def test_a_memory_store_can_be_used_in_the_next_event_loop(keyring: Keyring) -> None:
    """The first event loop has ended, while a task held a lock. Other backends are tested in tests/sql."""
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
def test_a_call_from_trio_raises_unsupported_operation_error(row: Row, url: str, keyring: Keyring) -> None:
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
