"""Worker processes. Each has its own event loop and connections, and runs the calls that the controller sends."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from benchmarks.bench import Bench
from benchmarks.databases import Database
from benchmarks.settings import Settings

__all__ = ["WorkerError", "Workers", "loop_factory"]

# Workers are forked from a server process that has imported everything, so that they start fast.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["benchmarks.bench", "benchmarks.peers", "tokenstore_sql.backend"])


class WorkerError(RuntimeError):
    """A worker failed; the message is the worker's traceback."""


class Workers:
    """Workers on one database. They end with the ``with`` block."""

    def __init__(self, number: int, loop: str, database: Database, settings: Settings) -> None:
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(number):
            pipe, worker_end = _context.Pipe()
            process = _context.Process(target=_serve, args=(worker_end, loop, database, settings), daemon=True)
            process.start()
            worker_end.close()
            self._pipes.append(pipe)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the workers close what they opened, and wait until they have ended."""
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
            pipe.close()
        for process in self._processes:
            process.join(30)
        self._pipes, self._processes = [], []

    def __len__(self) -> int:
        return len(self._pipes)

    def each(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method of the :class:`Bench` of all workers at once; return their results."""
        for pipe in self._pipes:
            pipe.send((method, args, kwargs))
        return self._results(self._pipes)

    def first(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the first worker's :class:`Bench`; return its result."""
        self._pipes[0].send((method, args, kwargs))
        return self._results(self._pipes[:1])[0]

    def others(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method of the :class:`Bench` of all workers but the first; return their results."""
        for pipe in self._pipes[1:]:
            pipe.send((method, args, kwargs))
        return self._results(self._pipes[1:])

    def _results(self, pipes: list[Connection]) -> list[Any]:
        answers = []
        for pipe in pipes:
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append((False, "the worker process ended without a result"))
        for succeeded, answer in answers:
            if not succeeded:
                raise WorkerError(answer)
        return [answer for _, answer in answers]


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """Return the function that makes an event loop: ``asyncio``'s or ``uvloop``'s.

    Raises:
        ImportError: uvloop is not installed.
    """
    if name == "asyncio":
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = import_module(name).new_event_loop
    return factory


def _serve(pipe: Connection, loop: str, database: Database, settings: Settings) -> None:
    # Ctrl-C is sent to all processes; only the controller handles it, and then tells its workers to clean up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    bench = Bench(database, settings)
    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        while (message := _next(pipe)) is not None:
            method, args, kwargs = message
            try:
                answer = (True, runner.run(getattr(bench, method)(*args, **kwargs)))
            except Exception:  # noqa: BLE001 - the controller reports every error
                answer = (False, traceback.format_exc())
            with suppress(OSError):  # the controller has ended
                pipe.send(answer)
        runner.run(bench.close())


def _next(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return None
