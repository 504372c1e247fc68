"""The refresh protocol keeps its invariants in every interleaving of its steps.

``pytest tests/refresh/test_transitions.py -s`` prints the number of states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from support.refresh_model import BACKGROUND, FAULTS, FREEZE, ISSUING, LATE, LOSSES, URGENT, Scenario
from support.refresh_model_invariants import INVARIANTS
from support.refresh_model_search import crash_points, search, told
from tokenstore.refresh.steps import End, Outcome

# Faults that neither lose tokens nor delay a lease holder beyond its lease.
GENTLE = FAULTS - LOSSES - {FREEZE}
FORCED = replace(URGENT, force=True)
TWO = (URGENT, URGENT)
# Each scenario is searched with a strict and with a lenient provider, and has at least this many states.
SCENARIOS = {
    "three refreshes, two faults": (6_000, Scenario(True)),
    "three refreshes, a fault, a login": (3_500, Scenario(True, faults=1, logins=1)),
    "two refreshes, two faults, a login": (5_000, Scenario(True, goals=TWO, logins=1)),
    "two refreshes, a fault, a login, a deletion, an expiry": (
        10_000,
        Scenario(True, goals=TWO, faults=1, logins=1, deletions=1, ageings=1),
    ),
    "refreshes ahead of time": (9_000, Scenario(True, goals=(BACKGROUND, FORCED), due=True, ageings=1)),
    "three refreshes, two gentle faults": (1_000, Scenario(True, kinds=GENTLE)),
    "three issuers, two faults": (3_000, Scenario(False, goals=(ISSUING,) * 3, issues=True)),
    "three issuers, two gentle faults, an expiry": (
        3_000,
        Scenario(False, goals=(ISSUING,) * 3, kinds=GENTLE, ageings=1, issues=True),
    ),
    "two issuers, two faults, a deletion, an expiry": (
        3_000,
        Scenario(False, goals=(ISSUING,) * 2, deletions=1, ageings=1, issues=True),
    ),
    "three refreshes, two faults, nothing lost": (3_000, Scenario(True, kinds=FAULTS - LOSSES)),
}
DEEPER = {
    "three refreshes, three faults": (25_000, Scenario(True, faults=3)),
    "three refreshes, two faults, a login": (20_000, Scenario(True, logins=1)),
    "three refreshes, a fault, a login, a deletion, an expiry": (
        70_000,
        Scenario(True, faults=1, logins=1, deletions=1, ageings=1),
    ),
    "three refreshes ahead of time": (
        30_000,
        Scenario(True, goals=(BACKGROUND, BACKGROUND, URGENT), due=True, ageings=1),
    ),
    "two refreshes, two faults, a login, an expiry": (20_000, Scenario(True, goals=TWO, logins=1, ageings=1)),
    "two refreshes, four faults": (10_000, Scenario(True, goals=TWO, faults=4)),
    "three refreshes, three gentle faults, none late": (1_000, Scenario(True, faults=3, kinds=GENTLE - {LATE})),
    "three refreshes, three faults, nothing lost or late": (
        3_000,
        Scenario(True, faults=3, kinds=FAULTS - LOSSES - {LATE}),
    ),
}


def cases() -> Iterator[object]:
    for scenarios, marks in ((SCENARIOS, []), (DEEPER, [pytest.mark.seeded])):
        for name, (least, scenario) in scenarios.items():
            for strict in (False,) if scenario.issues else (True, False):
                case = f"{name}, {'strict' if strict else 'lenient'}"
                yield pytest.param(case, least, replace(scenario, strict=strict), id=case, marks=marks)


@pytest.mark.parametrize(("name", "least", "scenario"), list(cases()))
def test_the_invariants_hold_in_every_interleaving(name: str, least: int, scenario: Scenario) -> None:
    result = told(name, search(scenario))
    assert result.violation is None, str(result.violation)
    assert result.states >= least
    outcomes = {proc.step.outcome for state in result.ends for proc in state.procs if isinstance(proc.step, End)}
    assert {Outcome.REFRESHED, Outcome.SERVED, Outcome.FAILED} <= outcomes


def test_every_invariant_has_a_docstring() -> None:
    assert all(invariant.__doc__ for invariant in INVARIANTS)


# The consequence of a crash as in docs/refresh.md: how another refresh ends, and whether the grant is still valid then.
LIVES, DIES = ("REFRESHED", True), ("FAILED", False)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
def test_a_crash_at_each_point_has_the_documented_consequence(strict: bool) -> None:
    """A request that arrives after its sender's crash may use the refresh token before or after another process."""
    after = ("REFRESHED", not strict)
    assert crash_points(strict=strict) == {
        "before the claim": {LIVES},
        "after the claim": {LIVES},
        "request under way": {DIES, after},
        "response under way": {DIES},
        "before the write": {DIES},
        "before the failure is left": {LIVES},
    }
