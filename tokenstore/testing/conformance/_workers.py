"""Worker processes for tests. Each has its own event loop, and runs the jobs that the test sends.

A job is a function or coroutine function in a module that the process can import. It begins with a call of
:meth:`Link.meet`, so that the jobs of several processes start at the same time.
"""

from __future__ import annotations

import asyncio
import inspect
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["Job", "Link", "Team", "Worker"]

_TIMEOUT = 120.0


class Link:
    """A worker's connection to the test."""

    def __init__(self, commands: Connection, answers: Connection) -> None:
        self.commands, self.answers = commands, answers

    def meet(self, value: object = None) -> None:
        """Tell the test that the job has got here, and wait until the test says to go on. Blocks the whole process."""
        self.answers.send(("here", value))
        self.commands.recv()

    async def close(self) -> None:
        """Close what stays open between jobs; called when the process ends."""


Job = Callable[..., Any]


def _serve(link_class: type[Link], commands: Connection, answers: Connection) -> None:
    link = link_class(commands, answers)
    with asyncio.Runner() as runner:
        while True:
            try:
                job, args = commands.recv()
            except EOFError:
                return runner.run(link.close())
            try:
                result = job(link, *args)
                answers.send(("done", runner.run(result) if inspect.iscoroutine(result) else result))
            except BaseException as error:  # noqa: BLE001 - sent to the test, which raises it
                error.add_note(traceback.format_exc())
                answers.send(("failed", error))


class Worker:
    """One worker process, as the test sees it."""

    _context = multiprocessing.get_context("spawn")

    def __init__(self, link_class: type[Link] = Link) -> None:
        # One-way pipes, because two-way pipes are sockets, and the tests check that no socket is left behind.
        commands, self._commands = self._context.Pipe(duplex=False)
        self._answers, answers = self._context.Pipe(duplex=False)
        self._process = self._context.Process(target=_serve, args=(link_class, commands, answers), daemon=True)
        self._process.start()
        self._suspended = False
        # Close the worker's ends in this process; otherwise reading would not fail when the worker dies.
        commands.close()
        answers.close()

    def start(self, job: Job, *args: object) -> None:
        """Send a job."""
        self._commands.send((job, args))

    def met(self) -> Any:
        """Wait until the job calls `meet`, and return the value that it passes."""
        return self._answer("here")

    def go_on(self) -> None:
        """Let the job continue after `meet`."""
        self._commands.send(None)

    def result(self) -> Any:
        """Wait for the job's end and return its result, or raise its error."""
        return self._answer("done")

    def call(self, job: Job, *args: object) -> Any:
        """Run a job to its end, without stopping at its first `meet`."""
        self.start(job, *args)
        self.met()
        self.go_on()
        return self.result()

    def has_answered(self, timeout: float) -> bool:
        """Whether a message is there, or comes within so many seconds."""
        return self._answers.poll(timeout)

    def kill(self) -> None:
        """Kill the process, and return when it has ended."""
        self._process.kill()
        self._process.join(_TIMEOUT)

    def stop(self) -> None:
        """Suspend the process, and return when it is suspended."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)
        self._suspended = True

    def resume(self) -> None:
        """Let a suspended process continue."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGCONT)
        self._suspended = False

    def is_idle(self) -> bool:
        """Whether the worker has no job left and accepts a new one."""
        try:
            self.start(nothing)
            if not self._answers.poll(1) or self._answers.recv() != ("here", "idle"):
                return False
            self.go_on()
            self.result()
        except (OSError, EOFError):  # it has ended
            return False
        return True

    def close(self) -> None:
        """Let the process end, and kill it if it does not."""
        self._commands.close()
        if self._process.is_alive():
            if self._suspended:
                self.resume()
            self._process.join(10)
            self._process.kill()
        self._process.join()
        self._answers.close()
        self._process.close()

    def receive(self) -> tuple[str, Any]:
        """Wait for the next message: ("here", …) from `meet`, ("done", result) or ("failed", error)."""
        assert self._answers.poll(_TIMEOUT), f"no message from a worker within {_TIMEOUT} s"
        message: tuple[str, Any] = self._answers.recv()
        return message

    def _answer(self, expected: str) -> Any:
        kind, value = self.receive()
        if kind == "failed":
            raise value
        assert kind == expected, f"expected the message {expected!r} from a worker, got {kind!r}"
        return value


class Team:
    """Workers, which start at first use and are reused by later tests.

    Args:
        link_class: What a job gets as its first argument.
    """

    def __init__(self, link_class: type[Link] = Link) -> None:
        self._link_class = link_class
        self._workers: list[Worker] = []

    def __getitem__(self, index: int) -> Worker:
        return self.first(index + 1)[index]

    def first(self, count: int) -> list[Worker]:
        """Return the first ``count`` workers."""
        self._workers += [Worker(self._link_class) for _ in range(count - len(self._workers))]
        return self._workers[:count]

    def all_at_once(self, job: Job, *args: object, count: int) -> list[Any]:
        """Run one job in this many processes; all continue from their first `meet` at the same time."""
        return self.together([(job, *args)] * count)

    def together(self, jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run a job in each process; all continue from their first `meet` at the same time."""
        workers = self.first(len(jobs))
        for worker, (job, *args) in zip(workers, jobs, strict=True):
            worker.start(job, *args)
        # Receive the last message of every worker before raising an error; otherwise the next test would receive it.
        first = [worker.receive() for worker in workers]
        for worker, (kind, _) in zip(workers, first, strict=True):
            if kind == "here":
                worker.go_on()
        ends = [
            worker.receive() if message[0] == "here" else message
            for worker, message in zip(workers, first, strict=True)
        ]
        for kind, value in ends:
            if kind == "failed":
                raise value
        return [value for _, value in ends]

    def remove(self, worker: Worker) -> None:
        """Remove a worker, for example one that was killed."""
        self._workers.remove(worker)
        worker.close()

    def remove_busy_workers(self) -> None:
        """Remove the workers that still run a job of a test that failed."""
        for worker in [worker for worker in self._workers if not worker.is_idle()]:
            self.remove(worker)

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


async def nothing(link: Link) -> None:
    """Do nothing; shows that the worker accepts jobs."""
    link.meet("idle")
