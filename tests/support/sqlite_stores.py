"""Stores on one SQLite file: by URL, on an engine, on a session."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from support.database import Place, app_engine
from support.tagged_tokens import set_up
from tokenstore import AuthTokenStore, Keyring, open_store


@asynccontextmanager
async def three_stores(place: Place, keyring: Keyring, **engine: Any) -> AsyncIterator[list[AuthTokenStore]]:
    """Make a store by URL, one on an application's engine, and one on its session; the table has one row."""
    await set_up(place, keyring)
    async with AsyncExitStack() as stack:
        borrowed = await stack.enter_async_context(app_engine(place, **engine))
        session = await stack.enter_async_context(AsyncSession(borrowed))
        yield [
            await stack.enter_async_context(open_store(place.url, keyring=keyring)),
            await stack.enter_async_context(open_store(borrowed, keyring=keyring)),
            AuthTokenStore(session, keyring=keyring),
        ]
