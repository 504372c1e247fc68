"""Functions that run in a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from tokenstore import native_threads
from tokenstore.native_threads import in_thread, is_coroutine_function


async def _async(_: object) -> Mapping[str, Any]:
    return {}


class _Callable:
    async def __call__(self, _: object) -> Mapping[str, Any]:
        return {}

    async def method(self, _: object) -> Mapping[str, Any]:
        return {}

    def plain(self, _: object) -> Mapping[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (_async, True),
        (partial(_async, 1), True),
        (_Callable(), True),
        (_Callable().method, True),
        (_Callable().plain, False),
        (lambda _: _async(_), False),  # noqa: PLW0108 - a plain function, which returns an awaitable
        (print, False),
    ],
)
def test_coroutine_functions_are_recognised(function: object, expected: bool) -> None:
    assert is_coroutine_function(function) is expected


def _stop() -> None:
    raise StopIteration


def test_a_function_returns_or_raises_in_the_event_loop() -> None:
    async def main() -> None:
        assert await in_thread(lambda one, two: one + two, 1, 2) == 3
        with pytest.raises(ZeroDivisionError):
            await in_thread(lambda: 1 / 0)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await in_thread(_stop)
        assert await in_thread(threading.get_ident) != threading.get_ident()

    asyncio.run(main())


def test_an_exception_that_nobody_awaits_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Its text may contain a token."""

    async def main() -> None:
        calls = [in_thread(lambda: 1 / 0)]
        await asyncio.wait(calls)
        calls.clear()

    asyncio.run(main())
    assert not caplog.records


def test_a_function_that_ends_after_its_event_loop_disturbs_nothing() -> None:
    goes_on, ended = threading.Event(), threading.Event()

    def work() -> None:
        assert goes_on.wait(10)
        ended.set()

    async def main() -> None:
        _ = in_thread(work)

    asyncio.run(main())
    goes_on.set()
    assert ended.wait(10)


def test_without_another_thread_the_executor_of_the_event_loop_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that is ending starts no thread, and the executor may have one."""

    def refuse(work: Callable[[], object], name: str) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    async def main(pool: ThreadPoolExecutor) -> None:
        asyncio.get_running_loop().set_default_executor(pool)
        assert await in_thread(lambda: threading.current_thread().name) == "pool_0"

    monkeypatch.setattr(native_threads, "start_thread", refuse)
    with ThreadPoolExecutor(1, thread_name_prefix="pool") as pool:
        asyncio.run(main(pool))
