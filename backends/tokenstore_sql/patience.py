"""An end to waiting for a connection that is dead without a word."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any

__all__ = ["Patience"]

Task = asyncio.Task[Any]


class Patience:
    """Cancels tasks that have waited for too long.

    As ``asyncio.timeout`` does, but with one timer for all tasks: it looks now and then, so the limit may be exceeded
    by a quarter. A timer for each would cost as much as opening the record that they wait for.

    Args:
        limit: In seconds.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._since: dict[Task, float] = {}
        self._ended: set[Task] = set()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> Task:
        """The current task waits from now on."""
        task: Task | None = asyncio.current_task()
        assert task is not None  # noqa: S101 - this is called in coroutines alone
        self._since[task] = monotonic()
        if self._timer is None:
            self._timer = task.get_loop().call_later(self._limit / 4, self._look)
        return task

    def ended(self, task: Task) -> bool:
        """Whether it is from here that the task was cancelled, and from nowhere else."""
        return task in self._ended and task.uncancel() == 0

    def end(self, task: Task) -> None:
        """The task has its answer, or none."""
        del self._since[task]
        self._ended.discard(task)

    def _look(self) -> None:
        self._timer = None
        for task, since in self._since.items():
            loop = task.get_loop()
            if task not in self._ended and monotonic() - since > self._limit:
                self._ended.add(task)
                task.cancel()
            if self._timer is None:
                self._timer = loop.call_later(self._limit / 4, self._look)
