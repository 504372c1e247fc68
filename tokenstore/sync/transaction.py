"""A transaction of a synchronous store: one task of the loop thread holds it, and runs every call in it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import NamedTuple, TypeVar

from tokenstore.errors import StoreClosedError
from tokenstore.operations import TokenOperations as AsyncTokenOperations
from tokenstore.sync.loop_thread import LoopThread, fulfil
from tokenstore.sync.operations import TokenOperations
from tokenstore.sync.waiting import Promise
from tokenstore.tracebacks import clears_locals
from tokenstore.transaction import Transaction as AsyncTransaction

__all__ = ["OpenTransaction", "Transaction"]

T = TypeVar("T")


class Transaction(TokenOperations):
    """One open transaction of a store, from ``with store.transaction() as tx``.

    After a :class:`BackendError`, and after a call whose wait was interrupted, the block can only be left: the
    transaction is rolled back, and leaving the block without an exception raises an error.
    """

    def __init__(self, task: _TransactionTask, open_transaction: AsyncTransaction) -> None:
        self._task = task
        self._transaction = open_transaction

    @property
    def _tokens(self) -> AsyncTokenOperations:
        return self._transaction

    def _run(self, work: Callable[[AsyncTokenOperations], Awaitable[T]]) -> T:
        return self._task.run(lambda: work(self._transaction))


class OpenTransaction(AbstractContextManager[Transaction]):
    """What ``store.transaction()`` returns.

    Args:
        begin: Returns the loop thread, and the async context manager of the transaction.
    """

    def __init__(self, begin: Callable[[], tuple[LoopThread, AbstractAsyncContextManager[AsyncTransaction]]]) -> None:
        self._begin = begin
        self._task: _TransactionTask | None = None

    @clears_locals
    def __enter__(self) -> Transaction:
        task = _TransactionTask(*self._begin())
        opened = Transaction(task, task.begin())
        self._task = task
        return opened

    @clears_locals
    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.end(roll_back=exc_type is not None)


class _RollBackError(Exception):
    """Leaves the async transaction so that it is rolled back."""


class _TransactionTask:
    """A task that is inside of an async transaction.

    Locks, time limits and cancellations belong to a task, so one task makes all calls of the transaction.

    Args:
        thread: The loop thread.
        manager: The async transaction.
    """

    def __init__(self, thread: LoopThread, manager: AbstractAsyncContextManager[AsyncTransaction]) -> None:
        self._thread = thread
        self._manager = manager
        self._begun: Promise[AsyncTransaction] = Promise()
        self._ended: Promise[None] = Promise()
        # The following belong to the event loop.
        self._task: asyncio.Task[None] | None = None
        self._calls: asyncio.Queue[_Call | None] = asyncio.Queue()
        self._is_over = False
        self._rolls_back = False
        self._was_interrupted = False

    def begin(self) -> AsyncTransaction:
        """Begin the transaction."""
        self._thread.submit(self._start)
        return self._begun.wait(self._interrupt)

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run a call inside of the transaction. If its wait is interrupted, the transaction is rolled back.

        Raises:
            StoreClosedError: The transaction is over.
        """
        promise: Promise[T] = Promise()
        self._thread.submit(lambda: self._put(_Call(promise.fail, lambda: fulfil(promise, work))))
        return promise.wait(self._interrupt)

    def end(self, *, roll_back: bool) -> None:
        """Commit, or roll back.

        Raises:
            StoreClosedError: It was to be committed, and was rolled back because a call had failed or was interrupted.
        """

        def leave() -> None:
            self._rolls_back = roll_back
            self._put(None)

        self._thread.submit(leave)
        try:
            self._ended.wait(self._interrupt)
        except StoreClosedError:  # an interrupted call has ended it, or the process is ending
            if not roll_back:
                raise  # otherwise the exception with which the block is left says more

    def _start(self) -> None:
        self._task = asyncio.create_task(self._serve())

    def _put(self, call: _Call | None) -> None:
        if not self._is_over:
            self._calls.put_nowait(call)
        elif call is not None:
            call.fail(self._over())

    def _interrupt(self) -> None:
        def cancel() -> None:
            if self._task is not None and not self._task.done():
                self._was_interrupted = True
                _ = self._task.cancel()

        self._thread.submit(cancel)

    async def _serve(self) -> None:
        failure: BaseException | None = None
        try:
            async with self._manager as opened:
                self._begun.set(opened)
                while (call := await self._calls.get()) is not None:
                    await call.work()
                if self._rolls_back:
                    raise _RollBackError
        except _RollBackError:
            pass
        except asyncio.CancelledError:
            failure = self._over()
        except BaseException as error:  # noqa: BLE001 - the caller in the other thread gets it
            failure = error
        self._is_over = True
        while not self._calls.empty():
            if (call := self._calls.get_nowait()) is not None:
                call.fail(self._over())
        if failure is None:
            self._ended.set(None)
        else:
            self._begun.fail(failure)
            self._ended.fail(failure)
        del failure

    def _over(self) -> StoreClosedError:
        if self._was_interrupted:
            return StoreClosedError(
                "a call in this transaction was interrupted, so it is rolled back; start again with a new transaction"
            )
        return StoreClosedError("this transaction has ended; open another with `with store.transaction()`")


class _Call(NamedTuple):
    """A call inside of a transaction.

    Attributes:
        fail: Delivers an exception in place of a result.
        work: Runs the call, and delivers its result.
    """

    fail: Callable[[BaseException], None]
    work: Callable[[], Awaitable[None]]
