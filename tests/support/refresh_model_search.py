"""Visits all states of a scenario of the refresh model, checks the invariants, and shows the moves to a violation."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise

from support.refresh_model import CRASH, NOW, OUTAGE, URGENT, Crashed, Model, Protocol, Scenario, State, Successor
from support.refresh_model_invariants import INVARIANTS
from tokenstore.leases import Row
from tokenstore.refresh.steps import End


@dataclass(frozen=True, slots=True)
class Violation:
    """The name of the violated invariant, and the shortest sequence of moves that leads to the violation."""

    name: str
    trace: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.name}, after {len(self.trace)} moves:", *self.trace])


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a search.

    Attributes:
        states: The number of different states; states that differ only in the order of the processes count once.
        moves: The number of moves between them.
        violation: The first violation, or None.
        ends: Without a violation: the states in which all processes have ended.
    """

    states: int
    moves: int
    violation: Violation | None = None
    ends: tuple[State, ...] = field(default=(), repr=False)


def search(scenario: Scenario, protocol: Protocol | None = None) -> Result:
    """Visit all states of a scenario, and check all invariants at each move.

    The search also checks progress. Calm moves are those that happen eventually without further faults: processes act,
    the provider responds, time passes, leases of crashed processes expire. From each state and in any order, there are
    finitely many calm moves, and after the last one each process has ended or crashed.
    """
    model = Model(scenario, protocol)
    first, _ = model.canonical(model.start())
    found = {first: 0}
    parents: list[State | None] = [None]
    states = [first]
    calm: list[list[int]] = []
    ends = []
    moves = 0
    for state in states:  # the loop appends to this list
        following = []
        for move, after in model.moves(state):
            moves += 1
            for invariant in INVARIANTS:
                if not invariant(scenario, state, move, after):
                    name = getattr(invariant, "__name__", "")
                    trace = (*_trace(model, parents, found, state), (move, after))
                    return Result(len(states), moves, Violation(name, _lines(model, trace)))
            known, _ = model.canonical(after)
            number = found.setdefault(known, len(states))
            if number == len(states):
                states.append(known)
                parents.append(state)
            if move.calm:
                following.append(number)
        calm.append(following)
        if not following:
            if not all(proc.gone for proc in state.procs):
                trace = _trace(model, parents, found, state)
                return Result(len(states), moves, Violation("a deadlock", _lines(model, trace)))
            ends.append(state)
    cycle = _cycle(calm)
    if cycle:
        trace = _trace(model, parents, found, states[cycle[0]])
        for here, there in pairwise(cycle):
            trace = (*trace, _between(model, states[here], states[there]))
        return Result(len(states), moves, Violation("an endless cycle", _lines(model, trace)))
    return Result(len(states), moves, ends=tuple(ends))


def _cycle(calm: list[list[int]]) -> list[int]:
    """Return a cycle of calm moves, with its first state repeated at the end; an empty list if there is none."""
    into: list[list[int]] = [[] for _ in calm]
    for here, following in enumerate(calm):
        for there in following:
            into[there].append(here)
    left = [len(following) for following in calm]
    done = deque(number for number, count in enumerate(left) if not count)
    while done:
        for here in into[done.popleft()]:
            left[here] -= 1
            if not left[here]:
                done.append(here)
    number = next((number for number, count in enumerate(left) if count), None)
    path: list[int] = []
    while number is not None:
        if number in path:
            return [*path[path.index(number) :], number]
        path.append(number)
        number = next(there for there in calm[number] if left[there])
    return []


def _between(model: Model, before: State, after: State) -> Successor:
    return next((move, raw) for move, raw in model.moves(before) if model.canonical(raw)[0] == after)


def _trace(model: Model, parents: list[State | None], found: dict[State, int], state: State) -> tuple[Successor, ...]:
    path = [state]
    while (parent := parents[found[path[-1]]]) is not None:
        path.append(parent)
    path.reverse()
    return tuple(_between(model, before, after) for before, after in pairwise(path))


def _lines(model: Model, trace: tuple[Successor, ...]) -> tuple[str, ...]:
    """Format a trace, one line for each move. A process keeps its name, although its index changes between states."""
    names = list("ABCD")
    lines = []
    for move, after in trace:
        actor = "" if move.who is None else names[move.who]
        lines.append(f"  {actor + move.what:<72} {_row(after.row, names)}")
        _, order = model.canonical(after)
        names = [names[place] for place in order]
    return tuple(lines)


def _row(row: Row[int] | None, names: list[str]) -> str:
    if row is None:
        return "no row"
    told = f"generation {row.generation}: pair {row.tokens}"
    if row.lease_holder is not None:
        told += f", leased by {names[int(row.lease_holder)]}" + ("" if row.is_leased(NOW) else " until now")
    if row.failure_code is not None:
        told += (
            ", failed" + ("" if row.has_failed(NOW) else " until now") + (" for good" if row.retry_at is None else "")
        )
    return told


def crash_points(*, strict: bool) -> dict[str, set[tuple[str, bool]]]:
    """Return for each crash point how the other refresh may end, and whether the row's refresh token is live then.

    There are two refreshes, one of which crashes. The only other fault is one failure of the provider, which is needed
    for the crash point "before the failure is left".
    """
    points: dict[str, set[tuple[str, bool]]] = {}
    for faults, kinds in ((1, {CRASH}), (2, {CRASH, OUTAGE})):
        scenario = Scenario(strict, goals=(URGENT, URGENT), faults=faults, kinds=frozenset(kinds), points=True)
        for state in search(scenario).ends:
            for crashed, other in (state.procs, state.procs[::-1]):
                if not isinstance(crashed.step, Crashed) or not isinstance(other.step, End):
                    continue
                assert state.row is not None
                if OUTAGE not in kinds or crashed.step.point == "before the failure is left":
                    outcome = (other.step.outcome.name, state.row.tokens == state.live)
                    points.setdefault(crashed.step.point, set()).add(outcome)
    return points


def told(name: str, result: Result) -> Result:
    sys.stdout.write(f"\n{name}: {result.states} states, {result.moves} moves\n")
    if result.violation is not None:
        sys.stdout.write(f"{result.violation}\n")
    return result
