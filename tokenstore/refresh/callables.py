"""Calls the callables of an application: refreshers that are coroutine functions, and such that are plain functions."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from tokenstore.native_threads import in_thread, is_coroutine_function

__all__ = ["call_provider"]


async def call_provider(
    function: Callable[..., Any], records: Sequence[object], left_running: Callable[[asyncio.Future[Any]], object]
) -> Any:
    """Call a refresher, or its ``revoke``. A plain function runs in a thread of its own: it may block.

    Args:
        function: The callable.
        records: Its arguments.
        left_running: Called if this task is cancelled, as by a time limit, while the thread is still running: a thread
            cannot be stopped. It gets the future of the thread's end.
    """
    if is_coroutine_function(function):
        answer = function(*records)
    else:
        running = in_thread(function, *records)
        del records  # the thread has them
        try:
            answer = await asyncio.shield(running)
        except asyncio.CancelledError:
            if not running.done():
                _ = left_running(running)
            raise
    # A plain function may also return an awaitable, as a lambda around a coroutine function does.
    return await answer if inspect.isawaitable(answer) else answer
