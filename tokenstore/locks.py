"""Locks by key between the tasks of one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from weakref import WeakValueDictionary

__all__ = ["KeyedLocks"]


class KeyedLocks:
    """One fair lock for each key in use; a key that nobody holds or awaits costs nothing."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[Hashable, asyncio.Lock] = WeakValueDictionary()

    async def acquire(self, key: Hashable, timeout: float) -> asyncio.Lock:
        """Wait for the key's lock and take it; the caller keeps the returned lock and releases it.

        Raises:
            TimeoutError: It was not free within ``timeout`` seconds.
        """
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
            await lock.acquire()  # nobody else knows it: there is no wait to limit
            return lock
        async with asyncio.timeout(timeout):
            await lock.acquire()
        return lock
