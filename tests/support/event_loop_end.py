"""The end of an event loop, for tests of refreshes that are under way at that time."""

from __future__ import annotations

import asyncio
from typing import Any


async def end_event_loop(*, at_every_turn: bool = False, within: float | None = None) -> set[asyncio.Task[Any]]:
    """Cancel all tasks but this one, as `asyncio.run` does at its end, and wait for them.

    Args:
        at_every_turn: Cancel them again at every step of the event loop until they have ended.
        within: The most seconds to wait; None: no limit.

    Returns:
        The tasks that are still running.
    """
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    while at_every_turn and any(not task.done() for task in tasks):
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)
    pending: set[asyncio.Task[Any]] = set()
    if within is not None and tasks:
        _, pending = await asyncio.wait(tasks, timeout=within)
    await asyncio.gather(*(tasks - pending), return_exceptions=True)
    return pending
