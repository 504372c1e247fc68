"""Processes that call: each has an event loop and connections of its own, and does what the controller says."""

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

# Copies of a process that has imported everything and done nothing.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["benchmarks.bench", "benchmarks.peers", "tokenstore_sql.backend"])


class WorkerError(RuntimeError):
    """What went wrong in a worker; the message is its traceback."""


class Workers:
    """Some workers on one database; they end with the ``with`` block."""

    def __init__(self, number: int, loop: str, database: Database, settings: Settings) -> None:
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(number):
            mine, its = _context.Pipe()
            process = _context.Process(target=_serve, args=(its, loop, database, settings), daemon=True)
            process.start()
            its.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let them close what they opened, and end."""
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
        """Call a method of every worker's :class:`Bench` at once; their results."""
        for pipe in self._pipes:
            pipe.send((method, args, kwargs))
        return self._results(self._pipes)

    def first(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call it in the first worker alone."""
        self._pipes[0].send((method, args, kwargs))
        return self._results(self._pipes[:1])[0]

    def others(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call it in all but the first."""
        for pipe in self._pipes[1:]:
            pipe.send((method, args, kwargs))
        return self._results(self._pipes[1:])

    def _results(self, pipes: list[Connection]) -> list[Any]:
        answers = []
        for pipe in pipes:
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append((False, "the worker ended without an answer"))
        for well, answer in answers:
            if not well:
                raise WorkerError(answer)
        return [answer for _, answer in answers]


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes an event loop of that name; ImportError where uvloop is not installed."""
    if name == "asyncio":
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = import_module(name).new_event_loop
    return factory


def _serve(pipe: Connection, loop: str, database: Database, settings: Settings) -> None:
    # Ctrl-C is the controller's: it tells its workers to clean up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    bench = Bench(database, settings)
    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        while (message := _next(pipe)) is not None:
            method, args, kwargs = message
            try:
                answer = (True, runner.run(getattr(bench, method)(*args, **kwargs)))
            except Exception:  # noqa: BLE001 - whatever it is, the controller tells
                answer = (False, traceback.format_exc())
            with suppress(OSError):  # the controller has gone
                pipe.send(answer)
        runner.run(bench.close())


def _next(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return None
