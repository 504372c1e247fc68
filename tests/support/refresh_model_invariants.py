"""The invariants of the model of the refresh protocol, which are checked at each move."""

from __future__ import annotations

from collections.abc import Callable

from support.refresh_model import FREEZE, LOSSES, NOW, PLACES, Crashed, Move, Scenario, State
from tokenstore.records import Failure
from tokenstore.refresh.steps import End, Outcome

Invariant = Callable[[Scenario, State, Move, State], bool]
INVARIANTS: list[Invariant] = []


def _invariant(check: Invariant) -> Invariant:
    INVARIANTS.append(check)
    return check


@_invariant
def one_live_lease(_: Scenario, before: State, move: Move, after: State) -> bool:
    """At most one process has a live lease, and it is the lease holder in the row.

    So at most one process calls the provider while its lease is live. A lease ends before its time by a statement of
    its holder (also a delayed one), by new tokens from elsewhere, or with the row's deletion.
    """
    holders = [PLACES[place] for place, proc in enumerate(after.procs) if proc.leased]
    row = after.row
    return holders == ([row.lease_holder] if row is not None and row.is_leased(NOW) else [])


@_invariant
def a_lease_sends_what_the_row_holds(_: Scenario, before: State, move: Move, after: State) -> bool:
    """A process with a live lease sends only the refresh token in the row, and only if the row has no failure.

    So once a new pair is stored, only a process whose lease has expired can still send the old refresh token.
    """
    if not move.sends or move.who is None or not before.procs[move.who].leased:
        return True
    row = before.row
    return row is not None and before.procs[move.who].token == row.tokens and not row.has_failed(NOW)


@_invariant
def generations_rise(_: Scenario, before: State, move: Move, after: State) -> bool:
    """The generation grows by one with each write of tokens and with no other write, also after a deletion."""
    old, new = before.row, after.row
    if new is None or new == old:
        return True
    if old is None or old.tokens != new.tokens:
        return new.generation == before.generation + 1
    return new.generation == old.generation


@_invariant
def tokens_are_never_older(_: Scenario, before: State, move: Move, after: State) -> bool:
    """A pair in the row is never replaced by a pair that the provider issued earlier."""
    return before.row is None or after.row is None or after.row.tokens >= before.row.tokens


@_invariant
def no_pair_is_dropped(scenario: Scenario, before: State, move: Move, after: State) -> bool:
    """A running process drops its new pair only after the row has that pair or a newer one, or is deleted.

    So at the end, the newest pair that reached a process which did not crash is in the row. A provider that issues
    tokens without a refresh token can issue them again.
    """
    if move.who is None or scenario.issues:
        return True
    hand, proc = before.procs[move.who].hand, after.procs[move.who]
    if hand is None or proc.hand == hand or isinstance(proc.step, Crashed):
        return True
    return after.row is None or after.row.tokens >= hand


@_invariant
def failed_for_good_means_dead(_: Scenario, before: State, move: Move, after: State) -> bool:
    """A refresh ends with "log in again" only if the provider no longer accepts the refresh token in the row.

    A frozen process may still have the pair that replaces it.
    """
    if move.who is None or before.procs[move.who].gone:
        return True
    match after.procs[move.who].step:
        case End(Outcome.FAILED, Failure(retry_in=None)):
            return after.row is not None and after.row.tokens != after.live
    return True


@_invariant
def marked_for_good_means_dead(_: Scenario, before: State, move: Move, after: State) -> bool:
    """If the row has a failure without a retry time, the provider no longer accepts the row's refresh token."""
    row = after.row
    return row is None or row.failure_code is None or row.retry_at is not None or row.tokens != after.live


@_invariant
def served_means_valid(_: Scenario, before: State, move: Move, after: State) -> bool:
    """A refresh ends successfully only if the row's access token is valid at that moment."""
    if move.who is None or before.procs[move.who].gone:
        return True
    match after.procs[move.who].step:
        case End(Outcome.REFRESHED | Outcome.SERVED):
            return after.row is not None and after.row.tokens >= after.aged
    return True


@_invariant
def nothing_is_sent_twice(scenario: Scenario, before: State, move: Move, after: State) -> bool:
    """Without crashes, lost responses, frozen lease holders and logins, the provider refuses no refresh token.

    Lost statements and outages of the provider change nothing about that, with one exception: a delayed settling that
    is executed during its sender's next lease, which test_transitions.py shows.
    """
    if scenario.kinds & (LOSSES | {FREEZE}) or scenario.logins:
        return True
    return move.who is None or after.procs[move.who].wire != "refused"


@_invariant
def grants_survive(scenario: Scenario, before: State, move: Move, after: State) -> bool:
    """At the end the provider accepts the row's refresh token, unless a process crashed or a response was lost.

    With a strict provider, a frozen lease holder can also lose the grant.
    """
    if scenario.issues or scenario.kinds & LOSSES or (scenario.strict and FREEZE in scenario.kinds):
        return True
    if after.row is None or after.login is not None or any(p.late or not p.gone for p in after.procs):
        return True
    return after.row.tokens == after.live


@_invariant
def tokens_are_issued_under_a_lease(scenario: Scenario, before: State, move: Move, after: State) -> bool:
    """A process has tokens issued only while it holds the lease, unless that has expired or the row was deleted."""
    if not scenario.issues or not move.sends or FREEZE in scenario.kinds or scenario.deletions:
        return True
    return move.who is not None and before.procs[move.who].leased


@_invariant
def tokens_are_issued_once(scenario: Scenario, before: State, move: Move, after: State) -> bool:
    """Without crashes, lost responses, frozen lease holders and deletions, each expiry costs one issue of tokens."""
    if not scenario.issues or scenario.kinds & (LOSSES | {FREEZE}) or scenario.deletions:
        return True
    return after.issued <= 1 + scenario.ageings - after.ageings
