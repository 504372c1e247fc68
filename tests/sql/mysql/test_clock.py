"""The server's clock: UTC in every session, and a lease that begins after the wait for the row's lock."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from support.database import Place, app_engine, on_connect
from support.matrix import mysql_rows
from support.tagged_tokens import set_up, store_tag
from tokenstore import Keyring, open_store
from tokenstore.records import TokenKey

KEY = TokenKey("github", "u1")


@mysql_rows
@pytest.mark.parametrize("zone", ["-11:30", "+13:00", "SYSTEM"])
def test_the_session_s_time_zone_does_not_change_times(place: Place, zone: str, keyring: Keyring) -> None:
    """The store uses UTC in every session: all sessions read the same times of rows and leases."""

    async def main() -> None:
        await set_up(place, keyring)
        async with app_engine(place) as engine, open_store(place.url, keyring=keyring) as other:
            on_connect(engine, f"SET time_zone = '{zone}'")
            store = open_store(engine, keyring=keyring, **place.options)
            await store_tag(store, "new")
            record = await other.load_tokens("github", "u1")
            assert record is not None
            assert abs(record["updated_at"] - datetime.now(UTC)) < timedelta(seconds=5)
            there: Any = store._backend
            here: Any = other._backend
            assert await there.claim_lease(KEY, generation=record["generation"], holder="h", duration=10)
            for backend in (here, there):
                assert 9 < (await backend.get(KEY)).lease_expires_in <= 10

    asyncio.run(main())


@mysql_rows
def test_a_lease_begins_after_the_wait_for_the_lock(place: Place, keyring: Keyring) -> None:
    """A claim that waited 0.6 s for the row's lock gets its full duration from the end of that wait."""

    async def main() -> None:
        await set_up(place, keyring)
        async with open_store(place.url, keyring=keyring) as store:
            backend: Any = store._backend
            generation = (await backend.get(KEY)).generation
            async with place.held():
                claim = asyncio.create_task(backend.claim_lease(KEY, generation=generation, holder="h", duration=10))
                await place.until_waiting()
                await asyncio.sleep(0.6)  # this time must not shorten the lease
            assert await claim
            assert 9.7 < (await backend.get(KEY)).lease_expires_in <= 10

    asyncio.run(main())
