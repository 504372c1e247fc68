"""`lock_timeout` limits waiting for a lock, on a store's own connections and in a session."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from support.database import Place, app_engine, connection_settings, password_of
from support.error_text import assert_silent
from support.matrix import shared_rows
from support.tagged_tokens import REFRESH, load_tag, opened, store_in_transaction, store_tag
from tokenstore import AuthTokenStore, Keyring, LockTimeoutError, open_store

ACCESS = "gho_plaintext_access"
SECRETS = (ACCESS, REFRESH)


@shared_rows
@pytest.mark.parametrize("on", ["url", "session"])
def test_waiting_for_a_lock_ends_with_lock_timeout_error(place: Place, on: str, keyring: Keyring) -> None:
    """A locking load and a write both end after about ``lock_timeout``; nothing is stored, locked or left open."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            other = await stack.enter_async_context(opened(place, keyring))
            engine = await stack.enter_async_context(app_engine(place, pool_size=2, max_overflow=0))
            before = await connection_settings(engine, place.row, 2)

            async def make() -> AuthTokenStore:
                if on == "url":
                    return await stack.enter_async_context(open_store(place.url, keyring=keyring, lock_timeout=0.3))
                session = await stack.enter_async_context(AsyncSession(engine))
                return AuthTokenStore(session, keyring=keyring, lock_timeout=0.3, **place.options)

            async def lock(store: AuthTokenStore) -> None:
                await (store_in_transaction(store) if on == "url" else load_tag(store, for_update=True))

            async def fails(store: AuthTokenStore, action: Callable[[AuthTokenStore], Awaitable[None]]) -> None:
                started = time.monotonic()
                with pytest.raises(LockTimeoutError, match=r"github.*u1") as caught:
                    await action(store)
                assert 0.25 < time.monotonic() - started < 2.5
                assert_silent(caught.value, *SECRETS, password_of(place))

            stores = [await make(), await make()]
            async with place.held():
                await asyncio.gather(fails(stores[0], lock), fails(stores[1], lambda store: store_tag(store, ACCESS)))
                assert await load_tag(other) == "old"
            await place.until_idle()
            assert await connection_settings(engine, place.row, 2) == before
            for store in stores:
                await store_tag(store, "new")

    asyncio.run(main())
