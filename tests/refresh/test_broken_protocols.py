"""The search of the refresh model finds the faults of deliberately broken protocols."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from support.refresh_model import EMPTY, FAULTS, FREEZE, ISSUING, LOSSES, URGENT, Protocol, Scenario, Statement
from support.refresh_model_search import search, told
from tokenstore import leases
from tokenstore.leases import Row
from tokenstore.refresh import steps
from tokenstore.refresh.steps import Call, Claim, End, Goal, Insert, Outcome, Read, Reread, Save, Settle, Step, View

# Faults that neither lose tokens nor delay a lease holder beyond its lease.
GENTLE = FAULTS - LOSSES - {FREEZE}


TWO = (URGENT, URGENT)


@dataclass(frozen=True)
class Fault:
    """A broken protocol.

    Attributes:
        protocol: The protocol with the fault.
        scenario: The scenario in which the fault shows.
        violated: The names of the invariants that it may violate.
        moves: The length of the shortest trace.
    """

    protocol: Protocol
    scenario: Scenario
    violated: str
    moves: int


def unchecked(change: Statement) -> Statement:
    """Make a statement that ignores the row's generation."""

    def changed(row: Row[int], *args: int, generation: int, **others: object) -> Any:
        return change(row, *args, generation=row.generation, **others)

    return changed


def released_by_anybody(
    row: Row[int], *, generation: int, holder: str, now: int, failure: tuple[str, int | None] | None = None
) -> Row[int] | None:
    held = replace(row, lease_holder=holder)
    return leases.released(held, generation=generation, holder=holder, now=now, failure=failure)


def released_without_a_look(
    row: Row[int], *, generation: int, holder: str, now: int, failure: tuple[str, int | None] | None = None
) -> Row[int] | None:
    return released_by_anybody(row, generation=row.generation, holder=holder, now=now, failure=failure)


def completed_beside_a_lease(row: Row[int], tokens: int, *, generation: int, holder: str, now: int) -> Row[int] | None:
    return leases.written(row, tokens) if row.generation == generation else None


def completed_by_the_last_holder(
    row: Row[int], tokens: int, *, generation: int, holder: str, now: int
) -> Row[int] | None:
    held = row.generation == generation and row.lease_holder == holder
    return leases.written(row, tokens) if held else None


def claimed_beside_a_lease(row: Row[int], *, generation: int, holder: str, now: int, duration: int) -> Row[int] | None:
    free = replace(row, lease_holder=None, lease_expires_at=None)
    return leases.claimed(free, generation=generation, holder=holder, now=now, duration=duration)


def claimed_despite_a_failure(
    row: Row[int], *, generation: int, holder: str, now: int, duration: int
) -> Row[int] | None:
    if row.generation != generation or row.is_leased(now):
        return None
    return replace(row, lease_holder=holder, lease_expires_at=now + duration)


def written_over_a_failure(row: Row[int], tokens: int) -> Row[int]:
    return replace(row, tokens=tokens, generation=row.generation + 1, lease_holder=None, lease_expires_at=None)


def written_in_place(row: Row[int], tokens: int) -> Row[int]:
    return Row(tokens, row.generation)


def sure_of_its_claim(step: Claim, *, granted: bool) -> Step:
    return steps.Call(step.generation)


def gives_its_tokens_up(step: Save, *, saved: bool) -> Step:
    return steps.after_save(step, saved=saved) if saved else Read()


def yields_to_another_lease(goal: Goal, step: Reread, row: View | None) -> tuple[Goal, Step]:
    goal, following = steps.after_reread(goal, step, row)
    return goal, Read() if isinstance(following, Reread) else following


def believes_every_refusal(step: Settle, *, settled: bool) -> Step:
    return End(Outcome.FAILED, step.failure)


def believes_what_it_could_not_leave(step: Settle) -> Step:
    return End(Outcome.FAILED, step.failure)


def calls_again(step: Settle) -> Step:
    return Read()  # the row has this process's own live lease, so it calls the provider again


def issues_without_a_lease(_: Insert) -> Step:
    return Call(1)


def inserted_over_an_empty_row(row: Row[int] | None, generation: int) -> Row[int] | None:
    return Row(EMPTY, generation) if row is None or row.tokens == EMPTY else None


