"""Waiting for a condition that another task, thread or process makes true."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_TIMEOUT = 10.0


async def until(condition: Callable[[], bool], interval: float = 0.005) -> None:
    """Poll every ``interval`` seconds until the condition is true; fail after 10 seconds."""
    deadline = time.monotonic() + _TIMEOUT
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, f"the condition did not become true within {_TIMEOUT} s"
        await asyncio.sleep(interval)
