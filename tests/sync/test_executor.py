"""The executor of the loop thread, which works until the process is gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from tokenstore.sync import executor
from tokenstore.sync.executor import DaemonThreads


@pytest.fixture
def threads() -> Iterator[DaemonThreads]:
    threads = DaemonThreads()
    yield threads
    threads.shutdown()


def _named() -> int:
    return sum(thread.name == "tokenstore-executor" for thread in threading.enumerate())


def test_one_thread_is_always_there_and_others_end_when_they_are_idle(threads: DaemonThreads) -> None:
    """Work that blocks does not keep other work waiting, up to a limit."""
    assert _named() == 1
    met = threading.Barrier(5)
    jobs = [threads.submit(met.wait, 30) for _ in range(5)]
    assert sorted(job.result(30) for job in jobs) == [0, 1, 2, 3, 4]


def test_there_are_no_more_threads_than_the_limit(threads: DaemonThreads) -> None:
    goes_on, running = threading.Event(), threading.Semaphore(0)

    def work() -> int:
        running.release()
        assert goes_on.wait(30)
        return _named()

    jobs = [threads.submit(work) for _ in range(executor._LIMIT + 5)]
    for _ in range(executor._LIMIT):
        assert running.acquire(timeout=30)
    assert not running.acquire(blocking=False)
    cancelled = jobs[-1].cancel()
    goes_on.set()
    assert cancelled
    assert max(job.result(30) for job in jobs[:-1]) <= executor._LIMIT


def test_exceptions_are_those_of_the_jobs(threads: DaemonThreads) -> None:
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 / 0).result(30)
    assert threads.submit(lambda: 1).result(30) == 1


def test_without_another_thread_the_job_waits_for_the_one_that_is_there(
    threads: DaemonThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interpreter that is ending starts no thread."""

    def refuse(work: Callable[[], object], name: str) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(executor, "start_thread", refuse)
    jobs = [threads.submit(threading.get_ident) for _ in range(10)]
    assert len({job.result(30) for job in jobs}) == 1


def test_an_event_loop_can_use_it(threads: DaemonThreads) -> None:
    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(threads)
        assert await asyncio.to_thread(lambda: 1) == 1

    asyncio.run(main())
