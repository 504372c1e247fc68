"""A store's own pool on each database: its size, the error when all connections are in use, and dead connections."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta

import pytest

from support.database import Place, is_whole, source_of
from support.matrix import Row, each_database, shared_rows
from support.polling import until
from support.tagged_tokens import load_tag, opened, store_tag
from tokenstore import AuthTokenStore, BackendUnavailableError, Keyring, LockTimeoutError, StoreClosedError, open_store
from tokenstore_sql.connections import pool as pool_module
from tokenstore_sql.connections.driver import DriverConnection
from tokenstore_sql.errors import ConnectionLostError
from tokenstore_sql.sqlite.connections import SQLiteConnection


@shared_rows
def test_tasks_that_wait_for_one_row_do_not_use_up_the_pool(place: Place, keyring: Keyring) -> None:
    """50 tasks wait for a locked row; with two connections, other rows are read without delay."""

    async def main() -> None:
        async with opened(place, keyring, pool_size=2) as store:

            async def wait() -> str | None:
                async with store.transaction() as tx:
                    return await load_tag(tx, for_update=True)

            async with place.held():
                waiters = [asyncio.create_task(wait()) for _ in range(25)]
                waiters += [asyncio.create_task(store_tag(store, "new")) for _ in range(25)]
                await place.until_waiting(store)
                started = time.monotonic()
                for _ in range(20):
                    assert await load_tag(store, "u2") == "old"
                assert time.monotonic() - started < 1
                assert not any(waiter.done() for waiter in waiters)
            await asyncio.gather(*waiters)
            assert is_whole(store)

    asyncio.run(main())


@shared_rows
@pytest.mark.parametrize("call", [load_tag, lambda store: store_tag(store, "x")], ids=["load", "store"])
def test_a_nested_call_on_the_only_connection_ends_in_an_error(
    place: Place, call: Callable[[AuthTokenStore], Awaitable[object]], keyring: Keyring
) -> None:
    """A call of the store inside its own transaction, with one connection, must not wait for ever."""

    async def main() -> None:
        async with opened(place, keyring, pool_size=1, pool_timeout=0.3, lock_timeout=0.3) as store:
            async with store.transaction() as tx:
                await load_tag(tx, for_update=True)
                started = time.monotonic()
                with pytest.raises(
                    (BackendUnavailableError, LockTimeoutError), match=r"pool_timeout|lock was not free"
                ):
                    await call(store)
                assert time.monotonic() - started < 2
                await store_tag(tx, "new")
            assert await load_tag(store) == "new"

    asyncio.run(main())


@each_database
def test_if_all_connections_stay_in_use_the_error_names_pool_timeout(row: Row, url: str, keyring: Keyring) -> None:
    """A transaction has the only connection: other calls wait for ``pool_timeout``, and their errors name the row."""

    async def main() -> None:
        async with open_store(url, keyring=keyring, pool_size=1, pool_timeout=0.05) as store:
            await store.setup()
            await _store(store, "u1")
            async with store.transaction() as tx:
                assert await tx.load_tokens("github", "u1")
                for call in (store.load_tokens("github", "u2"), _store(store, "u2"), _all_of(store)):
                    with pytest.raises(BackendUnavailableError, match="pool_timeout") as caught:
                        await call
                    assert "pool_size" in str(caught.value)
                assert source_of(store).in_use == source_of(store).open == 1
            assert await store.load_tokens("github", "u1")
            assert source_of(store).in_use == 0

    asyncio.run(main())


@each_database
def test_a_store_never_has_more_connections_than_its_pool_size(row: Row, url: str, keyring: Keyring) -> None:
    """Many tasks load, store, open transactions and are cancelled; at the end all connections are returned."""

    async def main() -> None:
        async with open_store(url, keyring=keyring, pool_size=3) as store:
            await store.setup()
            source = source_of(store)
            seen = 0

            async def use(number: int) -> None:
                nonlocal seen
                user = f"u{number % 10}"
                await _store(store, user)
                seen = max(seen, source.open)
                async with store.transaction() as tx:
                    assert await tx.load_tokens("github", user, for_update=True)
                    seen = max(seen, source.open)
                assert await store.load_tokens("github", user)

            tasks = [asyncio.create_task(use(number)) for number in range(40)]
            await until(lambda: any(task.done() for task in tasks), 0.001)
            for task in tasks[::4]:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ends)
            assert 1 <= seen <= 3
            await until(lambda: source.in_use == 0)

    asyncio.run(main())


async def _store(store: AuthTokenStore, user: str) -> None:
    await store.store_tokens("github", user, "gho_x", None, datetime.now(UTC) + timedelta(hours=1))


async def _all_of(store: AuthTokenStore) -> list[object]:
    return [entry async for entry in store.list_tokens()]


@each_database
def test_a_dead_connection_is_replaced_before_a_write(
    row: Row, url: str, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test lets the pool check the connection before each write; all stores succeed."""
    monkeypatch.setattr(pool_module, "_TRUSTED", -1.0)
    really = DriverConnection.send_text
    asked: list[DriverConnection] = []

    async def ping(connection: DriverConnection) -> None:
        asked.append(connection)
        await really(connection, "SELECT 1")
        if len(asked) == 1:
            connection._unanswered = True
            raise ConnectionLostError(OSError("reset"))

    async def main() -> None:
        async with open_store(url, keyring=keyring, pool_size=1) as store:
            await store.setup()
            await _store(store, "u1")
            for connection_class in (
                DriverConnection,
                SQLiteConnection,
            ):  # the classes with a check for dead connections
                monkeypatch.setattr(connection_class, "ping", ping)
            for _ in range(3):
                await _store(store, "u1")
            assert len(asked) >= 3
            assert asked[0] is not asked[1]
            assert len(set(asked[1:])) == 1
            assert (source_of(store).open, source_of(store).in_use) == (1, 0)

    asyncio.run(main())


@each_database
def test_closing_a_store_closes_a_transaction_s_connection_when_it_ends(row: Row, url: str, keyring: Keyring) -> None:
    """Idle connections are closed at once, the transaction's connection at the end of its block."""

    async def main() -> None:
        store = open_store(url, keyring=keyring)
        await store.setup()
        await _store(store, "u1")
        source = source_of(store)
        async with AsyncExitStack() as stack:
            tx = await stack.enter_async_context(store.transaction())
            assert await tx.load_tokens("github", "u1")
            await _store(store, "u2")
            assert source.open == 2
            await store.aclose()
            assert source.open == source.in_use == 1
            with pytest.raises(StoreClosedError):
                await tx.load_tokens("github", "u1")
        assert source.open == 0
        await source.aclose()
        await Place(row, url).until_idle()

    asyncio.run(main())
