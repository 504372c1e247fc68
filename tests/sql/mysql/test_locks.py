"""Row locks: gap locks, and a locking read in a snapshot."""

from __future__ import annotations

import asyncio
from secrets import token_hex

from sqlalchemy.ext.asyncio import AsyncSession

from support.database import Place, app_engine
from support.matrix import mysql_rows
from support.tagged_tokens import load_tag, set_up, store_tag
from tokenstore import AuthTokenStore, Keyring, open_store


@mysql_rows
def test_two_inserts_after_locking_missing_rows_do_not_deadlock(place: Place, keyring: Keyring) -> None:
    """Two transactions lock the missing rows of different new users, and both insert."""

    async def main() -> None:
        await set_up(place, keyring)
        async with app_engine(place) as engine, open_store(place.url, keyring=keyring) as store:
            met = asyncio.Barrier(2)

            async def insert_in_transaction(user_id: str) -> None:
                async with store.transaction() as tx:
                    assert await load_tag(tx, user_id, for_update=True) is None
                    await met.wait()
                    await store_tag(tx, "new", user_id)

            async def insert_in_session(user_id: str) -> None:
                async with AsyncSession(engine) as session:
                    borrowed = AuthTokenStore(session, keyring=keyring, **place.options)
                    assert await load_tag(borrowed, user_id, for_update=True) is None
                    await met.wait()
                    await store_tag(borrowed, "new", user_id)

            for insert in (insert_in_transaction, insert_in_session):
                for _ in range(5):
                    users = token_hex(4), token_hex(4)
                    await asyncio.gather(*map(insert, users))
                    assert [await load_tag(store, user_id) for user_id in users] == ["new", "new"]

    asyncio.run(main())


@mysql_rows
def test_at_repeatable_read_a_locking_load_returns_the_newest_row(place: Place, keyring: Keyring) -> None:
    """A locking load in the caller's transaction that waited for the lock does not return the snapshot's old row."""

    async def main() -> None:
        await set_up(place, keyring)
        async with (
            open_store(place.url, keyring=keyring) as other,
            app_engine(place, isolation_level="REPEATABLE READ") as engine,
            AsyncSession(engine) as session,
            session.begin(),
        ):
            _ = await session.connection()
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            assert await load_tag(store) == "old"
            async with other.transaction() as tx:
                await load_tag(tx, for_update=True)
                waiter = asyncio.create_task(load_tag(store, for_update=True))
                await place.until_waiting()
                await store_tag(tx, "new")
            assert await waiter == "new"
            await store_tag(store, "newer")
        async with open_store(place.url, keyring=keyring) as other:
            assert await load_tag(other) == "newer"

    asyncio.run(main())
