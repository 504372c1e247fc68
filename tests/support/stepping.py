"""Runs a coroutine and calls a function at each suspension, for example to cancel it at a chosen one."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

__all__ = ["stepped"]

T = TypeVar("T")


async def stepped(work: Coroutine[Any, Any, T], step: Callable[[], None]) -> T:
    """Run ``work``, and call ``step`` each time before the task suspends."""
    return await _stepped(work, step)


@types.coroutine
def _stepped(work: Coroutine[Any, Any, T], step: Callable[[], None]) -> Generator[Any, Any, T]:
    resume = functools.partial(work.send, None)
    while True:
        try:
            awaited = resume()
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        step()
        try:
            resume = functools.partial(work.send, (yield awaited))
        except BaseException as error:  # noqa: BLE001 - the awaited call can raise any error, and the coroutine must get it
            resume = functools.partial(work.throw, error)
