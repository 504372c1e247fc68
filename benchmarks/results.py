"""Results: every round of every contender, where they came from, and the file that keeps them."""

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
"""The version of the file's form."""

_PACKAGES: Final = (
    *("tokenstore", "sqlalchemy", "cryptography", "asyncpg", "psycopg", "aiomysql", "asyncmy", "PyMySQL", "aiosqlite"),
    *("uvloop", "greenlet", "py-key-value-aio", "slack_sdk", "typer", "rich"),
)


class ResultsError(ValueError):
    """A file that cannot be read as results."""


class Place(NamedTuple):
    """Where a number belongs, but for whose it is."""

    database: str
    loop: str
    workload: str
    callers: int
    rows: int


@dataclass
class Cell:
    """The rounds of one contender in one place.

    Attributes:
        database: The database's name; empty where there is none.
        loop: The event loop.
        workload: As on the command line, and its variant behind a slash.
        callers: Callers at once, in all processes together.
        rows: Rows of the table.
        contender: Whose rounds these are.
        kind: ``ours``, ``floor``, ``reference`` or ``peer``.
        title: The contender's name in tables.
        floor: The contender that this one is compared with; empty: none.
        rounds: Each round's numbers: ``us`` (µs an operation) and, by workload, more.
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
        """Where it belongs."""
        return Place(self.database, self.loop, self.workload, self.callers, self.rows)

    def values(self, name: str = "us") -> list[float]:
        """One number of each round."""
        return [numbers[name] for numbers in self.rounds]


@dataclass
class Results:
    """A run."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)

    def cell(self, place: Place, contender: str) -> Cell | None:
        """One contender's rounds."""
        return next((cell for cell in self.cells if cell.place == place and cell.contender == contender), None)

    def ratios(self, cell: Cell, floor: str | None = None) -> list[float]:
        """Cost over that of a floor, by default the cell's own, round by round; empty where there is none."""
        other = self.cell(cell.place, cell.floor if floor is None else floor)
        if other is None or not other.rounds:
            return []
        pairs = zip(cell.values(), other.values(), strict=False)
        return [mine / its for mine, its in pairs]

    def groups(self) -> Iterator[tuple[tuple[str, str, str], list[Cell]]]:
        """Cells by database, loop and workload, in the order of the run."""
        found: dict[tuple[str, str, str], list[Cell]] = {}
        for cell in self.cells:
            found.setdefault((cell.database, cell.loop, cell.workload), []).append(cell)
        yield from found.items()

    def write(self, path: Path) -> None:
        """Write the file."""
        document = {"schema": SCHEMA, **asdict(self)}
        path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a file.

        Raises:
            ResultsError: It is none, or of another version.
        """
        try:
            document = json.loads(path.read_text("utf-8"))
            if document["schema"] != SCHEMA:
                raise ResultsError(f"{path}: schema {document['schema']}; this program reads {SCHEMA}")
            cells = [Cell(**cell) for cell in document["cells"]]
            return cls(document["environment"], document["settings"], cells)
        except OSError as error:
            raise ResultsError(f"{path}: {error.strerror}") from None
        except (KeyError, TypeError, json.JSONDecodeError):
            raise ResultsError(f"{path} holds no results of `python -m benchmarks --json`") from None


def environment(servers: dict[str, dict[str, str]]) -> dict[str, Any]:
    """What the numbers depend on.

    Args:
        servers: What each database tells of itself.
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
