"""Which process and event loop an object belongs to."""

from __future__ import annotations

import asyncio
import os
import threading

from tokenstore.errors import UnsupportedOperationError

__all__ = ["HomeLoop", "forks"]


class _Process:
    """Tells a process from the one that it was forked from, without a system call at each use."""

    forks = 0

    @classmethod
    def note_fork(cls) -> None:
        cls.forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Process.note_fork)


def forks() -> int:
    """How many forks there are between the first process and this one."""
    return _Process.forks


class HomeLoop:
    """The process and event loop that an object with connections belongs to.

    Connections serve one event loop. They do not survive a fork, nor the end of their event loop.
    """

    def __init__(self) -> None:
        self._forks = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def moved(self, *, exclusive: bool = True) -> bool:
        """Make the running event loop the home.

        Args:
            exclusive: Whether the object may serve one event loop alone.

        Returns:
            Whether the home was another process, or another event loop, before.

        Raises:
            UnsupportedOperationError: The home is another event loop, which still runs, in this process; or there is
                no event loop of asyncio.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise UnsupportedOperationError(
                "no asyncio event loop is running here; tokenstore works with asyncio, not with trio"
            ) from None
        if loop is self._loop and self._forks == forks():
            return False
        return self._move(loop, exclusive)

    def _move(self, loop: asyncio.AbstractEventLoop, exclusive: bool) -> bool:
        if self._forks != forks():
            self._lock = threading.Lock()  # a thread of the parent process may have held it during the fork
        with self._lock:  # event loops of several threads may come at once
            former, same_process = self._loop, self._forks == forks()
            if former is not None and former is not loop and exclusive and same_process and not former.is_closed():
                raise UnsupportedOperationError(
                    "this store is in use by another event loop; open one store for each event loop"
                )
            self._loop, self._forks = loop, forks()
            return former is not None
