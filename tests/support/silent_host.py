"""Hosts that accept connections and do not answer: never, or from some time on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Self


@asynccontextmanager
async def silent_host() -> AsyncIterator[str]:
    """Start a host that never answers, and return its address with the port."""
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


class FreezingHost:
    """A host that passes everything on to a server until it is frozen; then it is silent, also to new connections.

    Args:
        server: The host and the port of the server.

    Attributes:
        address: Its address with the port, once it has started.
        frozen: Whether it is frozen.
    """

    def __init__(self, server: tuple[str, int]) -> None:
        self._server = server
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""
        self.frozen = False

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._start, "127.0.0.1", 0)
        host, port = self._listener.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._listener.wait_closed()

    def _start(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            await self._while_frozen()
            there, to_server = await asyncio.open_connection(*self._server)
            writers.append(to_server)
            await asyncio.gather(self._pass_on(reader, to_server), self._pass_on(there, writer))
        except ConnectionError:
            pass
        finally:
            for each in writers:
                each.close()
            for each in writers:
                with suppress(ConnectionError):
                    await each.wait_closed()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._while_frozen()
            writer.write(data)
        writer.close()

    async def _while_frozen(self) -> None:
        if self.frozen:
            await asyncio.Event().wait()
