"""A time limit for waiting for a database's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import copy_context
from time import monotonic
from types import TracebackType
from typing import Final

__all__ = ["Deadline"]

# A timer that is later than this, in seconds, tells that the event loop was blocked.
_STALLED: Final = 0.5


class Deadline:
    """Limits waits, as ``asyncio.timeout`` does, with one timer for all of them: that of the wait that began first.

    A timer for each wait would cost more than opening the record that the wait is for.

    Args:
        limit: The longest wait, in seconds.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        # All waits have the same limit, so the first to begin is the first to end.
        self.waits: dict[_Wait, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def limited(self, failure: Callable[[], Exception]) -> _Wait:
        """A context manager around a wait. When the wait takes too long, it raises what ``failure`` returns."""
        return _Wait(self, failure)

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the timer, unless it runs."""
        if self._timer is None:
            self._start_timer(loop, self.limit)

    def _start_timer(self, loop: asyncio.AbstractEventLoop, delay: float) -> None:
        self._timer = loop.call_later(delay, self._end_overdue, loop, monotonic() + delay)

    def _end_overdue(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self._timer = None
        now = monotonic()
        if now - due > _STALLED:
            # Something blocked the event loop, so the answers may have arrived in time and not have been read yet.
            self._start_timer(loop, _STALLED)
            return
        for wait in self.waits:
            if wait.until > now:
                self._start_timer(loop, wait.until - now)
                break
            wait.end()


class _Wait:
    """One wait of one task."""

    __slots__ = ("_cancellations", "_context", "_deadline", "_ended", "_failure", "_task", "until")

    def __init__(self, deadline: Deadline, failure: Callable[[], Exception]) -> None:
        self._deadline = deadline
        self._failure = failure
        self._ended = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a deadline needs a running task")
        self._task = task
        self._context = copy_context()
        self._cancellations = task.cancelling()
        self.until = monotonic() + self._deadline.limit
        self._deadline.waits[self] = None
        self._deadline.watch(task.get_loop())

    def end(self) -> None:
        """Cancel the wait: it has lasted too long."""
        if not self._ended:
            self._ended = True
            # In the waiting task's context: a task may refuse cancellations from outside, and this is not one.
            self._context.run(self._task.cancel)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del self._deadline.waits[self]
        # A cancellation by this deadline is told from one by other code as asyncio.timeout does it.
        if self._ended and self._task.uncancel() <= self._cancellations and kind is asyncio.CancelledError:
            raise self._failure() from None
