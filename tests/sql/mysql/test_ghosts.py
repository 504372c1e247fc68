"""Statements that the server would go on executing after their caller was cancelled."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from support.database import Place
from support.matrix import mysql_rows
from support.polling import until
from support.tagged_tokens import load_tag, set_up, store_tag
from tokenstore import Keyring, open_store
from tokenstore_sql.connections.connection import Connection
from tokenstore_sql.mysql.threads import kill


@mysql_rows
def test_killing_a_cancelled_statement_needs_no_connection_of_the_pool(place: Place, keyring: Keyring) -> None:
    """While all connections wait for a lock, cancelled tasks and their statements end at once."""

    async def main() -> None:
        await set_up(place, keyring)
        async with open_store(place.url, keyring=keyring, pool_size=2) as store:
            await store_tag(store, "old", "u2")
            async with place.held(), place.held("u2"):
                waiters = [asyncio.create_task(store_tag(store, "ghost", user_id)) for user_id in ("u1", "u2")]
                await place.until_waiting(count=2)
                started = time.monotonic()
                for waiter in waiters:
                    waiter.cancel()
                await asyncio.wait(waiters)
                assert time.monotonic() - started < 0.5
                await until(lambda: place.waiting() == 0)
            assert [await load_tag(store), await load_tag(store, "u2")] == ["old", "old"]

    asyncio.run(main())


@mysql_rows
def test_only_the_thread_of_the_cancelled_statement_is_killed(place: Place, keyring: Keyring) -> None:
    """Other statements that wait for the same row keep waiting, and get its lock."""

    async def main() -> None:
        await set_up(place, keyring)
        async with open_store(place.url, keyring=keyring) as one, open_store(place.url, keyring=keyring) as two:
            async with place.held():
                ghost = asyncio.create_task(store_tag(one, "ghost"))
                await place.until_waiting()
                alive = asyncio.create_task(store_tag(two, "alive"))
                await place.until_waiting(count=2)
                ghost.cancel()
                await until(lambda: place.waiting() == 1)
                await asyncio.wait([ghost])
                assert not alive.done()
            await alive
            assert await load_tag(one) == "alive"

    asyncio.run(main())


@mysql_rows
def test_no_thread_is_killed_if_it_may_be_another_server_s(
    place: Place, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a proxy the new connection may reach another server; then the statement ends by its lock wait timeout."""
    seen: list[Any] = []

    async def elsewhere(connection: Connection, thread: Any) -> None:
        seen.append(thread)
        await kill(connection, thread._replace(hostname="another-server"))
        seen.append("looked")

    monkeypatch.setattr("tokenstore_sql.mysql.dialect.kill", elsewhere)

    async def main() -> None:
        await set_up(place, keyring)
        async with open_store(place.url, keyring=keyring, lock_timeout=1) as store:
            async with place.held():
                ghost = asyncio.create_task(store_tag(store, "ghost"))
                await place.until_waiting()
                ghost.cancel()
                await asyncio.wait([ghost])
                await until(lambda: seen[-1:] == ["looked"])
                assert place.waiting() == 1
                await until(lambda: place.waiting() == 0)
            assert await load_tag(store) == "old"

    asyncio.run(main())
