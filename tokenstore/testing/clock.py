"""A clock for tests."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

__all__ = ["FakeClock"]


class FakeClock:
    """A clock that stands still until the test moves it: for ``clock=`` of a store or a provider.

    Args:
        start: Seconds since the epoch. Default: now.
    """

    def __init__(self, start: float | None = None) -> None:
        self._seconds = time.time() if start is None else start

    def __call__(self) -> float:
        """Seconds since the epoch."""
        return self._seconds

    def __repr__(self) -> str:
        return f"<FakeClock at {self.now.isoformat()}>"

    @property
    def now(self) -> datetime:
        """The time as an aware UTC datetime."""
        return datetime.fromtimestamp(self._seconds, UTC)

    def advance(self, duration: float | timedelta) -> None:
        """Move the clock forward.

        Args:
            duration: Seconds, or a timedelta.

        Raises:
            ValueError: The duration is negative.
        """
        seconds = duration.total_seconds() if isinstance(duration, timedelta) else duration
        if seconds < 0:
            raise ValueError("a clock does not go back: pass a duration of at least 0")
        self._seconds += seconds
