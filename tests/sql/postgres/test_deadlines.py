"""Transactions that the server ends."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from support.database import Place, app_engine
from support.matrix import postgres_rows
from support.tagged_tokens import load_tag, store_tag
from tokenstore import AuthTokenStore, BackendUnavailableError, Keyring, open_store


@postgres_rows
def test_a_transaction_that_the_server_ended_as_idle_raises_backend_unavailable_error(
    place: Place, keyring: Keyring
) -> None:
    """`idle_in_transaction_session_timeout` expires during a slow HTTP call; nothing of the transaction is stored."""

    async def main() -> None:
        async with open_store(place.url, keyring=keyring) as store:
            await store.setup()
            await store_tag(store, "old")
        async with app_engine(place) as engine, AsyncSession(engine) as session:
            await session.execute(text("SET idle_in_transaction_session_timeout = '500ms'"))
            await session.commit()
            borrowed = AuthTokenStore(session, keyring=keyring, **place.options)
            await load_tag(borrowed, for_update=True)
            await place.until_idle()
            with pytest.raises(BackendUnavailableError, match="provider 'github', user 'u1'"):
                await store_tag(borrowed, "new")
            assert await load_tag(borrowed) == "old"
            await store_tag(borrowed, "new")
            assert await load_tag(borrowed) == "new"

    asyncio.run(main())
