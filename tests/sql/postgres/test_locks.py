"""The store's `lock_timeout` applies only to its own statements."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from support.database import Place, app_engine, connection_of
from support.matrix import postgres_rows
from support.tagged_tokens import load_tag, store_tag
from tokenstore import AuthTokenStore, Keyring, LockTimeoutError, open_store


@postgres_rows
def test_the_store_s_lock_timeout_does_not_change_the_application_s(place: Place, keyring: Keyring) -> None:
    """The application's own lock_timeout applies before and after a call of the store in its transaction."""

    async def main() -> None:
        async with open_store(place.url, keyring=keyring) as store:
            await store.setup()
            await store_tag(store, "old")
        async with app_engine(place, pool_size=1, max_overflow=0) as engine:

            async def shown(session: AsyncSession) -> str:
                return str((await session.execute(text("SHOW lock_timeout"))).scalar_one())

            async with AsyncSession(engine) as session, session.begin():
                await session.execute(text("SET LOCAL lock_timeout = '4321ms'"))
                borrowed = AuthTokenStore(session, keyring=keyring, lock_timeout=0.3, **place.options)
                assert await load_tag(borrowed, for_update=True) == "old"
                assert await shown(session) == "4321ms"
                await store_tag(borrowed, "new")
                assert await shown(session) == "4321ms"
                async with _locked(place, keyring):
                    with pytest.raises(LockTimeoutError):
                        async with session.begin_nested():
                            await load_tag(borrowed, "u2", for_update=True)
                assert await shown(session) == "4321ms"
            async with AsyncSession(engine) as session:
                assert await shown(session) == "0"
                await session.rollback()
                borrowed = AuthTokenStore(session, keyring=keyring, **place.options)
                await load_tag(borrowed, for_update=True)
                await store_tag(borrowed, "newer")
                assert await shown(session) == "0"
        async with open_store(place.url, keyring=keyring, pool_size=1) as store:
            async with store.transaction() as tx:
                await load_tag(tx, for_update=True)
            async with connection_of(store) as connection:
                (found,), _ = await connection.run(select(func.current_setting("lock_timeout")))
                assert tuple(found) == ("0",)

    asyncio.run(main())


@asynccontextmanager
async def _locked(place: Place, keyring: Keyring) -> AsyncIterator[None]:
    """Lock the row of `u2` in another store's transaction."""
    async with open_store(place.url, keyring=keyring) as store:
        await store_tag(store, "other", "u2")
        async with store.transaction() as tx:
            await load_tag(tx, "u2", for_update=True)
            yield
