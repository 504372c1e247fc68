"""The event loop of the loop thread in a process that gevent has patched.

The loop thread is a thread of the operating system, and gevent gives each of these a hub of its own. Libraries that
start a "thread" in the loop thread get a greenlet of that hub, as aiosqlite does. So the hub has to run while the event
loop waits. asyncio's own functions for threads do not work with greenlets, so the event loop gets an executor with real
threads.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Mapping
from typing import Any

import gevent
from gevent.socket import wait

from tokenstore.native_threads import original

__all__ = ["new_event_loop"]


def new_event_loop() -> asyncio.AbstractEventLoop:
    """An event loop for the loop thread; to be called in it."""
    return _GeventLoop()


class _GeventLoop(asyncio.SelectorEventLoop):
    """An event loop that runs gevent's hub while it waits, and resolves host names in real threads.

    The sockets that asyncio makes are gevent's. They are non-blocking, and such a socket of gevent never uses its hub.
    """

    def __init__(self) -> None:
        super().__init__(_HubSelector())

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:
        """Resolve a name, without gevent's resolver, which would start threads for each thread."""
        return await self.run_in_executor(None, lambda: original("socket", "getaddrinfo")(host, port, **options))

    async def getnameinfo(self, sockaddr: Any, flags: int = 0) -> Any:
        """Resolve an address."""
        return await self.run_in_executor(None, original("socket", "getnameinfo"), sockaddr, flags)


class _HubSelector(selectors.BaseSelector):
    """The selector that Python has without gevent, which waits in the hub of its thread.

    The system call that waits is replaced by one that does not, and the hub waits for the selector's own descriptor.
    """

    def __init__(self) -> None:
        self._selector: Any = original("selectors", "DefaultSelector")()
        self._ready = gevent.get_hub().loop.io(self._selector.fileno(), 1)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        gevent.sleep(0)  # a busy event loop must leave time to greenlets
        found: list[tuple[selectors.SelectorKey, int]] = self._selector.select(0)
        if found or (timeout is not None and timeout <= 0):
            return found
        try:
            wait(self._ready, timeout, _WaitedError())
        except _WaitedError:
            return []
        return self._selector.select(0)  # type: ignore[no-any-return]

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._selector.register(fileobj, events, data)  # type: ignore[no-any-return]

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._selector.unregister(fileobj)  # type: ignore[no-any-return]

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._selector.modify(fileobj, events, data)  # type: ignore[no-any-return]

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._selector.get_map()  # type: ignore[no-any-return]

    def close(self) -> None:
        self._ready.stop()
        self._ready.close()
        self._selector.close()


class _WaitedError(Exception):
    """The hub has waited for as long as it should."""
