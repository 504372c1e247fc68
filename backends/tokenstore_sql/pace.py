"""How often those who wait for somebody else's lease look at the row.

A server's statements are shared by the whole fleet. Each process may send so many a second as its share of the
connections to that server: with ``n`` connections, ``k`` of them of this process, ``k / n`` of the budget. All shares
add up to the budget, whatever the processes' pools are like.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, NamedTuple

from tokenstore.errors import TokenStoreError

__all__ = ["Clients", "Pace", "interval_for", "jittered"]

_BUDGET: Final = 430.0
"""Reads a second of all processes together. Counting comes on top: 500 is the limit."""
# With the jitter and the read itself, the shortest lets 95 % of waits end within 50 ms.
_SHORTEST, _LONGEST, _UNKNOWN = 0.036, 1.0, 0.100
_COUNT_TIMEOUT: Final = 1.0
_RECOUNT_AFTER: Final = 3.0
# A fleet that has just begun to connect looks small.
_RECOUNT_SMALL_AFTER: Final = 1.0


class Clients(NamedTuple):
    """Connections to a server.

    Attributes:
        all: Of every process with this user and database, as the server counts them.
        own: Of this process.
    """

    all: int
    own: int


def interval_for(clients: Clients) -> float:
    """Seconds between two reads of one process: 37 ms for 16 processes that are alike, 233 ms for 100."""
    return min(_LONGEST, max(_SHORTEST, clients.all / (max(1, clients.own) * _BUDGET)))


def jittered(seconds: float) -> float:
    """A time within 20 % of this one, so that waiters do not come all at once."""
    return seconds * random.uniform(0.8, 1.2)


class Pace:
    """The interval of one backend object, which follows the number of clients."""

    def __init__(self) -> None:
        self._interval = _UNKNOWN
        self._next_count = float("-inf")

    async def interval(self, count: Callable[[], Awaitable[Clients]]) -> float:
        """Seconds to wait before the next read; counts first, if the last count is some seconds old.

        A server that refuses to count, or fails, does not make the wait fail.
        """
        now = asyncio.get_running_loop().time()
        if now >= self._next_count:
            self._next_count = now + jittered(_RECOUNT_AFTER)  # for others who ask meanwhile, and if it fails
            with suppress(TokenStoreError, TimeoutError):
                async with asyncio.timeout(_COUNT_TIMEOUT):
                    self._interval = interval_for(await count())
                if self._interval == _SHORTEST:
                    self._next_count = now + jittered(_RECOUNT_SMALL_AFTER)
        return self._interval
