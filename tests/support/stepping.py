"""A coroutine with something done at each wait of its task, to cancel it at a chosen one."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

__all__ = ["stepped"]

T = TypeVar("T")


async def stepped(work: Coroutine[Any, Any, T], step: Callable[[], None]) -> T:
    """Do some work, with a call of ``step`` at each wait of its task."""
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
        except BaseException as error:  # noqa: BLE001 - a wait can end in anything, and the work must get it
            resume = functools.partial(work.throw, error)
