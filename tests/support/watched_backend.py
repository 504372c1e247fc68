"""A backend with one row, for tests of `watch`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tokenstore.protocol import SupportsWatching
from tokenstore.records import TokenKey
from tokenstore.registry import backend_for_url
from tokenstore.testing.conformance import sealed
from tokenstore_sql.backend import SQLBackend

KEY = TokenKey("github", "u1")


@asynccontextmanager
async def opened_backend(url: str, *, setup: bool = True, **options: Any) -> AsyncIterator[SQLBackend]:
    """Open a backend whose table has the row."""
    backend: Any = backend_for_url(url, options)
    try:
        if setup:
            await backend.setup()
            await backend.put(KEY, sealed())
        yield backend
    finally:
        await backend.aclose()


async def watched_for(backend: SupportsWatching) -> float:
    """Call `watch` and return how many seconds it took."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    await backend.watch(KEY)
    return loop.time() - started
