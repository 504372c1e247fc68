"""What the figures should be, as data, and whether they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from benchmarks.contenders import OURS
from benchmarks.measure import Spread, spread
from benchmarks.results import Cell, Place, Results

__all__ = ["TARGETS", "Outcome", "Target", "outcomes"]

Values = Callable[[Results, Cell], list[float]]
"""The figure, round by round, of a cell of ours; empty where it cannot be told."""


def cost(contender: str, callers: int | None = None) -> Values:
    """Our µs an operation over theirs; with ``callers``, theirs with that many."""

    def values(results: Results, cell: Cell) -> list[float]:
        place = cell.place if callers is None else cell.place._replace(callers=callers)
        other = results.cell(place, contender)
        return [] if other is None else [a / b for a, b in zip(cell.values(), other.values(), strict=False)]

    return values


def speed(contender: str, callers: int | None = None) -> Values:
    """Our operations a second over theirs."""
    inverse = cost(contender, callers)
    return lambda results, cell: [1 / value for value in inverse(results, cell)]


def gain(contender: str, callers: int) -> Values:
    """By how much our lead over a contender grows from that many callers to the cell's."""

    def values(results: Results, cell: Cell) -> list[float]:
        before = results.cell(cell.place._replace(callers=callers), OURS)
        if before is None:
            return []
        here, there = speed(contender)(results, cell), speed(contender)(results, before)
        return [a / b for a, b in zip(here, there, strict=False)]

    return values


def figure(name: str) -> Values:
    """A number of the cell's rounds as it is."""
    return lambda _, cell: [numbers[name] for numbers in cell.rounds if name in numbers]


def growth(rows: int) -> Values:
    """Our µs an operation over ours with that many rows."""

    def values(results: Results, cell: Cell) -> list[float]:
        before = results.cell(cell.place._replace(rows=rows), OURS)
        return [] if before is None else [a / b for a, b in zip(cell.values(), before.values(), strict=False)]

    return values


def over_bare() -> Values:
    """Milliseconds more than ``python -c pass``."""

    def values(results: Results, cell: Cell) -> list[float]:
        bare = results.cell(cell.place, "python")
        return [] if bare is None else [(a - b) / 1000 for a, b in zip(cell.values(), bare.values(), strict=False)]

    return values


@dataclass(frozen=True, kw_only=True)
class Target:
    """One figure that should be at most, or at least, so much.

    Attributes:
        what: What is measured.
        workload: The workload's name and variant.
        against: What it is compared with, for readers.
        values: How to get it.
        most: The largest that is good enough; None: there is none.
        least: The smallest that is good enough; None: there is none.
        on: Beginnings of databases' names; empty: wherever it was measured.
        callers: In a cell with that many callers; None: any.
        rows: In a cell with that many rows; None: any.
        contender: Whose cell.
        unit: Behind the figure.
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
        """For readers."""
        if self.most is not None:
            return f"≤ {self.most:g} {self.unit}"
        return "" if self.least is None else f"≥ {self.least:g} {self.unit}"

    def met(self, value: float) -> bool | None:
        """Whether a figure is good enough; None where none is asked for."""
        if self.most is not None:
            return value <= self.most
        return None if self.least is None else value >= self.least

    def fits(self, cell: Cell) -> bool:
        """Whether this is a cell of ours that it is about."""
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
        what="others' loads during a hot refresh: p99",
        workload="refresh",
        against="the same, idle",
        values=figure("ratio"),
    ),
    Target(
        what="calls of the provider for one refresh", workload="refresh", values=figure("calls"), most=1, unit="call"
    ),
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
"""Costs are ours over theirs, rates the other way round; without a limit, the figure is shown and no more."""


class Outcome(NamedTuple):
    """A target where it was measured."""

    target: Target
    place: Place
    value: Spread
    met: bool | None


def outcomes(results: Results) -> Iterator[Outcome]:
    """Every target in every place where the results can tell."""
    for target in TARGETS:
        for cell in results.cells:
            if target.fits(cell) and (values := target.values(results, cell)):
                value = spread(values)
                yield Outcome(target, cell.place, value, target.met(value.median))
