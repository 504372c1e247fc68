"""The project's targets for the figures, as data, and the check whether a run meets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from benchmarks.contenders import OURS
from benchmarks.measure import Spread, spread
from benchmarks.results import Cell, Place, Results

__all__ = ["TARGETS", "Outcome", "Target", "outcomes"]

Values = Callable[[Results, Cell], list[float]]
"""Returns the figure of each round of a cell of tokenstore; empty if the results do not contain it."""


def cost(contender: str, callers: int | None = None) -> Values:
    """Tokenstore's time for each operation divided by the contender's; ``callers``: the contender's callers."""

    def values(results: Results, cell: Cell) -> list[float]:
        place = cell.place if callers is None else cell.place._replace(callers=callers)
        other = results.cell(place, contender)
        return [] if other is None else [a / b for a, b in zip(cell.values(), other.values(), strict=False)]

    return values


def speed(contender: str, callers: int | None = None) -> Values:
    """Tokenstore's operations per second divided by the contender's; ``callers``: the contender's callers."""
    inverse = cost(contender, callers)
    return lambda results, cell: [1 / value for value in inverse(results, cell)]


def gain(contender: str, callers: int) -> Values:
    """Tokenstore's :func:`speed` with the cell's number of callers, divided by that with ``callers`` callers."""

    def values(results: Results, cell: Cell) -> list[float]:
        before = results.cell(cell.place._replace(callers=callers), OURS)
        if before is None:
            return []
        here, there = speed(contender)(results, cell), speed(contender)(results, before)
        return [a / b for a, b in zip(here, there, strict=False)]

    return values


def figure(name: str) -> Values:
    """A number of the cell's rounds, unchanged."""
    return lambda _, cell: [numbers[name] for numbers in cell.rounds if name in numbers]


def growth(rows: int) -> Values:
    """Tokenstore's time for each operation, divided by its time with ``rows`` rows."""

    def values(results: Results, cell: Cell) -> list[float]:
        before = results.cell(cell.place._replace(rows=rows), OURS)
        return [] if before is None else [a / b for a, b in zip(cell.values(), before.values(), strict=False)]

    return values


