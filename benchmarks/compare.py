"""Comparison of two runs: which figures became slower or faster by more than the noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Spread, bootstrap
from benchmarks.results import Cell, Results

__all__ = ["Change", "changes", "compare"]

TOLERANCE: Final = 0.05
"""A change by a smaller fraction is ignored, even if it is significant."""


@dataclass(frozen=True)
class Change:
    """The change of one cell of tokenstore between two runs.

    Attributes:
        cell: The later run's cell.
        floor: The floor by which both cells were divided in their own runs, so that a slower machine does not matter;
            empty: they were not divided.
        ratio: The cost after divided by the cost before, with its 99 % interval.
        verdict: The conclusion from the ratio and the tolerance.
    """

    cell: Cell
    floor: str
    ratio: Spread
    verdict: Literal["slower", "faster", "same"]


def changes(before: Results, after: Results, tolerance: float = TOLERANCE) -> Iterator[Change]:
    """Compare each cell of tokenstore that both runs have."""
    for cell in after.cells:
        earlier = before.cell(cell.place, cell.contender)
        if cell.kind != "ours" or earlier is None or not (cell.rounds and earlier.rounds):
            continue
        if "us" not in cell.rounds[0] or "us" not in earlier.rounds[0]:
            continue
        old, new, floor = before.ratios(earlier), after.ratios(cell), cell.floor
        if not (old and new and earlier.floor == floor):
            old, new, floor = earlier.values(), cell.values(), ""
        ratio = bootstrap(old, new)
        if ratio.low > 1 and ratio.median > 1 + tolerance:
            yield Change(cell, floor, ratio, "slower")
        elif ratio.high < 1 and ratio.median < 1 / (1 + tolerance):
            yield Change(cell, floor, ratio, "faster")
        else:
            yield Change(cell, floor, ratio, "same")


def compare(before: Results, after: Results, out: Console, tolerance: float = TOLERANCE) -> bool:
    """Print what changed.

    Returns:
        True if no cell became slower.
    """
    found = list(changes(before, after, tolerance))
    if not found:
        out.print("The two runs have no measurement in common.")
        return True
    table = Table(title="Cost after divided by cost before, with its 99 % interval", title_justify="left")
    for heading in ("workload", "database", "loop", "callers", "rows", "measured in", "after / before", ""):
        table.add_column(heading)
    for change in found:
        if change.verdict == "same":
            continue
        cell, (low, middle, high) = change.cell, change.ratio
        word = {"slower": "[red]slower[/]", "faster": "[green]faster[/]"}[change.verdict]
        where = [cell.workload, cell.database, cell.loop, str(cell.callers), f"{cell.rows:,}", change.floor or "µs"]
        table.add_row(*where, f"×{middle:.2f} [dim]\\[{low:.2f}–{high:.2f}][/]", word)
    if table.row_count:
        out.print(table)
    counts = {word: sum(change.verdict == word for change in found) for word in ("slower", "faster", "same")}
    out.print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return counts["slower"] == 0
