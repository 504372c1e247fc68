"""Tables of results."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.contenders import OURS
from benchmarks.measure import spread
from benchmarks.results import Cell, Results
from benchmarks.targets import outcomes

__all__ = ["console", "number", "report"]


def console(*, stderr: bool = False) -> Console:
    """Make a console as wide as the terminal; without a terminal, wide enough for every table."""
    plain = Console(stderr=stderr)
    return plain if plain.is_terminal else Console(stderr=stderr, width=160)


def number(value: float) -> str:
    """Format with three significant digits and without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def report(results: Results, out: Console) -> None:
    """Print all tables."""
    for (database, loop, workload), cells in results.groups():
        title = ", ".join(filter(None, (workload, database, loop)))
        if workload == "refresh":
            out.print(_refresh(title, cells))
        elif workload == "rows":
            out.print(_grid(results, title, cells, "rows", [cell.rows for cell in cells]))
        elif workload in ("list", "import") or workload.startswith("seal/"):
            out.print(_flat(results, title, cells))
        else:
            out.print(_grid(results, title, cells, "callers", [cell.callers for cell in cells]))
    targets = _targets(results)
    if targets.row_count:
        out.print(targets)
    out.print("[dim]median of the rounds \\[lower quartile–upper quartile]; ratios are taken within each round[/]")


def _grid(results: Results, title: str, cells: Sequence[Cell], axis: str, points: Sequence[int]) -> Table:
    """Make a table with a row for each contender and a column for each number of callers or rows."""
    columns = sorted(set(points))
    table = Table(title=f"{title}: µs an operation", title_justify="left", show_lines=True)
    table.add_column("")
    floors = {column: _floor_title(results, cells, axis, column) for column in columns}
    for column in columns:
        against = f"\n[dim]× {floors[column]}[/]" if floors[column] else ""
        noun = axis.removesuffix("s") if column == 1 else axis
        table.add_column(f"{column:,} {noun}{against}", justify="right")
    for name in dict.fromkeys(cell.contender for cell in cells):
        mine = {getattr(cell, axis): cell for cell in cells if cell.contender == name}
        title_of = next(iter(mine.values())).title
        line = [_timing(results, mine[column]) if column in mine else "" for column in columns]
        table.add_row(f"[bold]{title_of}[/]" if name == OURS else title_of, *line)
    return table


def _floor_title(results: Results, cells: Sequence[Cell], axis: str, column: int) -> str:
    for cell in cells:
        if getattr(cell, axis) == column and (floor := results.cell(cell.place, cell.floor)):
            return floor.title
    return ""


def _timing(results: Results, cell: Cell) -> str:
    p50, p99 = (number(spread(cell.values(name)).median) for name in ("p50", "p99"))
    cost = f"{number(spread(cell.values()).median)} {_ratio(results.ratios(cell))}".rstrip()
    return f"{cost}\n[dim]p50 {p50}  p99 {p99}[/]"


def _ratio(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    low, middle, high = spread(ratios)
    return f" ×{middle:.2f} [dim]\\[{low:.2f}–{high:.2f}][/]"


def _flat(results: Results, title: str, cells: Sequence[Cell]) -> Table:
    """Make a table with a row for each contender and a column for each number in its rounds."""
    names = list(dict.fromkeys(name for cell in cells for numbers in cell.rounds for name in numbers))
    units = {"us": "ms a process" if cells[0].workload == "import" else "µs each", "growth_mb": "growth, MB"}
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(units.get(name, name), justify="right")
    floor = next((cell.title for cell in cells if not cell.floor or cell.floor == cell.contender), "")
    table.add_column(f"× {floor}", justify="right")
    for cell in cells:
        line = []
        for name in names:
            values = [numbers[name] for numbers in cell.rounds if name in numbers]
            scale = 1000 if (name, cell.workload) == ("us", "import") else 1
            line.append(number(spread(values).median / scale) if values else "")
        table.add_row(cell.title, *line, _ratio(results.ratios(cell)))
    return table


def _refresh(title: str, cells: Sequence[Cell]) -> Table:
    [cell] = cells
    table = Table(title=f"{title}: loads of other callers while {cell.callers} callers wait, µs", title_justify="left")
    names = {"idle_p50": "idle p50", "idle_p99": "p99", "busy_p50": "busy p50", "busy_p99": "p99"}
    for heading in (*names.values(), "busy p99 × idle p99", "calls of the provider"):
        table.add_column(heading, justify="right")
    timings = (number(spread(cell.values(name)).median) for name in names)
    table.add_row(*timings, _ratio(cell.values("ratio")), f"{max(cell.values('calls')):g} at most")
    return table


def _targets(results: Results) -> Table:
    table = Table(title="Targets", title_justify="left")
    for heading in ("", "database", "loop", "compared with"):
        table.add_column(heading)
    for heading in ("figure", "target", ""):
        table.add_column(heading, justify="right")
    for target, place, value, met in outcomes(results):
        low, middle, high = value
        word = {True: "[green]ok[/]", False: "[red]short[/]", None: ""}[met]
        shown = f"{number(middle)} {target.unit} [dim]\\[{number(low)}–{number(high)}][/]"
        table.add_row(target.what, place.database, place.loop, target.against, shown, target.limit, word)
    return table
