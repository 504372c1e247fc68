"""A host that accepts connections and never answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def silent_host() -> AsyncIterator[str]:
    """Start one, and return its address with the port."""
    taken: list[asyncio.StreamWriter] = []
    listener = await asyncio.start_server(lambda _, writer: taken.append(writer), "127.0.0.1", 0)
    host, port = listener.sockets[0].getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        listener.close()
        for writer in taken:
            writer.close()
            await asyncio.wait_for(writer.wait_closed(), 5)
        await listener.wait_closed()
