"""Waiting for what another task, thread or process brings about."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_PATIENCE = 10.0


async def until(condition: Callable[[], bool], pace: float = 0.005) -> None:
    """Poll until the condition holds, for a bounded time."""
    deadline = time.monotonic() + _PATIENCE
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, "what the test waits for has not come about"
        await asyncio.sleep(pace)
