"""SQLite's single writer: reads do not wait for it, and a changed snapshot is a conflict."""

from __future__ import annotations

import asyncio
import time

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from support.database import Place, app_engine
from support.sqlite_stores import three_stores
from support.tagged_tokens import load_tag, set_up, store_tag
from tokenstore import AuthTokenStore, ConflictError, Keyring, open_store

pytestmark = pytest.mark.sqlite


def test_reads_do_not_wait_for_the_writer(place: Place, keyring: Keyring) -> None:
    """While another process holds the write lock and has changed the row, a read returns the last committed row."""

    async def main() -> None:
        async with three_stores(place, keyring) as stores, place.held():
            for store in stores:
                started = time.monotonic()
                for _ in range(5):
                    assert await load_tag(store) == "old"
                assert time.monotonic() - started < 0.5
                assert [entry["user_id"] async for entry in store.list_tokens()] == ["u1"]

    asyncio.run(main())


def test_a_changed_snapshot_is_a_conflict(place: Place, keyring: Keyring) -> None:
    """A write in a caller's deferred transaction that read before another caller wrote raises ConflictError at once."""

    async def main() -> None:
        await set_up(place, keyring)
        async with (
            open_store(place.url, keyring=keyring) as other,
            app_engine(place) as engine,
            AsyncSession(engine) as session,
        ):
            store = AuthTokenStore(session, keyring=keyring)
            await session.execute(text("BEGIN"))
            assert await load_tag(store) == "old"
            await store_tag(other, "new")
            started = time.monotonic()
            with pytest.raises(ConflictError, match="repeat this one from its start"):
                await load_tag(store, for_update=True)
            assert time.monotonic() - started < 1
            await session.rollback()
            assert await load_tag(store, for_update=True) == "new"
            await session.rollback()

    asyncio.run(main())
