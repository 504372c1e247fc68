"""An event loop with a fake clock, so that tests of timeouts take no time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class FakeClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer when all tasks wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        self._select = selector.select
        selector.select = self._skip

    def time(self) -> float:
        return self.now

    def _skip(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise AssertionError("all tasks wait and there is no timer: the test would wait for ever")
        self.now += max(timeout, 0)
        return self._select(0)


def run_with_fake_clock(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine function in such an event loop."""
    with asyncio.Runner(loop_factory=FakeClockLoop) as runner:
        runner.run(main())


async def until_all_wait() -> None:
    """Return when all other tasks wait. The clock does not advance."""
    loop: Any = asyncio.get_running_loop()
    idle_steps = 0
    while idle_steps < 2:
        await asyncio.sleep(0)
        idle_steps = 0 if loop._ready else idle_steps + 1
