"""A model of refreshes of one row: every move that may come next, over the very functions that the engine runs.

The row and the statements are those of ``tokenstore.leases``, and the steps are those of ``tokenstore.refresh.steps``.
What is modelled here is the world around them: processes that crash or freeze, statements and responses that get lost,
a provider that rotates refresh tokens, users who log in again. `refresh_model_invariants` says what must hold, and
`refresh_model_search` visits every state.

Time has no numbers. Now is 0 in every state; what lies ahead is 1, and passes by being set to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tokenstore import leases
from tokenstore.leases import Row
from tokenstore.records import Failure
from tokenstore.refresh import steps
from tokenstore.refresh.steps import (
    Call,
    Claim,
    End,
    Goal,
    Outcome,
    Read,
    Reread,
    Save,
    Settle,
    Step,
    Validity,
    View,
    Wait,
)

NOW, AHEAD = 0, 1
CRASH = "crash"
FREEZE = "lease runs out under a live holder"
OUTAGE = "provider fails without deciding"
LOST_RESPONSE = "response is lost"
LOST_ANSWER = "statement is carried out, its answer lost"
NOT_DONE = "statement is not carried out"
LATE = "statement is carried out later than its sender believes"
FAULTS = frozenset({CRASH, FREEZE, OUTAGE, LOST_RESPONSE, LOST_ANSWER, NOT_DONE, LATE})
_SILENCES = {
    LOST_ANSWER: "is carried out, unknown to it",
    NOT_DONE: "is not carried out",
    LATE: "stays under way, lost to it",
}
# After these a pair may be gone for good, whatever the protocol.
LOSSES = frozenset({CRASH, LOST_RESPONSE})
_INVALID_GRANT = Failure("invalid_grant")
_UNAVAILABLE = Failure("temporarily_unavailable", 1.0)
# A process knows itself by this name; the row knows it by its place among the processes.
_ME = "me"
PLACES = ("0", "1", "2", "3")
URGENT = Goal(_ME)
BACKGROUND = Goal(_ME, urgent=False)


def _after_unsettled(_: Settle) -> Step:
    """A failure that could not be left in the row, however often it was tried: ends with the database's error.

    That the refresh token is dead is no verdict yet: only the row could tell whether it is still the row's.
    """
    return End(Outcome.FAILED)


# pyright does not find out the types of the rows of generic functions behind `...`.
Statement = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Protocol:
    """The functions under test: the real ones, unless a test puts a broken one in place.

    Attributes:
        after_unsettled: What follows if nobody can tell whether a failure was left in the row.
        renames: A refresh whose settling was refused goes on under a new name.
    """

    written: Callable[[Row[int], int], Row[int]] = leases.written
    claimed: Statement = leases.claimed
    completed: Statement = leases.completed
    released: Statement = leases.released
    after_read: Callable[[Goal, View | None], tuple[Goal, Step]] = steps.after_read
    after_claim: Callable[..., Step] = steps.after_claim
    after_call: Callable[[Call, Failure | None], Step] = steps.after_call
    after_save: Callable[..., Step] = steps.after_save
    after_reread: Callable[[Goal, Reread, View | None], tuple[Goal, Step]] = steps.after_reread
    after_settle: Callable[..., Step] = steps.after_settle
    after_unsettled: Callable[[Settle], Step] = _after_unsettled
    renames: bool = True


@dataclass(frozen=True, slots=True)
class Scenario:
    """What may happen, and how often.

    Attributes:
        strict: The provider revokes the whole grant when a used refresh token is presented; else it refuses it, and
            that is all.
        goals: One process for each.
        due: The row's first access token is valid still, within the margin; else it has expired.
        faults: How many faults there are at most, of whatever kind.
        kinds: The kinds that there are.
        logins: How often the user logs in again, which ends the grant before.
        deletions: How often the row is deleted.
        ageings: How often the row's access token expires.
        points: Remember where a process crashed; for :func:`crash_points`.
    """

    strict: bool
    goals: tuple[Goal, ...] = (URGENT, URGENT, URGENT)
    due: bool = False
    faults: int = 2
    kinds: frozenset[str] = FAULTS
    logins: int = 0
    deletions: int = 0
    ageings: int = 0
    points: bool = False


@dataclass(frozen=True, slots=True)
class Crashed:
    """In place of a step: never acts again."""

    point: str = ""


class Late(NamedTuple):
    """A statement that the server has not carried out yet, and its sender no longer waits for."""

    step: Claim | Save | Settle
    pair: int | None


class Proc(NamedTuple):
    """One refresh.

    Attributes:
        goal: Of the refresh; its ``holder`` is always "me".
        step: What it does next.
        token: The refresh token that its last read brought, where the step needs it.
        hand: The pair that the provider issued to it and that it has not stored.
        wire: Of its call: "sent", then the answer under way: a pair, "refused" or "unavailable".
        leased: A lease was granted to it and its time is not over. Nothing but the invariants asks.
        late: A statement of its that is still under way.
    """

    goal: Goal
    step: Step | Crashed
    token: int | None = None
    hand: int | None = None
    wire: int | str | None = None
    leased: bool = False
    late: Late | None = None

    @property
    def gone(self) -> bool:
        """Whether it has ended or crashed."""
        return isinstance(self.step, (End, Crashed))


class State(NamedTuple):
    """The world. A pair of tokens is a number, in the order of issue, and so is its refresh token.

    Attributes:
        row: The row, or None once it is deleted.
        procs: The refreshes.
        issued: The last pair that the provider issued.
        live: The refresh token that the provider accepts, or None.
        grant: The first pair of the grant.
        adrift: Refresh tokens in requests whose sender no longer listens, and that may arrive yet.
        aged: Access tokens of pairs below this one have expired.
        login: A pair that a login brought, and that is not written yet.
        generation: The highest there ever was; none comes back after a deletion.
        faults: How many are left.
        logins: How many are left.
        deletions: How many are left.
        ageings: How many are left.
    """

    row: Row[int] | None
    procs: tuple[Proc, ...]
    issued: int
    live: int | None
    grant: int
    adrift: tuple[int, ...]
    aged: int
    login: int | None
    generation: int
    faults: int
    logins: int
    deletions: int
    ageings: int

    def with_proc(self, place: int, proc: Proc) -> State:
        return self._replace(procs=(*self.procs[:place], proc, *self.procs[place + 1 :]))


class Move(NamedTuple):
    """One line of a trace.

    Attributes:
        who: The place of the process that moves, or None.
        what: It did.
        calm: Something that happens by itself in the end; else a fault, or something a user does.
        sends: A request with its refresh token.
    """

    who: int | None
    what: str
    calm: bool = True
    sends: bool = False


Successor = tuple[Move, State]


class Model:
    """The moves of one scenario."""

    def __init__(self, scenario: Scenario, protocol: Protocol | None = None) -> None:
        self.scenario = scenario
        self.protocol = protocol or Protocol()
        self._ids: dict[Proc, int] = {}

    def start(self) -> State:
        scenario = self.scenario
        return State(
            row=Row(0, 1),
            procs=tuple(Proc(goal, Read()) for goal in scenario.goals),
            issued=0,
            live=0,
            grant=0,
            adrift=(),
            aged=0 if scenario.due else 1,
            login=None,
            generation=1,
            faults=scenario.faults,
            logins=scenario.logins,
            deletions=scenario.deletions,
            ageings=scenario.ageings,
        )

    def canonical(self, state: State) -> tuple[State, tuple[int, ...]]:
        """The same state for every order of the processes, which are interchangeable; and which stood where."""
        row = state.row
        holder = None if row is None or row.lease_holder is None else int(row.lease_holder)
        ids = self._ids
        keys = [(ids.setdefault(proc, len(ids)), place == holder, place) for place, proc in enumerate(state.procs)]
        order = tuple(place for _, _, place in sorted(keys))
        if order == tuple(range(len(order))):
            return state, order
        if row is not None and holder is not None:
            row = replace(row, lease_holder=PLACES[order.index(holder)])
        return state._replace(row=row, procs=tuple(state.procs[place] for place in order)), order

    def moves(self, state: State) -> Iterator[Successor]:
        """Everything that can happen next."""
        for place, proc in enumerate(state.procs):
            if proc.late is not None:
                after = self._carry_out(state, place, *proc.late) or state
                after = after.with_proc(place, after.procs[place]._replace(late=None))
                yield Move(place, f"'s {_told(proc.late.step)} is carried out after all"), after
            if not proc.gone:
                yield from self._act(state, place, proc)
                if self._may(CRASH, state):
                    yield _fault(place, " crashes", self._crash(state, place, proc))
        yield from self._time(state)
        yield from self._others(state)

    # -- what happens around the refreshes ---------------------------------------------------------

    def _may(self, kind: str, state: State) -> bool:
        return state.faults > 0 and kind in self.scenario.kinds

    def _crash(self, state: State, place: int, proc: Proc) -> State:
        point = _point(proc) if self.scenario.points else ""
        if proc.wire == "sent" and proc.token is not None:
            state = _drift(state, proc.token)
        return state.with_proc(place, Proc(URGENT, Crashed(point), leased=proc.leased, late=proc.late))

    def _time(self, state: State) -> Iterator[Successor]:
        row = state.row
        if row is None:
            return
        if row.is_leased(NOW) and row.lease_holder is not None:
            place = int(row.lease_holder)
            holder = state.procs[place]
            over = state._replace(row=replace(row, lease_expires_at=NOW)).with_proc(
                place, holder._replace(leased=False)
            )
            if holder.gone:
                yield Move(place, "'s lease expires"), over
            elif self._may(FREEZE, state):
                yield _fault(place, f" is frozen ({_told(holder.step)}), and its lease expires", over)
        if row.failure_code is not None and row.retry_at == AHEAD:
            yield Move(None, "the time to retry comes"), state._replace(row=replace(row, retry_at=NOW))

    def _others(self, state: State) -> Iterator[Successor]:
        for token in sorted(set(state.adrift)):
            rest = list(state.adrift)
            rest.remove(token)
            after, answer = self._decide(state._replace(adrift=tuple(rest)), token)
            yield (
                Move(None, f"an abandoned request with token {token} arrives: {_answer(answer)}, heard by nobody"),
                after,
            )
        if state.login is not None:
            row = state.row
            new = Row(state.login, state.generation + 1) if row is None else self.protocol.written(row, state.login)
            after = self._without_leases(_with_row(state, new))._replace(login=None)
            yield Move(None, f"the login's pair {state.login} is written", calm=False), after
        elif state.logins:
            pair = state.issued + 1
            after = state._replace(issued=pair, live=pair, grant=pair, login=pair, logins=state.logins - 1)
            yield Move(None, f"the user logs in: pair {pair}, and the grant before ends", calm=False), after
        if state.row is not None:
            if state.deletions:
                after = self._without_leases(state)._replace(row=None, deletions=state.deletions - 1)
                yield Move(None, "the row is deleted", calm=False), after
            if state.ageings and state.row.tokens >= state.aged:
                after = state._replace(aged=state.row.tokens + 1, ageings=state.ageings - 1)
                yield Move(None, "the row's access token expires", calm=False), after

    @staticmethod
    def _without_leases(state: State) -> State:
        return state._replace(procs=tuple(proc._replace(leased=False) for proc in state.procs))

    def _decide(self, state: State, token: int) -> tuple[State, int | str]:
        """The provider's part: one live refresh token, which works once."""
        if token == state.live:
            pair = state.issued + 1
            return state._replace(issued=pair, live=pair), pair
        if self.scenario.strict and token >= state.grant:
            return state._replace(live=None), "refused"
        return state, "refused"

    # -- what the refreshes do ---------------------------------------------------------------------

    def _view(self, state: State, place: int) -> View | None:
        row = state.row
        if row is None:
            return None
        holder = None
        if row.is_leased(NOW):
            holder = _ME if row.lease_holder == PLACES[place] else row.lease_holder
        failure = None
        if row.failure_code is not None and row.has_failed(NOW):
            failure = Failure(row.failure_code, None if row.retry_at is None else 1.0)
        return View(row.generation, self._validity(state, row.tokens), lease_holder=holder, failure=failure)

    @staticmethod
    def _validity(state: State, pair: int) -> Validity:
        if pair < state.aged:
            return Validity.EXPIRED
        return Validity.DUE if pair == 0 else Validity.FRESH

    def _act(self, state: State, place: int, proc: Proc) -> Iterator[Successor]:
        step = proc.step
        match step:
            case Read() | Wait():
                goal, following = self.protocol.after_read(proc.goal, self._view(state, place))
                if (goal, following) == (proc.goal, step):
                    return  # waits on
                token = None if state.row is None else state.row.tokens
                after = state.with_proc(place, _tidy(proc._replace(goal=goal, token=token), following))
                yield Move(place, f" reads the row: {_told(following)}"), after
            case Reread():
                goal, following = self.protocol.after_reread(proc.goal, step, self._view(state, place))
                if (goal, following) == (proc.goal, step):
                    return
                token = None if state.row is None else state.row.tokens
                after = state.with_proc(place, _tidy(proc._replace(goal=goal, token=token), following))
                yield Move(place, f" reads the row again, pair {proc.hand} in hand: {_told(following)}"), after
            case Call():
                yield from self._call(state, place, proc, step)
            case Claim() | Save() | Settle():
                yield from self._statement(state, place, proc, step)
            case End() | Crashed():
                raise AssertionError(step)

    def _call(self, state: State, place: int, proc: Proc, step: Call) -> Iterator[Successor]:
        token, wire = proc.token, proc.wire
        assert token is not None
        if wire is None:
            sent = state.with_proc(place, proc._replace(wire="sent"))
            yield Move(place, f" sends refresh token {token}", sends=True), sent
            return
        nothing = proc._replace(wire=None)
        unavailable = _tidy(nothing, self.protocol.after_call(step, _UNAVAILABLE))
        if wire == "sent":
            after, answer = self._decide(state, token)
            yield (
                Move(place, f"'s request arrives: {_answer(answer)}"),
                after.with_proc(place, proc._replace(wire=answer)),
            )
            if self._may(OUTAGE, state):
                failing = state.with_proc(place, proc._replace(wire="unavailable"))
                yield _fault(place, "'s request arrives: 503", failing)
            if self._may(LOST_RESPONSE, state):
                alone = _drift(state, token).with_proc(place, unavailable)
                yield _fault(place, " gives up its request, which is still under way", alone)
            return
        failure = {"refused": _INVALID_GRANT, "unavailable": _UNAVAILABLE}.get(str(wire))
        following = self.protocol.after_call(step, failure)
        hand = wire if isinstance(wire, int) else None
        yield (
            Move(place, f" gets the response: {_answer(wire)}"),
            state.with_proc(place, _tidy(nothing._replace(hand=hand), following)),
        )
        if wire != "unavailable" and self._may(LOST_RESPONSE, state):
            yield _fault(place, "'s response is lost", state.with_proc(place, unavailable))

    def _statement(self, state: State, place: int, proc: Proc, step: Claim | Save | Settle) -> Iterator[Successor]:
        def answered(state: State, *, done: bool) -> State:
            proc = state.procs[place]
            following: Step
            match step:
                case Claim():
                    following = self.protocol.after_claim(step, granted=done)
                case Save():
                    following = self.protocol.after_save(step, saved=done)
                case Settle():
                    following = self.protocol.after_settle(step, settled=done)
                    if self.protocol.renames and proc.late is not None and isinstance(proc.late.step, Settle):
                        proc = proc._replace(late=None)  # the row will not hold that name again
            return state.with_proc(place, _tidy(proc, following))

        def silence(state: State) -> Iterator[tuple[str, State]]:
            """What it does when nobody tells it whether the statement was carried out."""
            if isinstance(step, Claim):
                yield "", answered(state, done=False)
                return
            yield "", state  # the same once more
            if isinstance(step, Settle):
                proc = _tidy(state.procs[place], self.protocol.after_unsettled(step))
                yield ", and it gives up", state.with_proc(place, proc)

        what = _told(step)
        after = self._carry_out(state, place, step, proc.hand)
        verdict = "is refused" if after is None else "is carried out"
        yield Move(place, f"'s {what} {verdict}"), answered(after or state, done=after is not None)
        # Whether it would be refused or not.
        silences = [(NOT_DONE, state)] if after is None else [(NOT_DONE, state), (LOST_ANSWER, after)]
        if proc.late is None:
            late = Late(step, proc.hand if isinstance(step, Save) else None)
            silences.append((LATE, state.with_proc(place, proc._replace(late=late))))
        for kind, then in silences:
            if self._may(kind, state):
                for ending, silent in silence(then):
                    if silent != state:
                        yield _fault(place, f"'s {what} {_SILENCES[kind]}{ending}", silent)

    def _carry_out(self, state: State, place: int, step: Claim | Save | Settle, pair: int | None) -> State | None:
        row = state.row
        if row is None:
            return None
        holder = PLACES[place]
        new: Row[int] | None
        match step:
            case Claim():
                new = self.protocol.claimed(row, generation=step.generation, holder=holder, now=NOW, duration=AHEAD)
            case Save():
                new = self.protocol.completed(row, pair, generation=step.generation, holder=holder, now=NOW)
            case Settle(failure=failure):
                told = (failure.code, None if failure.retry_in is None else AHEAD)
                new = self.protocol.released(row, generation=step.generation, holder=holder, failure=told)
        if new is None:
            return None
        proc = state.procs[place]._replace(leased=isinstance(step, Claim))
        return _with_row(state, new).with_proc(place, proc)


