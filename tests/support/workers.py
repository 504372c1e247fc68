"""Real processes for tests: each has a loop and stores of its own, and runs the jobs that the test sends it.

A job is a coroutine function of a module that the process can import. It starts by calling `Link.meet`, so that
everybody begins at once and no test waits by time.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from signal import SIGCONT, SIGKILL, SIGSTOP, Signals
from typing import Any

from support.broken_backends import Fault
from support.generated_programs import Store, stores_over
from tokenstore.registry import backend_for_url

_PATIENCE = 120.0


@dataclass
class Link:
    """A worker's end of the line to the test, and the stores that it keeps open between jobs."""

    commands: Connection
    answers: Connection
    opened: object = None
    stores: list[Store] = field(default_factory=list)

    def meet(self, value: object = None) -> None:
        """Tell the test where this job stands, and wait until it says to go on. Blocks the whole process."""
        self.answers.send(("here", value))
        self.commands.recv()

    async def open(self, url: str, fault: Fault | None = None, **options: object) -> list[Store]:
        """Stores at a URL, on new connections unless the last job wanted the same."""
        if (wanted := (url, fault, options)) != self.opened:
            await self.close()
            backend = backend_for_url(url, options) if fault is None else fault.backend(url)
            self.opened, self.stores = wanted, stores_over([backend])
        return self.stores

    async def close(self) -> None:
        for store in self.stores:
            await store.tokens.aclose()
        self.opened, self.stores = None, []


Job = Callable[..., Awaitable[Any]]


def _serve(commands: Connection, answers: Connection) -> None:
    link = Link(commands, answers)
    with asyncio.Runner() as runner:
        while True:
            try:
                job, args = commands.recv()
            except EOFError:
                return runner.run(link.close())
            try:
                answers.send(("done", runner.run(job(link, *args))))
            except BaseException as error:  # noqa: BLE001 - the test is told, and raises it
                error.add_note(traceback.format_exc())
                answers.send(("failed", error))


class Worker:
    """The test's handle of one process."""

    _context = multiprocessing.get_context("spawn")

    def __init__(self) -> None:
        # Pipes of one direction each: they are no sockets, which every test is checked not to leave behind.
        theirs, self._commands = self._context.Pipe(duplex=False)
        self._answers, answers = self._context.Pipe(duplex=False)
        self._process = self._context.Process(target=_serve, args=(theirs, answers), daemon=True)
        self._process.start()
        # With the test's copies closed, a worker's end is the end of its pipe.
        theirs.close()
        answers.close()

    def start(self, job: Job, *args: object) -> None:
        """Send a job."""
        self._commands.send((job, args))

    def met(self) -> Any:
        """Wait until the job calls `meet`, and return what it says."""
        return self._answer("here")

    def go_on(self) -> None:
        """Let it go on from there."""
        self._commands.send(None)

    def result(self) -> Any:
        """Wait for the job's end and return its result, or raise its error."""
        return self._answer("done")

    def call(self, job: Job, *args: object) -> Any:
        """Run a job without waiting at its `meet`."""
        self.start(job, *args)
        self.met()
        self.go_on()
        return self.result()

    def signal(self, signal: Signals) -> None:
        """Send a signal, and return when it has taken effect."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal)
        if signal == SIGSTOP:
            os.waitpid(self._process.pid, os.WUNTRACED)
        elif signal == SIGKILL:
            self._process.join(_PATIENCE)

    def is_idle(self) -> bool:
        """Whether it has nothing left to say, and takes a job."""
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
        """Let the process end, or make it."""
        self._commands.close()
        if self._process.is_alive():
            self.signal(SIGCONT)
            self._process.join(10)
            self._process.kill()
        self._process.join()
        self._answers.close()
        self._process.close()

    def receive(self) -> tuple[str, Any]:
        """Wait for the next message: ("here", …) from `meet`, ("done", result) or ("failed", error)."""
        assert self._answers.poll(_PATIENCE), f"no answer from a worker within {_PATIENCE} s"
        message: tuple[str, Any] = self._answers.recv()
        return message

    def _answer(self, expected: str) -> Any:
        kind, value = self.receive()
        if kind == "failed":
            raise value
        assert kind == expected, f"a worker is {kind}, not {expected}"
        return value


class Team:
    """Workers, started when first needed and kept for the next test."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []

    def __getitem__(self, index: int) -> Worker:
        return self.first(index + 1)[index]

    def first(self, count: int) -> list[Worker]:
        """This many of them."""
        self._workers += [Worker() for _ in range(count - len(self._workers))]
        return self._workers[:count]

    def all_at_once(self, job: Job, *args: object, count: int) -> list[Any]:
        """Run one job in this many processes, from its `meet` on at the same time."""
        return self.together([(job, *args)] * count)

    def together(self, jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run a job in each process, from their `meet` on at the same time."""
        workers = self.first(len(jobs))
        for worker, (job, *args) in zip(workers, jobs, strict=True):
            worker.start(job, *args)
        # Everybody's last word is heard before an error is raised: the next test meets workers with nothing to say.
        stands = [worker.receive() for worker in workers]
        for worker, (kind, _) in zip(workers, stands, strict=True):
            if kind == "here":
                worker.go_on()
        ends = [
            worker.receive() if stand[0] == "here" else stand for worker, stand in zip(workers, stands, strict=True)
        ]
        for kind, value in ends:
            if kind == "failed":
                raise value
        return [value for _, value in ends]

    def dismiss(self, worker: Worker) -> None:
        """Take leave of one that was killed."""
        self._workers.remove(worker)
        worker.close()

    def muster(self) -> None:
        """Take leave of those whom a test that failed has left in the midst of something."""
        for worker in [worker for worker in self._workers if not worker.is_idle()]:
            self.dismiss(worker)

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


async def nothing(link: Link) -> None:
    """Show that there is nothing else to do."""
    link.meet("idle")