LENIENT = Scenario(False)
ISSUERS = Scenario(False, goals=(ISSUING, ISSUING), faults=0, issues=True)
LOGIN = Scenario(False, goals=TWO, faults=1, logins=1)
LOGIN_ALONE = replace(LOGIN, faults=0)
BROKEN = {
    "tokens issued for a row that was inserted without a lease": Fault(
        Protocol(after_insert=issues_without_a_lease),
        replace(ISSUERS, kinds=GENTLE),
        "tokens_are_issued_under_a_lease",
        3,
    ),
    "an empty row served": Fault(Protocol(empty_is_valid=True), ISSUERS, "served_means_valid", 3),
    "an empty row inserted over another": Fault(
        Protocol(inserted=inserted_over_an_empty_row), ISSUERS, "generations_rise", 4
    ),
    "two issuers at a time": Fault(Protocol(claimed=claimed_beside_a_lease), ISSUERS, "one_live_lease", 6),
    "two issuers in turn": Fault(
        Protocol(claimed=unchecked(leases.claimed)), ISSUERS, "a_lease_sends_what_the_row_holds", 11
    ),
    "claim without the generation": Fault(
        Protocol(claimed=unchecked(leases.claimed)), LENIENT, "a_lease_sends_what_the_row_holds", 9
    ),
    "completion without the generation": Fault(
        Protocol(completed=unchecked(leases.completed)), LOGIN_ALONE, "tokens_are_never_older", 8
    ),
    # If each lease has a different holder's name, the name alone distinguishes leases.
    "release without the generation, under an old name": Fault(
        Protocol(released=unchecked(leases.released), renames=False),
        Scenario(False, goals=TWO, ageings=1),
        "marked_for_good_means_dead",
        18,
    ),
    "release without generation or holder": Fault(
        Protocol(released=released_without_a_look), LOGIN, "failed_for_good_means_dead", 8
    ),
    "release by anybody": Fault(Protocol(released=released_by_anybody), LENIENT, "one_live_lease", 8),
    "refusal believed, though the row has changed": Fault(
        Protocol(after_settle=believes_every_refusal), LENIENT, "failed_for_good_means_dead", 13
    ),
    "refusal believed, though the row could not be asked": Fault(
        Protocol(after_unsettled=believes_what_it_could_not_leave), LOGIN, "failed_for_good_means_dead", 8
    ),
    "completion beside another's live lease": Fault(
        Protocol(completed=completed_beside_a_lease), LENIENT, "one_live_lease", 9
    ),
    "completion by the last holder alone": Fault(
        Protocol(completed=completed_by_the_last_holder), LENIENT, "an endless cycle", 15
    ),
    "tokens given up when their write is refused": Fault(
        Protocol(after_save=gives_its_tokens_up), LENIENT, "no_pair_is_dropped", 9
    ),
    "tokens given up at another's lease": Fault(
        Protocol(after_reread=yields_to_another_lease), LENIENT, "no_pair_is_dropped", 10
    ),
    "claim beside a live lease": Fault(Protocol(claimed=claimed_beside_a_lease), LENIENT, "one_live_lease", 4),
    "claim despite a failure": Fault(
        Protocol(claimed=claimed_despite_a_failure), LENIENT, "a_lease_sends_what_the_row_holds", 8
    ),
    "claim without an answer taken for granted": Fault(
        Protocol(after_claim=sure_of_its_claim), Scenario(False, kinds=GENTLE), "nothing_is_sent_twice", 8
    ),
    "new tokens under an old failure": Fault(
        Protocol(written=written_over_a_failure),
        Scenario(False, faults=1, logins=1),
        "marked_for_good_means_dead",
        8,
    ),
    "login without a new generation": Fault(Protocol(written=written_in_place), LOGIN, "generations_rise", 2),
    "another call where a failure could not be left": Fault(
        Protocol(after_unsettled=calls_again),
        Scenario(False, faults=3, kinds=GENTLE),
        "nothing_is_sent_twice",
        15,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_search_finds_a_seeded_fault(name: str) -> None:
    """The trace has the known shortest length; another length would mean that the model has changed."""
    fault = BROKEN[name]
    result = told(name, search(fault.scenario, fault.protocol))
    assert result.violation is not None, f"{result.states} states did not show: {name}"
    assert result.violation.name == fault.violated, str(result.violation)
    assert len(result.violation.trace) == fault.moves, str(result.violation)


def test_a_settling_that_arrives_a_lease_late_ends_no_later_lease_of_its_sender() -> None:
    """A settling is the statement that writes a failure to the row. After a refused one, the holder's name changes.

    With the old name, three faults can end a later lease: the settling is sent twice, the second one is executed, and
    its result is lost. The retry time comes, the same refresh claims again, and then the first settling is executed.
    """
    scenario = Scenario(False, faults=3, kinds=GENTLE)
    assert told("with another name", search(scenario)).violation is None
    result = told("a settling a lease late", search(scenario, Protocol(renames=False)))
    assert result.violation is not None
    assert (result.violation.name, len(result.violation.trace)) == ("nothing_is_sent_twice", 19)
