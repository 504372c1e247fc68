"""Finishes work that must not be interrupted, although the caller is cancelled.

A task can be cancelled more than once. anyio's cancel scopes (FastAPI, Starlette, httpx) cancel a task again in every
iteration of the event loop until it has left the scope, and ``asyncio.run`` cancels at its end tasks that may have been
cancelled before. So one ``asyncio.shield`` and one wait are not enough: the second cancellation would leave the work
running beside the code that comes after it, for example a statement beside the closing of its connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any, Final, TypeVar

__all__ = ["FINISH_GRACE", "finish", "wait_through_cancellation"]

T = TypeVar("T")

FINISH_GRACE: Final = 0.5
"""How long a cancelled caller waits for a commit or a clean-up that has begun, in seconds."""


async def finish(action: Coroutine[Any, Any, T], grace: float = FINISH_GRACE) -> T:
    """Run a commit or a clean-up in a task of its own, which goes on although the caller is cancelled.

    When this returns or raises, the action has ended, however often the caller was cancelled meanwhile.

    Args:
        action: The commit or clean-up.
        grace: How long the action may go on after the caller was cancelled, in seconds. Then it is cancelled, too.

    Returns:
        What the action returns.

    Raises:
        asyncio.CancelledError: The caller was cancelled. An error of the action is dropped then.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(action)
    # A future and not asyncio.wait or asyncio.shield, which take 50 % longer: a store waits here for each statement.
    ended: asyncio.Future[None] = loop.create_future()

    def end(_: object) -> None:
        if not ended.done():
            ended.set_result(None)

    task.add_done_callback(end)
    try:
        await ended
    except asyncio.CancelledError:
        if not await wait_through_cancellation([task], grace):
            task.cancel()
            await wait_through_cancellation([task])
        if not task.cancelled():
            task.exception()  # retrieved, so that the event loop does not report it
        raise
    try:
        return task.result()
    finally:
        # Otherwise the task and its error refer to each other, and keep the objects of the traceback alive, such as a
        # driver's cursor.
        del task


async def wait_through_cancellation(tasks: Collection[asyncio.Future[Any]], timeout: float | None = None) -> bool:
    """Wait until all tasks have ended, however often the caller is cancelled meanwhile.

    The cancellations are swallowed, so a caller that was cancelled has to raise ``CancelledError`` afterwards.

    Args:
        tasks: The tasks; they are not cancelled.
        timeout: The longest wait, in seconds; None: no limit.

    Returns:
        Whether all tasks have ended.
    """
    now = asyncio.get_running_loop().time
    deadline = None if timeout is None else now() + timeout
    while pending := [task for task in tasks if not task.done()]:
        left = None if deadline is None else deadline - now()
        if left is not None and left <= 0:
            return False
        try:
            await asyncio.wait(pending, timeout=left)
        except asyncio.CancelledError:
            continue
    return True