def _fault(place: int, what: str, after: State) -> Successor:
    return Move(place, what, calm=False), after._replace(faults=after.faults - 1)


def _with_row(state: State, row: Row[int]) -> State:
    return state._replace(row=row, generation=max(state.generation, row.generation))


def _drift(state: State, token: int) -> State:
    return state._replace(adrift=tuple(sorted((*state.adrift, token))))


def _tidy(proc: Proc, step: Step) -> Proc:
    """With its next step, and without what that has no use for, so that equal states are equal."""
    if isinstance(step, End):
        return Proc(URGENT, step, leased=proc.leased, late=proc.late)
    return proc._replace(
        step=step,
        token=proc.token if isinstance(step, (Claim, Call)) else None,
        hand=proc.hand if isinstance(step, (Save, Reread)) else None,
    )


def _told(step: Step | Crashed) -> str:
    match step:
        case End(outcome, failure):
            kind = "" if failure is None else " for good" if failure.retry_in is None else " for a while"
            return f"ends {outcome.name}{kind}"
        case Settle(generation, failure):
            return f"settle of {generation} as {failure.code}"
        case Claim(generation) | Call(generation) | Save(generation) | Reread(generation):
            return f"{type(step).__name__.lower()} of {generation}"
    return type(step).__name__.lower()


def _answer(answer: int | str | None) -> str:
    return f"pair {answer}" if isinstance(answer, int) else str(answer)


def _point(proc: Proc) -> str:
    """Where a process stands, in the words of docs/refresh.md."""
    match proc.step:
        case Read() | Wait() | Claim():
            return "before the claim"
        case Call():
            on_the_wire = {None: "after the claim", "sent": "request under way"}
            return on_the_wire.get(None if proc.wire is None else str(proc.wire), "response under way")
        case Save():
            return "before the write"
        case Settle():
            return "before the failure is left"
    return "later"
