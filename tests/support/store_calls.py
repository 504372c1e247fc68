"""Calls of a store that must find tokens."""

from __future__ import annotations

import asyncio
from typing import Any

from tokenstore import AuthTokenStore, RefreshResult, TokenRecord


async def load(store: AuthTokenStore, user: str = "u1") -> TokenRecord:
    """Return the record of `load_tokens`; fail if there is none."""
    record = await store.load_tokens("github", user)
    assert record is not None
    return record


async def fresh(store: AuthTokenStore, user: str = "u1", **options: Any) -> TokenRecord:
    """Return the record of `load_fresh_tokens`; fail if there is none."""
    record: TokenRecord | None = await store.load_fresh_tokens("github", user, **options)
    assert record is not None
    return record


async def many(count: int, *stores: AuthTokenStore, **options: Any) -> list[Any]:
    """Let so many callers of each store call `load_fresh_tokens` at once; return their records or errors."""
    calls = [fresh(store, **options) for store in stores for _ in range(count)]
    return await asyncio.gather(*calls, return_exceptions=True)


async def due(store: AuthTokenStore, **options: Any) -> list[RefreshResult]:
    """Return the result of `refresh_due` for each row."""
    return [result async for result in store.refresh_due(**options)]
