"""Limits the calls of each provider by this process, so that a provider that hangs or fails costs its own users alone.

Every call holds a connection to the provider. Without a limit, the calls of a provider that hangs would use up the
process's file descriptors. And a provider that is down or overloaded is not helped by one more call for each user.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from typing import Final

from tokenstore.records import Failure

__all__ = ["DEFAULT_CONCURRENCY", "ProviderGate", "ProviderGates"]

DEFAULT_CONCURRENCY: Final = 32
"""How many calls of one provider are made at a time, by default."""

_US = 1_000_000
# The calls of so many users have to fail, without a success among them, for the provider to count as down.
_DOWN_AFTER = 3
# How long no call is made then, in seconds: the first time, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 60.0


class ProviderGate:
    """The calls of one provider: a limited number at a time, and none during a pause.

    A pause begins when the provider asks for one (429 or 503), or when the calls of three users have failed without a
    success among them. After it, one call at a time is made until one succeeds; each failure doubles the pause. Pauses
    are judged by the database's clock, like the failures in the rows.

    Args:
        limit: The most calls at a time.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_flight = 0
        self._queue: deque[asyncio.Future[bool]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failing: set[str] = set()
        self._next_pause = _FIRST_PAUSE
        self._paused_until = 0
        self._code = ""

    @property
    def in_flight(self) -> int:
        """How many calls are in flight."""
        return self._in_flight

    def pause(self, now: int) -> Failure | None:
        """The failure that callers get while no call is made; ``now``: microseconds since the epoch."""
        left = self._paused_until - now
        return Failure(self._code, left / _US) if left > 0 else None

    async def enter(self) -> bool:
        """Wait until a call may be made. Returns False, at once, when a pause begins meanwhile."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # calls of an event loop that was closed never end
            self._loop, self._in_flight = loop, 0
            self._queue.clear()
        place: asyncio.Future[bool] = loop.create_future()
        self._queue.append(place)
        self._admit()
        try:
            return await place
        except asyncio.CancelledError:
            # The place may have been given just as its owner was cancelled; pass it on.
            if place.done() and not place.cancelled() and place.result():
                self.leave(loop)
            raise

    def leave(self, loop: asyncio.AbstractEventLoop) -> None:
        """End a call that :meth:`enter` admitted in this event loop."""
        if self._loop is loop:
            self._in_flight -= 1
            self._admit()

    def succeeded(self) -> None:
        """The provider has answered, even if it refused the client or the refresh token."""
        self._failing.clear()
        self._next_pause = _FIRST_PAUSE

    def failed(self, user_id: str, code: str, now: int, requested: float | None) -> float | None:
        """Count an outage.

        Args:
            user_id: Whose call failed.
            code: The failure's code.
            now: Microseconds since the epoch.
            requested: How long the provider asked not to be called, in seconds; None: it did not ask.

        Returns:
            The length of the pause that begins now, in seconds, or None.
        """
        if len(self._failing) < _DOWN_AFTER:
            self._failing.add(user_id)
        if self.pause(now) is not None:
            return None
        if requested is None:
            if len(self._failing) < _DOWN_AFTER:
                return None
            requested, self._next_pause = self._next_pause, min(self._next_pause * 2, _LONGEST_PAUSE)
        # Never shorter than the provider asked, and at most a minute: it may have asked on account of one user.
        length = min(requested, _LONGEST_PAUSE) * random.uniform(1.0, 1.25)  # noqa: S311 - spreads a fleet's calls
        if length <= 0:
            return None
        self._paused_until, self._code = now + int(length * _US), code
        while self._queue:
            if not (place := self._queue.popleft()).done():
                place.set_result(False)
        return length

    def _admit(self) -> None:
        limit = 1 if len(self._failing) >= _DOWN_AFTER else self._limit
        while self._queue and self._in_flight < limit:
            if not (place := self._queue.popleft()).done():
                self._in_flight += 1
                place.set_result(True)


class ProviderGates:
    """The gates of all providers of one store.

    Args:
        limit: The most calls of each provider at a time.
    """

    def __init__(self, limit: int = DEFAULT_CONCURRENCY) -> None:
        self._limit = limit
        self._gates: dict[str, ProviderGate] = {}

    def of(self, provider: str) -> ProviderGate:
        """The provider's gate."""
        return self._gates.setdefault(provider, ProviderGate(self._limit))
