"""The settings of a run: what it measures, how often and for how long."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

__all__ = ["DEFAULT", "QUICK", "WORKLOADS", "Settings"]

WORKLOADS: Final = ("load", "store", "mixed", "lock", "refresh", "list", "rows", "seal", "import")
"""All workloads, in the order in which they run."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one run.

    Attributes:
        workloads: Names from :data:`WORKLOADS`.
        callers: Numbers of concurrent callers in each process.
        processes: The number of calling processes; their rates are added.
        rows: Rows of the table.
        most_rows: Rows of the largest table in ``rows``, and of the table in ``list``.
        rounds: The number of rounds; each contender is measured once in a round.
        seconds: Seconds for which a contender is measured in a round.
        loops: Event loops.
        pool_size: The maximum number of connections of each pool.
        peers: Whether other libraries are measured.
        waiting: For ``refresh``: the number of callers that wait for one refresh.
        provider_seconds: For ``refresh``: the duration of the provider's call in seconds.
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
        """Convert the settings for the file of results."""
        return asdict(self)


DEFAULT: Final = Settings()
QUICK: Final = Settings(callers=(1, 32), most_rows=10_000, rounds=3, seconds=0.03, waiting=50, provider_seconds=0.15)
"""Settings of a short run that tests the program; its figures are not meaningful."""
