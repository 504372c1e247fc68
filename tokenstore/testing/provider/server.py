"""The strict provider's HTTP server, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress

from tokenstore.testing.provider.messages import MAX_BYTES, HttpError, Reply, Request, read_request

__all__ = ["LoopbackServer"]

_BACKLOG = 1024  # many workers may connect before the event loop's thread accepts the first connection


class LoopbackServer:
    """Serves HTTP on ``127.0.0.1`` from a background thread. If it is started again, it keeps its port.

    Args:
        answer: Called in the thread's event loop: returns the response when it is due, or None to close the connection
            instead.
        port: The port to listen on; 0: any free port.
        clock: Seconds since the epoch, for the header ``Date``.
    """

    def __init__(
        self, answer: Callable[[Request], Awaitable[Reply | None]], *, port: int, clock: Callable[[], float]
    ) -> None:
        self.port = port
        self._answer = answer
        self._clock = clock
        self._thread: threading.Thread | None = None
        self._shutdown: Callable[[], object] = lambda: None

    @property
    def is_running(self) -> bool:
        """Whether it listens."""
        return self._thread is not None

    def start(self) -> None:
        """Listen, and serve requests in a background thread. Does nothing if it is running."""
        if self._thread is not None:
            return
        listener = socket.create_server(("127.0.0.1", self.port), backlog=_BACKLOG)
        self.port = listener.getsockname()[1]
        ready: Future[Callable[[], object]] = Future()
        # A daemon thread, so that a provider that was not stopped cannot keep the interpreter from exiting.
        thread = threading.Thread(target=self._run, args=(listener, ready), name=f"provider-{self.port}", daemon=True)
        thread.start()
        self._shutdown = ready.result()
        self._thread = thread

    def stop(self) -> None:
        """Stop listening, and close all connections. Does nothing if it is not running."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._shutdown()
            thread.join()

    def _run(self, listener: socket.socket, ready: Future[Callable[[], object]]) -> None:
        try:
            # A selector event loop, whatever the process's event loop policy, because `_serve` needs `add_reader`.
            with listener, asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                runner.run(self._serve(listener, ready))
        except BaseException as exc:
            if ready.done():
                raise
            ready.set_exception(exc)

    async def _serve(self, listener: socket.socket, ready: Future[Callable[[], object]]) -> None:
        loop, stopping = asyncio.get_running_loop(), asyncio.Event()
        connections: set[asyncio.Task[None]] = set()

        # Not `asyncio.start_server`: when closed, it leaks connections that it has accepted but not passed on yet.
        def accept() -> None:
            with suppress(OSError):  # the client has closed the connection already
                connection, _ = listener.accept()
                connection.setblocking(False)
                task = loop.create_task(self._serve_connection(connection))
                connections.add(task)
                task.add_done_callback(connections.discard)

        listener.setblocking(False)
        loop.add_reader(listener, accept)
        ready.set_result(lambda: loop.call_soon_threadsafe(stopping.set))
        await stopping.wait()
        loop.remove_reader(listener)
        await asyncio.sleep(0)  # a task cancelled before its first step would not close its connection
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve_connection(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection, limit=MAX_BYTES)
        keep_alive = True
        try:
            while keep_alive:
                head_only = False
                try:
                    request = await read_request(reader, writer)
                except HttpError as error:  # the next request's start is unknown: respond, then close
                    reply, keep_alive = error.reply, False
                else:
                    answer = await self._answer(request)
                    if answer is None:
                        return
                    reply, keep_alive = answer, request.keep_alive
                    head_only = request.method == "HEAD"
                now = self._clock()
                writer.write(reply.encode(now=now, head_only=head_only, keep_alive=keep_alive))
                await writer.drain()
            # Read to the end: closing a socket with unread input resets the connection, which can lose the response.
            writer.write_eof()
            async with asyncio.timeout(1):
                while await reader.read(MAX_BYTES):
                    pass
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client closed the connection, or did not do so in time (TimeoutError is an OSError)
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        finally:
            writer.close()
