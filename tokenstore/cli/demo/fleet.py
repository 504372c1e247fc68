"""The demo's worker processes, as the parent process sees them, and how the demo ends when it is interrupted."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Final, Self, cast

from tokenstore.cli.demo.plan import Plan, WorkerFailure
from tokenstore.cli.demo.worker import run_worker
from tokenstore.errors import BackendError

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

__all__ = ["CLEANUP_TIMEOUT", "Fleet", "Interrupts"]

CLEANUP_TIMEOUT: Final = 10.0
"""How long the end of the worker processes, and the removal of the table, may take, in seconds."""

# A worker process that sends nothing for so long has failed, in seconds.
_WORKER_TIMEOUT: Final = 60.0


class Fleet:
    """The worker processes. Each has a pipe to the parent process; among themselves they share the database alone."""

    def __init__(self, plan: Plan, processes: int, interrupts: Interrupts) -> None:
        self._plan = plan
        self._size = processes
        self._interrupts = interrupts
        self._processes: list[SpawnProcess] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> Self:
        context = get_context("spawn")
        try:
            with self._interrupts.kept_from_children():
                for number in range(self._size):
                    ours, theirs = context.Pipe()
                    self._pipes.append(ours)
                    with theirs:
                        arguments = theirs, self._plan
                        process = context.Process(target=run_worker, args=arguments, name=f"demo-{number}", daemon=True)
                        process.start()
                    self._processes.append(process)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        for pipe in self._pipes:
            pipe.close()  # a worker process that waits for the next round then ends
        deadline = time.monotonic() + CLEANUP_TIMEOUT
        for process in self._processes:
            if any(exc_info):
                process.terminate()
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()

    def __len__(self) -> int:
        return self._size

    def tell(self, word: object) -> None:
        """Send a message to all worker processes."""
        for pipe in self._pipes:
            with suppress(BrokenPipeError):  # hear() raises the reason
                pipe.send(word)

    def hear(self, each: int = 1) -> Iterator[tuple[int, Any]]:
        """Receive ``each`` messages of every worker process, in the order in which they arrive, with its number.

        Raises:
            BackendError: A worker process failed, or sent nothing for too long.
        """
        missing = dict.fromkeys(self._pipes, each)
        deadline = time.monotonic() + _WORKER_TIMEOUT
        while missing:
            self._interrupts.check()
            ready = wait(list(missing), timeout=0.1)
            if not ready and time.monotonic() > deadline:
                raise BackendError(f"{len(missing)} of the demo's processes sent nothing for {_WORKER_TIMEOUT:g} s")
            for pipe in cast(list[Connection], ready):
                try:
                    message = pipe.recv()
                except (EOFError, ConnectionError):
                    message = WorkerFailure("one of the demo's processes died")
                if isinstance(message, WorkerFailure):
                    raise BackendError(message.message)
                yield self._pipes.index(pipe), message
                missing[pipe] -= 1
                if not missing[pipe]:
                    del missing[pipe]


class Interrupts:
    """Delays Ctrl-C and SIGTERM until the processes and the table can be removed. A second signal is not delayed."""

    def __init__(self) -> None:
        self._caught = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python handles signals in the main thread alone
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        repeated = self._caught != 0
        self._caught = number
        if repeated:
            self.check()

    def check(self) -> None:
        """End now if a signal was received. Called where that is safe."""
        if self._caught == signal.SIGINT:
            raise KeyboardInterrupt
        if self._caught:
            sys.exit(128 + self._caught)

    @contextmanager
    def kept_from_children(self) -> Iterator[None]:
        """Let processes that are started inside ignore Ctrl-C, which a terminal sends to all. The parent ends them."""
        if not self._before:
            yield
            return
        ours = signal.signal(signal.SIGINT, signal.SIG_IGN)  # child processes inherit this
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, ours)
