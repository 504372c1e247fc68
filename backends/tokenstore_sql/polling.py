"""How often a caller that waits for another holder's lease reads the row.

All processes of a fleet share one server. Each process may send a part of the reads that the server is to bear: with
``n`` connections to the server, ``k`` of them of this process, its part is ``k / n`` of the budget. All parts add up to
the budget, however many connections each process has.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, NamedTuple

from tokenstore.errors import TokenStoreError

__all__ = ["Clients", "PollInterval", "interval_for", "jittered"]

_BUDGET: Final = 430.0
"""Reads a second of all processes together. The statements that count connections come on top; the limit is 500."""
# With the jitter and the read itself, the shortest interval lets 95 % of waits end within 50 ms.
_SHORTEST, _LONGEST, _UNKNOWN = 0.036, 1.0, 0.100
_COUNT_TIMEOUT: Final = 1.0
_RECOUNT_AFTER: Final = 3.0
# A fleet whose processes have just begun to connect looks small, so it is counted again sooner.
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
    """Seconds between two reads of one process: 37 ms in a fleet of 16 equal processes, 233 ms in a fleet of 100."""
    return min(_LONGEST, max(_SHORTEST, clients.all / (max(1, clients.own) * _BUDGET)))


def jittered(seconds: float) -> float:
    """A time within 20 % of this one, so that waiting callers do not all read at once."""
    return seconds * random.uniform(0.8, 1.2)


class PollInterval:
    """The poll interval of one backend object, which follows the number of connections."""

    def __init__(self) -> None:
        self._interval = _UNKNOWN
        self._next_count = float("-inf")

    async def current(self, count: Callable[[], Awaitable[Clients]]) -> float:
        """Seconds to wait before the next read. Counts connections first, if the last count is some seconds old.

        A server that refuses to count connections, or fails to, does not make the wait fail.
        """
        now = asyncio.get_running_loop().time()
        if now >= self._next_count:
            # Set before counting: other callers ask meanwhile, and the count may fail.
            self._next_count = now + jittered(_RECOUNT_AFTER)
            with suppress(TokenStoreError, TimeoutError):
                async with asyncio.timeout(_COUNT_TIMEOUT):
                    self._interval = interval_for(await count())
                if self._interval == _SHORTEST:
                    self._next_count = now + jittered(_RECOUNT_SMALL_AFTER)
        return self._interval
