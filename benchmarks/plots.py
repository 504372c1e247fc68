"""Plots of results: cost by number of callers for each database, and cost by number of rows for all databases."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.contenders import OURS
from benchmarks.measure import Spread, spread
from benchmarks.results import Cell, Results

__all__ = ["draw"]

_PANELS: Final = {"load/cold": "load", "store/update": "store", "mixed": "95 loads, 5 stores", "lock": "load and store"}
# An opaque background, because dark text on a transparent one cannot be read on a dark page.
_PAPER, _INK, _FAINT, _GRID = "#fcfcfa", "#24292f", "#6e7781", "#e4e4de"
# Each contender has the same color in all panels; floors are gray.
_COLORS: Final = {
    OURS: "#0b6e4f",
    **dict.fromkeys(("held", "one-hop"), "#424a53"),
    **dict.fromkeys(("pool", "aiosqlite"), "#7d8590"),
    **dict.fromkeys(("pool-no-reset", "calling-thread"), "#a0a8b0"),
    "core": "#bc4c00",
    "orm-fernet": "#8250df",
    "py-key-value": "#9a6700",
    "slack-sdk": "#cf222e",
}
_STYLE: Final[dict[Any, Any]] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _FAINT,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": _PAPER,
    "axes.facecolor": _PAPER,
    # The same numbers give the same file, and text stays text.
    "svg.hashsalt": "tokenstore",
    "svg.fonttype": "none",
}


class Line(NamedTuple):
    """One contender's line; a point is (callers or rows, µs for each operation)."""

    contender: str
    title: str
    kind: str
    points: list[tuple[int, Spread]]


def draw(results: Results, folder: Path) -> Iterator[Path]:
    """Write all plots for which the results have numbers, each as SVG and PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    places = dict.fromkeys((cell.database, cell.loop) for cell in results.cells if cell.workload in _PANELS)
    with mpl.rc_context(_STYLE):
        for database, loop in places:
            cells = [cell for cell in results.cells if (cell.database, cell.loop) == (database, loop)]
            panels = {
                title: _lines([cell for cell in cells if cell.workload == workload], "callers")
                for workload, title in _PANELS.items()
                if any(cell.workload == workload for cell in cells)
            }
            figure = _figure(f"{database}: cost of an operation", panels, "callers at once")
            yield from _save(figure, folder / f"callers-{_file_name(database)}-{loop}")
        rows = {
            f"{database}, {loop}" if len(results.settings.get("loops", ())) > 1 else database: _lines(cells, "rows")
            for (database, loop, workload), cells in results.groups()
            if workload == "rows"
        }
        if rows:
            yield from _save(_figure("A load by primary key, one caller", rows, "rows in the table"), folder / "rows")


def _file_name(database: str) -> str:
    return database.replace("+", "-").replace("#", "-")


def _lines(cells: Sequence[Cell], axis: str) -> list[Line]:
    found: dict[str, Line] = {}
    for cell in cells:
        line = found.setdefault(cell.contender, Line(cell.contender, cell.title, cell.kind, []))
        line.points.append((getattr(cell, axis), spread(cell.values())))
    return [line._replace(points=sorted(line.points)) for line in found.values()]


def _figure(title: str, panels: dict[str, list[Line]], label: str) -> Figure:
    """Draw the panels, two in a row."""
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.4 * columns, 3.5 * rows + 0.4), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, lines) in zip(grid, panels.items(), strict=False):
        axes.set_title(name, loc="left", fontsize=10)
        _panel(axes, lines, label)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    grid[0].set_ylabel("µs an operation")
    return figure


def _panel(axes: Any, lines: Sequence[Line], label: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(visible=True, axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    ends = []
    for line in lines:
        ours = line.kind == "ours"
        color = _COLORS.get(line.contender, _FAINT)
        places = [place for place, _ in line.points]
        low, middle, high = (list(values) for values in zip(*(point for _, point in line.points), strict=True))
        style = {"linewidth": 2.6 if ours else 1.3, "linestyle": "--" if line.kind == "floor" else "-"}
        axes.plot(places, middle, color=color, marker="o", markersize=4 if ours else 2.5, zorder=3 + ours, **style)
        if len(places) > 1:
            axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0, zorder=2)
        ends.append((places[-1], middle[-1], line.title, color, ours))
    ticks = sorted({place for line in lines for place, _ in line.points})
    axes.set_xticks(ticks, [_short(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="both", length=0)
    axes.set_xlabel(label)
    _label(axes, ends, ticks[-1])


def _label(axes: Any, ends: Sequence[tuple[int, float, str, str, bool]], last: int) -> None:
    """Write the names at the ends of the lines, and move them apart where they would overlap."""
    low, high = (math.log10(limit) for limit in axes.get_ylim())
    if high - low < 1:  # a smaller range would have too few ticks
        middle = (low + high) / 2
        low, high = middle - 0.5, middle + 0.5
        axes.set_ylim(10**low, 10**high)
    height = 0.062 * (high - low)
    at = -math.inf
    for place, value, title, color, ours in sorted(ends, key=lambda end: end[1]):
        at = max(math.log10(value), at + height)
        # Draw an arrow from the line to its name if the line ends early or its name had to move.
        moved = place != last or abs(at - math.log10(value)) > height / 2
        lead = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.5, "relpos": (0, 0.5), "shrinkA": 0}
        axes.annotate(
            title,
            xy=(place, value),
            xytext=(1.03, (at - low) / (high - low)),
            textcoords="axes fraction",
            color=color,
            fontsize=8,
            fontweight="bold" if ours else "normal",
            va="center",
            annotation_clip=False,
            arrowprops=lead if moved else None,
        )


def _short(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _save(figure: Figure, path: Path) -> Iterator[Path]:
    forms: dict[str, dict[str, Any]] = {".svg": {"metadata": {"Date": None}}, ".png": {"dpi": 160}}
    for ending, options in forms.items():
        file = path.with_name(path.name + ending)
        figure.savefig(file, **options)
        yield file
