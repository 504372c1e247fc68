"""Locks by key between the tasks of one event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable

__all__ = ["KeyedLocks"]


class KeyedLocks:
    """One fair lock for each key in use; a key that nobody holds or awaits costs nothing."""

    def __init__(self) -> None:
        # Whoever waits for a key that somebody holds, the longest first.
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
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.append(turn)
        try:
            async with asyncio.timeout(timeout):
                await turn
        except BaseException:
            # What came in the same moment goes to the next in line.
            if turn.done() and not turn.cancelled():
                self.release(key)
            turn.cancel()
            raise

    def release(self, key: Hashable) -> None:
        """Give a key's lock to the next in line."""
        waiting = self._held[key]
        while waiting:
            turn = waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        del self._held[key]
