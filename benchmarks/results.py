"""Results: the numbers of all rounds of all contenders, the environment, and the file that stores them."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, NamedTuple

__all__ = ["SCHEMA", "Cell", "Place", "Results", "ResultsError", "environment"]

SCHEMA: Final = 1
"""The version of the file's format."""

_PACKAGES: Final = (
    *("tokenstore", "sqlalchemy", "cryptography", "asyncpg", "psycopg", "aiomysql", "asyncmy", "PyMySQL", "aiosqlite"),
    *("uvloop", "greenlet", "py-key-value-aio", "slack_sdk", "typer", "rich"),
)


class ResultsError(ValueError):
    """A file is not a file of results."""


class Place(NamedTuple):
    """All that identifies a measurement, except the contender."""

    database: str
    loop: str
    workload: str
    callers: int
    rows: int


@dataclass
class Cell:
    """The rounds of one contender in one :class:`Place`.

    Attributes:
        database: The database's name; empty: the workload needs none.
        loop: The event loop.
        workload: The workload's name, and its variant after a slash.
        callers: Concurrent callers in all processes together.
        rows: Rows of the table.
        contender: The contender's name.
        kind: ``ours``, ``floor``, ``reference`` or ``peer``.
        title: The contender's name in tables.
        floor: The name of the contender to compare with; empty: none.
        rounds: The numbers of each round: ``us`` (µs for each operation), and more that depend on the workload.
    """

    database: str
    loop: str
    workload: str
    callers: int
    rows: int
    contender: str
    kind: str
    title: str
    floor: str
    rounds: list[dict[str, float]] = field(default_factory=list)

    @property
    def place(self) -> Place:
        """The place of this cell."""
        return Place(self.database, self.loop, self.workload, self.callers, self.rows)

    def values(self, name: str = "us") -> list[float]:
        """Return this number of each round."""
        return [numbers[name] for numbers in self.rounds]


@dataclass
class Results:
    """The results of one run."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)

    def cell(self, place: Place, contender: str) -> Cell | None:
        """Return one contender's rounds."""
        return next((cell for cell in self.cells if cell.place == place and cell.contender == contender), None)

    def ratios(self, cell: Cell, floor: str | None = None) -> list[float]:
        """Divide the cell's cost by a floor's, round by round.

        The default floor is the cell's own. Without a floor, the list is empty.
        """
        other = self.cell(cell.place, cell.floor if floor is None else floor)
        if other is None or not other.rounds:
            return []
        return [cost / floor_cost for cost, floor_cost in zip(cell.values(), other.values(), strict=False)]

    def groups(self) -> Iterator[tuple[tuple[str, str, str], list[Cell]]]:
        """Group the cells by database, loop and workload, in the order of the run."""
        found: dict[tuple[str, str, str], list[Cell]] = {}
        for cell in self.cells:
            found.setdefault((cell.database, cell.loop, cell.workload), []).append(cell)
        yield from found.items()

    def write(self, path: Path) -> None:
        """Write the results to a file."""
        document = {"schema": SCHEMA, **asdict(self)}
        path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read results from a file.

        Raises:
            ResultsError: The file cannot be read, is not a file of results, or has another format version.
        """
        try:
            document = json.loads(path.read_text("utf-8"))
            if document["schema"] != SCHEMA:
                raise ResultsError(f"{path} has schema {document['schema']}; this program reads schema {SCHEMA}")
            cells = [Cell(**cell) for cell in document["cells"]]
            return cls(document["environment"], document["settings"], cells)
        except OSError as error:
            raise ResultsError(f"{path}: {error.strerror}") from None
        except (KeyError, TypeError, json.JSONDecodeError):
            raise ResultsError(f"{path} is not a file written by `python -m benchmarks --json`") from None


def environment(servers: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Describe the machine and the software, on which the numbers depend.

    Args:
        servers: The version and settings of each database server.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "optimized": sys.flags.optimize,
        "versions": dict(_versions(_PACKAGES)),
        "servers": servers,
    }


def _versions(packages: Sequence[str]) -> Iterator[tuple[str, str]]:
    for package in packages:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