def over_bare() -> Values:
    """The cell's time minus that of ``python -c pass``, in milliseconds."""

    def values(results: Results, cell: Cell) -> list[float]:
        bare = results.cell(cell.place, "python")
        return [] if bare is None else [(a - b) / 1000 for a, b in zip(cell.values(), bare.values(), strict=False)]

    return values


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure with an upper or a lower limit.

    Attributes:
        what: What is measured, for the table.
        workload: The workload's name and variant.
        against: What the figure is compared with, for the table.
        values: Returns the figure of each round.
        most: The upper limit; None: no upper limit.
        least: The lower limit; None: no lower limit.
        on: Prefixes of the names of databases; empty: all databases.
        callers: Only cells with that many callers; None: all.
        rows: Only cells with that many rows; None: all.
        contender: Only this contender's cells.
        unit: The figure's unit.
    """

    what: str
    workload: str
    against: str = ""
    values: Values
    most: float | None = None
    least: float | None = None
    on: tuple[str, ...] = ()
    callers: int | None = None
    rows: int | None = None
    contender: str = OURS
    unit: str = "×"

    @property
    def limit(self) -> str:
        """The limit as text."""
        if self.most is not None:
            return f"≤ {self.most:g} {self.unit}"
        return "" if self.least is None else f"≥ {self.least:g} {self.unit}"

    def met(self, value: float) -> bool | None:
        """Whether a figure is within the limit; None: there is no limit."""
        if self.most is not None:
            return value <= self.most
        return None if self.least is None else value >= self.least

    def fits(self, cell: Cell) -> bool:
        """Whether the target applies to this cell."""
        return (
            (cell.contender, cell.workload) == (self.contender, self.workload)
            and (not self.on or cell.database.startswith(self.on))
            and self.callers in (None, cell.callers)
            and self.rows in (None, cell.rows)
        )


_PG, _ASYNCPG, _MYSQL, _SQLITE = ("postgresql",), ("postgresql+asyncpg",), ("mysql",), ("sqlite",)
_LOAD, _STORE = "load/cold", "store/update"
_HELD, _POOL, _HOP = "driver, held connection", "driver's pool, no reset", "one hop to sqlite3"
_ORM = "ORM + Fernet"


def _target(
    what: str,
    workload: str,
    callers: int,
    on: tuple[str, ...],
    against: str,
    values: Values,
    *,
    most: float | None = None,
    least: float | None = None,
) -> Target:
    return Target(
        what=what, workload=workload, callers=callers, on=on, against=against, values=values, most=most, least=least
    )


TARGETS: Final = [
    *(
        target
        for name, workload, lead in (("load", _LOAD, 3.0), ("store", _STORE, 2.0))
        for target in (
            _target(f"{name}, 1 caller: cost", workload, 1, (*_PG, *_MYSQL), _HELD, cost("held"), most=1.25),
            _target(f"{name}, 1 caller: cost", workload, 1, _SQLITE, _HOP, cost("one-hop"), most=1.25),
            _target(f"{name}, 32 callers: rate", workload, 32, _ASYNCPG, _POOL, speed("pool-no-reset"), least=2),
            _target(f"{name}, 32 callers: rate", workload, 32, _MYSQL, _POOL, speed("pool"), least=2),
            _target(f"{name}, 32 callers: rate", workload, 32, _SQLITE, f"{_HOP}, 32", speed("one-hop"), least=lead),
            _target(f"{name}, 32 callers: rate", workload, 32, _SQLITE, f"{_HOP}, 1", speed("one-hop", 1), least=lead),
        )
    ),
    _target("load, 256 callers: lead over 32's", _LOAD, 256, _ASYNCPG, _POOL, gain("pool-no-reset", 32), least=1),
    _target("load, 256 callers: lead over 32's", _LOAD, 256, _MYSQL, _POOL, gain("pool", 32), least=1),
    _target("load, 256 callers: lead over 32's", _LOAD, 256, _SQLITE, _HOP, gain("one-hop", 32), least=1),
    _target("load, 1 caller: rate", _LOAD, 1, _PG, _ORM, speed("orm-fernet"), least=5),
    _target("load, 32 callers: rate", _LOAD, 32, _PG, _ORM, speed("orm-fernet"), least=15),
    _target("load, 1 caller: rate", _LOAD, 1, _SQLITE, _ORM, speed("orm-fernet"), least=10),
    _target("load, 32 callers: rate", _LOAD, 32, _SQLITE, _ORM, speed("orm-fernet"), least=30),
    Target(
        what="loads of other callers during a refresh: p99",
        workload="refresh",
        against="without a refresh",
        values=figure("ratio"),
    ),
    Target(what="provider calls for one refresh", workload="refresh", values=figure("calls"), most=1, unit="call"),
    Target(
        what="load with 10⁶ rows: cost",
        workload="rows",
        rows=1_000_000,
        against="10³ rows",
        values=growth(1000),
        most=1.15,
    ),
    Target(what="list_tokens: growth", workload="list", values=figure("growth_mb"), most=50, unit="MB"),
    Target(what="list_tokens: cost", workload="list", against="bare keyset scan", values=cost("keyset-scan")),
    Target(
        what="import tokenstore",
        workload="import",
        contender="import",
        against="python -c pass",
        values=over_bare(),
        most=60,
        unit="ms",
    ),
    Target(
        what="tokenstore --help",
        workload="import",
        contender="help",
        values=lambda _, cell: [us / 1000 for us in cell.values()],
        most=250,
        unit="ms",
    ),
]
"""A cost is tokenstore's time divided by the other's, a rate the other's divided by tokenstore's.

A figure without a limit is only shown.
"""


class Outcome(NamedTuple):
    """The result of one target in one place."""

    target: Target
    place: Place
    value: Spread
    met: bool | None


def outcomes(results: Results) -> Iterator[Outcome]:
    """Check each target in each place for which the results contain the figure."""
    for target in TARGETS:
        for cell in results.cells:
            if target.fits(cell) and (values := target.values(results, cell)):
                value = spread(values)
                yield Outcome(target, cell.place, value, target.met(value.median))
