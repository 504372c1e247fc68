"""A result that one thread, or one greenlet, waits for, and that the loop thread delivers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from tokenstore.errors import StoreClosedError
from tokenstore.native_threads import greenlets_for_threads, note_hub, original

__all__ = ["Promise"]

T = TypeVar("T")


class Promise(Generic[T]):
    """A result or an exception that will be there once.

    With gevent's monkey-patching, the other greenlets of the thread run while one of them waits.

    Args:
        block: Keep the whole thread waiting, also with gevent.
    """

    def __init__(self, *, block: bool = False) -> None:
        self._waiter = _GreenletWaiter() if greenlets_for_threads() and not block else _ThreadWaiter()
        self._lock = original("_thread", "allocate_lock")()
        self._settled = False
        self._result: Any = None
        self._error: BaseException | None = None

    def set(self, result: T) -> None:
        """Deliver the result, unless something was delivered before."""
        self._settle(result, None)

    def fail(self, error: BaseException) -> None:
        """Deliver an exception, unless something was delivered before."""
        self._settle(None, error)

    def _settle(self, result: Any, error: BaseException | None) -> None:
        with self._lock:
            if self._settled:
                return
            self._settled, self._result, self._error = True, result, error
        self._waiter.wake()

    def wait(self, interrupted: Callable[[], object]) -> T:
        """Return the result, or raise the exception.

        Args:
            interrupted: Called if the wait is ended by an exception: KeyboardInterrupt, a timeout of gevent, a time
                limit of Celery. The exception is raised.
        """
        try:
            self._waiter.wait()
        except BaseException:
            with suppress(StoreClosedError):  # the process is ending
                _ = interrupted()
            raise
        error, self._error = self._error, None
        if error is None:
            return self._result  # type: ignore[no-any-return]
        try:
            raise error
        finally:
            # The exception keeps this frame, which must not keep the exception.
            del error


class _ThreadWaiter:
    """Keeps a thread waiting. On POSIX, a signal's handler runs meanwhile, and may raise."""

    def __init__(self) -> None:
        self._done = original("_thread", "allocate_lock")()
        _ = self._done.acquire()

    def wake(self) -> None:
        self._done.release()

    def wait(self) -> None:
        _ = self._done.acquire()


class _GreenletWaiter:
    """Keeps a greenlet waiting, while its thread runs the others.

    Another thread may do nothing with a hub but send to an async watcher, as gevent's own pool of threads does.
    """

    def __init__(self) -> None:
        import gevent
        from gevent.event import Event

        self._lock = original("_thread", "allocate_lock")()
        self._done = Event()
        hub: Any = gevent.get_hub()
        note_hub(hub)
        self._watcher: Any = hub.loop.async_()
        self._watcher.start(self._done.set)

    def wake(self) -> None:
        with self._lock:
            if self._watcher is not None:
                self._watcher.send()

    def wait(self) -> None:
        try:
            _ = self._done.wait()
        finally:
            with self._lock:
                watcher, self._watcher = self._watcher, None
            watcher.stop()
            watcher.close()
