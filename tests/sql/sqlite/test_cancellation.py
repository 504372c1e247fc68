"""A cancelled call leaves no statement waiting and no lock behind."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from support.database import Place, source_of
from support.polling import until
from support.sqlite_stores import three_stores
from support.tagged_tokens import load_tag, store_tag
from tokenstore import AuthTokenStore, Keyring
from tokenstore_sql.connections.source import Source
from tokenstore_sql.sqlite.aiosqlite_engine import open_aiosqlite
from tokenstore_sql.sqlite.database_file import DatabaseFile

pytestmark = pytest.mark.sqlite


def test_a_cancelled_wait_for_the_write_lock_ends_at_once(place: Place, keyring: Keyring) -> None:
    """It does not last until SQLite's busy timeout, five seconds by default, and no statement is left waiting."""

    async def main() -> None:
        async with three_stores(place, keyring) as stores:
            sources = [source_of(store) for store in (stores[0], stores[1], stores[1])]  # the session's is the second
            async with place.held():
                for store, source in zip(stores, sources, strict=True):

                    def has_begun(source: Source = source) -> bool:
                        return source.in_use == 1

                    waiter = asyncio.create_task(store_tag(store, "ghost"))
                    await until(has_begun)
                    started = time.monotonic()
                    waiter.cancel()
                    await asyncio.wait([waiter])
                    assert waiter.cancelled()
                    assert time.monotonic() - started < 0.5
            for store in stores:
                assert await load_tag(store) == "old"
                await store_tag(store, "old")
            await place.until_idle()

    asyncio.run(main())


@pytest.mark.parametrize("what", ["store", "load"])
def test_a_cancelled_call_leaves_no_statement_open_in_sqlite(place: Place, what: str, keyring: Keyring) -> None:
    """The call is cancelled at any point; an open statement would keep its locks until it is garbage-collected."""

    async def main() -> None:
        async with three_stores(place, keyring) as stores:
            for store in stores:

                async def call(store: AuthTokenStore = store) -> None:
                    await (store_tag(store, "new") if what == "store" else load_tag(store))

                started = time.perf_counter()
                await call()
                took = time.perf_counter() - started
                for point in range(15):
                    task = asyncio.create_task(call())
                    await asyncio.sleep(took * point / 12)
                    task.cancel()
                    await asyncio.wait([task])
                    await until(lambda: place.open_transactions() == 0)

    asyncio.run(main())


def test_a_closed_connection_holds_no_lock(path: Path) -> None:
    """Also if its cursor still has rows to read, as after a cancelled task."""

    async def main() -> None:
        file = DatabaseFile(path)
        file.create()
        connection = await open_aiosqlite(file, 1.0)
        await connection.execute("BEGIN IMMEDIATE")
        unread = await connection.execute("SELECT 1 UNION SELECT 2")
        await connection.close()
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
        del unread

    asyncio.run(main())
