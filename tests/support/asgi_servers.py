"""Runs an ASGI application with uvicorn, in a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn

__all__ = ["serving_asgi"]


class _Server(uvicorn.Server):
    """Tells when it serves, or has failed to."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        finally:
            self.ready.set()

    def serve_in_thread(self, listener: socket.socket) -> None:
        try:
            with suppress(SystemExit):  # uvicorn's end after a lifespan that failed to start
                self.run(sockets=[listener])
        finally:
            self.ready.set()


@contextmanager
def serving_asgi(app: Any, listener: socket.socket | None = None) -> Iterator[str]:
    """Serve an application on the loopback interface until the block ends. Yields its address, without a scheme.

    Args:
        app: The application.
        listener: A listening socket, which is closed at the end, for an application that has to know its own address.

    Raises:
        RuntimeError: The application's lifespan failed.
    """
    with listener or socket.create_server(("127.0.0.1", 0)) as listening:
        # uvicorn would take a method for an application of ASGI 2.
        config = uvicorn.Config(
            app, interface="asgi3", log_config=None, access_log=False, lifespan="on", loop="asyncio"
        )
        server = _Server(config)
        thread = threading.Thread(target=server.serve_in_thread, args=(listening,))
        thread.start()
        try:
            server.ready.wait()
            if not server.started:
                raise RuntimeError("the application did not start")
            host, port = listening.getsockname()
            yield f"{host}:{port}"
        finally:
            server.should_exit = True
            thread.join()
