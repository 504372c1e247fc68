"""Pauses between the tries of a statement that the database does not carry out."""

from __future__ import annotations

import asyncio
import random
import time

from tokenstore.errors import BackendError

__all__ = ["Backoff"]

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0
# For so long, in seconds, a statement is tried again before its error is raised.
_RETRY_TIMEOUT = 3.0


class Backoff:
    """Pauses that double from one try to the next, up to one second."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin again with the shortest pause, because a statement was carried out."""
        self._retry_until: float | None = None
        self._pause = _SHORTEST_PAUSE

    async def pause(self, error: BackendError | None = None) -> None:
        """Wait before the next try.

        Args:
            error: The error of the last try. It is raised when the tries have gone on for three seconds. None: there is
                no limit.
        """
        now = time.monotonic()
        if self._retry_until is None:
            self._retry_until = now + _RETRY_TIMEOUT
        if error is not None and now >= self._retry_until:
            raise error
        await asyncio.sleep(self._pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads a fleet's tries; no secret
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)
