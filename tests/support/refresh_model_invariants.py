"""What must hold at every move of the model of the refresh protocol."""

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
    """Whoever was granted a lease whose time is not over is the one whom the row names: never two.

    So at most one process calls the provider while its lease is live. A lease ends early by a statement of its
    holder's, be it a late one, by new tokens from elsewhere, or with the row.
    """
    holders = [PLACES[place] for place, proc in enumerate(after.procs) if proc.leased]
    row = after.row
    return holders == ([row.lease_holder] if row is not None and row.is_leased(NOW) else [])


@_invariant
def a_lease_sends_what_the_row_holds(_: Scenario, before: State, move: Move, after: State) -> bool:
    """A refresh token that is sent under a live lease is the row's, and no failure for good is on it.

    So once a new pair is stored, nobody sends the old refresh token but a process whose lease has run out.
    """
    if not move.sends or move.who is None or not before.procs[move.who].leased:
        return True
    row = before.row
    return row is not None and before.procs[move.who].token == row.tokens and not row.has_failed(NOW)


@_invariant
def generations_rise(_: Scenario, before: State, move: Move, after: State) -> bool:
    """The generation rises by one with each write of tokens, and with nothing else; none comes back."""
    old, new = before.row, after.row
    if new is None or new == old:
        return True
    if old is None or old.tokens != new.tokens:
        return new.generation == before.generation + 1
    return new.generation == old.generation


@_invariant
def tokens_are_never_older(_: Scenario, before: State, move: Move, after: State) -> bool:
    """No pair in the row is replaced by one that the provider issued before it."""
    return before.row is None or after.row is None or after.row.tokens >= before.row.tokens


@_invariant
def no_pair_is_dropped(_: Scenario, before: State, move: Move, after: State) -> bool:
    """A process that lives lets go of its new pair only once the row holds that or a newer one, or is deleted.

    So when nothing is left to do, the newest pair that reached a process which did not crash is in the row.
    """
    if move.who is None:
        return True
    hand, proc = before.procs[move.who].hand, after.procs[move.who]
    if hand is None or proc.hand == hand or isinstance(proc.step, Crashed):
        return True
    return after.row is None or after.row.tokens >= hand


@_invariant
def failed_for_good_means_dead(_: Scenario, before: State, move: Move, after: State) -> bool:
    """A refresh ends by asking for a new login only if the refresh token that is then in the row is dead.

    Dead at the provider: used, revoked, or both. A pair that replaces it may still be in a frozen process's hand.
    """
    if move.who is None or before.procs[move.who].gone:
        return True
    match after.procs[move.who].step:
        case End(Outcome.FAILED, Failure(retry_in=None)):
            return after.row is not None and after.row.tokens != after.live
    return True


@_invariant
def marked_for_good_means_dead(_: Scenario, before: State, move: Move, after: State) -> bool:
    """A failure for good that is in a row speaks of the pair that is in the row: its refresh token is dead."""
    row = after.row
    return row is None or row.failure_code is None or row.retry_at is not None or row.tokens != after.live


@_invariant
def served_means_valid(_: Scenario, before: State, move: Move, after: State) -> bool:
    """A refresh ends well only if the row's access token is valid at that moment."""
    if move.who is None or before.procs[move.who].gone:
        return True
    match after.procs[move.who].step:
        case End(Outcome.REFRESHED | Outcome.SERVED):
            return after.row is not None and after.row.tokens >= after.aged
    return True


@_invariant
def nothing_is_sent_twice(scenario: Scenario, before: State, move: Move, after: State) -> bool:
    """Without a crash, a lost response, a frozen holder and a login the provider refuses no refresh token.

    Whatever happens to the statements, and however often the provider is away; with one exception, a settling that is
    carried out under its sender's next lease, which test_transitions.py shows.
    """
    if scenario.kinds & (LOSSES | {FREEZE}) or scenario.logins:
        return True
    return move.who is None or after.procs[move.who].wire != "refused"


@_invariant
def grants_survive(scenario: Scenario, before: State, move: Move, after: State) -> bool:
    """At the end the row's refresh token is live, unless a process crashed or a response was lost.

    With a strict provider a frozen holder is a third cause. With any other it does no lasting harm.
    """
    if scenario.kinds & LOSSES or (scenario.strict and FREEZE in scenario.kinds):
        return True
    if after.row is None or after.login is not None or any(p.late or not p.gone for p in after.procs):
        return True
    return after.row.tokens == after.live
