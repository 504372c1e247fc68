"""The thread whose event loop serves all synchronous stores of a process.

There is one for each process. It starts at the first call, so a store may be opened at import time and before a fork.
A forked process gets another one at its first call.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

from tokenstore.errors import StoreClosedError, UnsupportedOperationError
from tokenstore.event_loops import forks
from tokenstore.native_threads import greenlets_for_threads, original, start_thread
from tokenstore.store import AuthTokenStore
from tokenstore.sync.executor import DaemonThreads
from tokenstore.sync.waiting import Promise
from tokenstore.tracebacks import described

__all__ = ["LoopThread", "fulfil", "is_in_use", "loop_thread"]

T = TypeVar("T")

_logger = logging.getLogger("tokenstore.sync")

# The tasks that are left when all stores have been closed are given this long, in seconds.
_END_GRACE: Final = 10.0


class LoopThread:
    """A daemon thread that runs an event loop until the process ends.

    Attributes:
        stores: The stores that were used in it, and have not been closed.
    """

    def __init__(self) -> None:
        self.stores: set[AuthTokenStore] = set()
        self._forks = forks()
        self._ending = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._executor = DaemonThreads()
        self._ended: Promise[None] = Promise(block=True)
        started: Promise[asyncio.AbstractEventLoop] = Promise(block=True)
        start_thread(lambda: self._run(started), "tokenstore-sync")
        self._loop = started.wait(lambda: None)

    def serve(self, store: AuthTokenStore) -> None:
        """Note that a store is used, so that :meth:`end` closes it.

        Raises:
            StoreClosedError: The process is ending.
        """
        if self._ending:
            raise _process_ends()
        self.stores.add(store)

    def call(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run work in a task of the event loop, and wait for its result.

        If the wait is interrupted, the task is cancelled. A refresh, which does not belong to the task, goes on.

        Args:
            work: Returns the awaitable. It is called in the event loop.

        Raises:
            StoreClosedError: The process is ending.
        """
        promise: Promise[T] = Promise()
        tasks: list[asyncio.Task[None]] = []
        self.submit(lambda: tasks.append(self._loop.create_task(fulfil(promise, work))))

        def cancel() -> None:
            for task in tasks:
                _ = task.cancel()

        return promise.wait(lambda: self.submit(cancel))

    def submit(self, callback: Callable[[], object]) -> None:
        """Run a function in the event loop, and do not wait for it.

        Raises:
            StoreClosedError: The process is ending.
            UnsupportedOperationError: This process is a fork of the one that the thread belongs to.
        """
        if self._forks != forks():
            raise UnsupportedOperationError(
                "this iteration or transaction was begun before a fork, in the parent process; begin another one"
            )
        with suppress(RuntimeError):
            if not self._ending:
                _ = self._loop.call_soon_threadsafe(callback)
                return
        raise _process_ends()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a task for which nothing waits; to be called in the event loop."""
        task = self._loop.create_task(work)
        self._tasks.add(task)  # the event loop alone would not keep it alive
        task.add_done_callback(self._tasks.discard)

    def end(self) -> None:
        """Close all stores, then end the thread. Waits for refreshes in progress, as closing a store does.

        Raises:
            TokensNotStoredError: A provider has issued new tokens that cannot be written.
        """
        if self._ending:
            return
        stores = list(self.stores)
        self.stores.clear()

        async def close_all() -> list[BaseException | None]:
            return await asyncio.gather(*(store.aclose() for store in stores), return_exceptions=True)

        failures = self.call(close_all) if stores else []
        self._ending = True
        _ = self._loop.call_soon_threadsafe(self._loop.stop)
        self._ended.wait(lambda: None)
        for failure in failures:
            if failure is not None:
                raise failure

    def _run(self, started: Promise[asyncio.AbstractEventLoop]) -> None:
        try:
            loop = _new_event_loop()
            loop.set_default_executor(self._executor)
        except BaseException as error:  # noqa: BLE001 - the caller of the constructor gets it
            self._executor.shutdown()
            started.fail(error)
            return
        started.set(loop)
        try:
            while not self._ending:
                try:
                    loop.run_forever()
                except BaseException as error:  # noqa: BLE001 - other callers must not wait for ever
                    # A callback of the application has raised SystemExit, which asyncio lets through.
                    _logger.error("the event loop goes on after an exception: %s", described(error))  # noqa: TRY400
            _end_tasks(loop)
        finally:
            self._executor.shutdown()
            loop.close()
            self._ended.set(None)


async def fulfil(promise: Promise[T], work: Callable[[], Awaitable[T]]) -> None:
    """Deliver the result of work, or its exception. A cancellation is delivered, and raised again."""
    try:
        result = await work()
    except asyncio.CancelledError:
        promise.fail(_process_ends())
        raise
    except BaseException as error:  # noqa: BLE001 - the caller in the other thread gets it
        promise.fail(error)
    else:
        promise.set(result)
    finally:
        del promise, work


def _process_ends() -> StoreClosedError:
    return StoreClosedError("this process is ending, so its stores are closed")


def _new_event_loop() -> asyncio.AbstractEventLoop:
    if not greenlets_for_threads():
        return asyncio.new_event_loop()
    from tokenstore.sync import gevent_loop

    return gevent_loop.new_event_loop()


def _end_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel the tasks that are left, such as those of callers in daemon threads, and wait a moment for them."""
    loop.run_until_complete(asyncio.sleep(0))  # starts the tasks of calls that have just come
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        _ = task.cancel()
    if tasks:
        _ = loop.run_until_complete(asyncio.wait(tasks, timeout=_END_GRACE))
    loop.run_until_complete(loop.shutdown_asyncgens())


class _Process:
    """The loop thread of this process."""

    lock: Any = original("_thread", "allocate_lock")()
    thread: LoopThread | None = None
    inherited: Final[list[LoopThread]] = []

    @classmethod
    def note_fork(cls) -> None:
        """Forget the parent's thread, which does not run here, and touch nothing of it.

        Its objects are kept: some would tell the database, or the selector that the processes share, that they end.
        """
        cls.lock = original("_thread", "allocate_lock")()
        if cls.thread is not None:
            cls.inherited.append(cls.thread)
            cls.thread = None

    @classmethod
    def end(cls) -> None:
        if cls.thread is not None:
            cls.thread.end()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Process.note_fork)
# When this module is imported, and not at the first call: what an application registers later is called earlier, and
# may still use its stores.
_ = atexit.register(_Process.end)


def is_in_use(store: AuthTokenStore) -> bool:
    """Whether a store was used in this process's loop thread, and has not been closed."""
    thread = _Process.thread
    return thread is not None and store in thread.stores


def loop_thread() -> LoopThread:
    """This process's loop thread. It is started if need be.

    Raises:
        UnsupportedOperationError: The caller runs in an event loop, which would have to wait.
    """
    thread = _Process.thread
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        if thread is not None and loop is thread._loop:
            raise UnsupportedOperationError(
                "a call of tokenstore.sync from its own event loop, as in an async refresher or callback, would wait "
                "for itself; await the methods of `store.aio`, the async store"
            )
        raise UnsupportedOperationError(
            "a call of tokenstore.sync would block the running event loop; open a store for it with "
            "`tokenstore.open_store`, the async API, and await its methods"
        )
    if thread is None:
        with _Process.lock:
            if _Process.thread is None:
                with suppress(RuntimeError):
                    _Process.thread = LoopThread()
                if _Process.thread is None:  # outside the handler: no context
                    raise StoreClosedError(
                        "no thread can be started, because the process is ending, or has reached the machine's limit"
                    )
            thread = _Process.thread
    return thread
