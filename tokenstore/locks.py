"""Locks by key between the tasks of one event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable

__all__ = ["KeyedLocks"]


class KeyedLocks:
    """One fair lock for each key. A key that no task holds or waits for uses no memory."""

    def __init__(self) -> None:
        # For each key that is held, the tasks that wait for it, in the order of their arrival.
        self._held: dict[Hashable, deque[asyncio.Future[None]]] = {}

    async def acquire(self, key: Hashable, timeout: float) -> None:
        """Wait for the key's lock and take it.

        Raises:
            TimeoutError: It was not free within ``timeout`` seconds.
        """
        waiting = self._held.get(key)
        if waiting is None:
            self._held[key] = deque()
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.append(granted)
        try:
            async with asyncio.timeout(timeout):
                await granted
        except BaseException:
            # The lock arrived at the same moment as the cancellation or the timeout: pass it on.
            if granted.done() and not granted.cancelled():
                self.release(key)
            granted.cancel()
            raise

    def release(self, key: Hashable) -> None:
        """Give a key's lock to the task that has waited longest."""
        waiting = self._held[key]
        while waiting:
            granted = waiting.popleft()
            if not granted.done():
                granted.set_result(None)
                return
        del self._held[key]
