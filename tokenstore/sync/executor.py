"""The threads in which the loop thread resolves host names and does other work that blocks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty
from typing import Any, Final

from tokenstore.native_threads import greenlets_for_threads, original, start_thread

__all__ = ["DaemonThreads"]

_LIMIT: Final = 32


class DaemonThreads(ThreadPoolExecutor):
    """An executor that works until the process is gone.

    :class:`~concurrent.futures.ThreadPoolExecutor` takes no work from the moment when the interpreter begins to end,
    which is before ``atexit``. Since Python 3.12 no thread can be started then, either. But a refresh that is under way
    at that time may still have to resolve a host name to write its tokens. So one thread is there from the beginning.
    Others are started when they are needed, and end when they are idle.
    """

    def __init__(self) -> None:
        super().__init__(max_workers=1)  # the base class, which event loops ask for, starts no thread by itself
        self._jobs: Any = original("queue", "SimpleQueue")()
        self._counting = original("_thread", "allocate_lock")()
        self._threads_running = 1
        self._unfinished = 0
        start_thread(self._work_always, "tokenstore-executor")

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a function in one of the threads."""
        done: Future[Any] = Future()
        with self._counting:
            self._unfinished += 1
            another = self._threads_running < min(self._unfinished, _LIMIT)
            self._threads_running += another
        self._jobs.put((done, fn, args, kwargs))
        if another:
            try:
                # With gevent, sockets belong to the thread that has made them, so the threads stay.
                work = self._work_always if greenlets_for_threads() else self._work_while_busy
                start_thread(work, "tokenstore-executor")
            except RuntimeError:  # the job waits for a thread that is there
                with self._counting:
                    self._threads_running -= 1
        return done

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002 - the base's
        """End the idle threads. Nothing waits for the work in progress."""
        self._jobs.put(None)

    def _work_always(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(*job)
            del job
        self._jobs.put(None)  # for the other threads

    def _work_while_busy(self) -> None:
        try:
            while (job := self._jobs.get_nowait()) is not None:
                self._do(*job)
                del job
            self._jobs.put(None)  # it was for the other thread
        except Empty:
            pass
        finally:
            with self._counting:
                self._threads_running -= 1

    def _do(self, done: Future[Any], fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - the event loop gets it
                done.set_exception(error)
        finally:
            with self._counting:
                self._unfinished -= 1
            del done, fn, args, kwargs
