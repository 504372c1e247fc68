"""What a run measures, how often and how long."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

__all__ = ["DEFAULT", "QUICK", "WORKLOADS", "Settings"]

WORKLOADS: Final = ("load", "store", "mixed", "lock", "refresh", "list", "rows", "seal", "import")
"""Every workload, in the order in which they run."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one run.

    Attributes:
        workloads: Names from :data:`WORKLOADS`.
        callers: How many callers at once, in each process.
        processes: How many processes call; their rates are added.
        rows: Rows of the table.
        most_rows: The largest table of ``rows``, and the table of ``list``.
        rounds: How often each contender takes its turn.
        seconds: The length of a turn.
        loops: Event loops.
        pool_size: The most connections of every pool, ours and others'.
        peers: Whether other libraries take part.
        waiting: Of ``refresh``: how many callers wait for the one refresh.
        provider_seconds: Of ``refresh``: how long the provider takes.
    """

    workloads: tuple[str, ...] = WORKLOADS
    callers: tuple[int, ...] = (1, 8, 32, 256)
    processes: int = 1
    rows: int = 1000
    most_rows: int = 1_000_000
    rounds: int = 5
    seconds: float = 0.1
    loops: tuple[str, ...] = ("asyncio",)
    pool_size: int = 10
    peers: bool = True
    waiting: int = 200
    provider_seconds: float = 0.5

    def as_json(self) -> dict[str, Any]:
        """For the results' file."""
        return asdict(self)


DEFAULT: Final = Settings()
QUICK: Final = Settings(callers=(1, 32), most_rows=10_000, rounds=3, seconds=0.03, waiting=50, provider_seconds=0.15)
"""Seconds rather than minutes: to see that everything runs, not what it costs."""
