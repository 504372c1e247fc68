"""An event loop whose clock moves when everybody waits for it, so that a test of timeouts takes no time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class WaitlessLoop(asyncio.SelectorEventLoop):
    """An event loop without waits: where nothing else can happen, it is at once as late as the next timer says."""

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
            raise AssertionError("somebody would wait for ever")
        self.now += max(timeout, 0)
        return self._select(0)


def run_waitless(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine function in such a loop."""
    with asyncio.Runner(loop_factory=WaitlessLoop) as runner:
        runner.run(main())


async def everybody_waits() -> None:
    """Return when nobody has anything left to do but wait. No time passes."""
    loop: Any = asyncio.get_running_loop()
    quiet = 0
    while quiet < 2:
        await asyncio.sleep(0)
        quiet = 0 if loop._ready else quiet + 1
