"""A model of the refreshes of one row. It yields every possible next move, with the functions that the engine runs.

The row and the statements come from ``tokenstore.leases``, the steps from ``tokenstore.refresh.steps``. The model adds
the environment: processes that crash or freeze, lost statements and responses, a provider that rotates refresh tokens,
users who log in again. `refresh_model_invariants` has the invariants, and `refresh_model_search` visits all states.

Time has only two values: now is 0 in every state, and a time in the future is 1. When that time comes, it is set to 0.
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
    Insert,
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
FREEZE = "lease expires while its holder is still running"
OUTAGE = "provider fails without a decision"
LOST_RESPONSE = "response is lost"
LOST_ANSWER = "statement is executed, but its result is lost"
NOT_DONE = "statement is not executed"
LATE = "statement is executed after its sender has given up waiting"
FAULTS = frozenset({CRASH, FREEZE, OUTAGE, LOST_RESPONSE, LOST_ANSWER, NOT_DONE, LATE})
_SILENCES = {
    LOST_ANSWER: "is executed, but the result is lost",
    NOT_DONE: "is not executed, and there is no result",
    LATE: "is delayed, and there is no result",
}
# After these faults a pair of tokens may be lost for good; no protocol can prevent that.
LOSSES = frozenset({CRASH, LOST_RESPONSE})
_INVALID_GRANT = Failure("invalid_grant")
_UNAVAILABLE = Failure("temporarily_unavailable", 1.0)
# In the steps, each process calls itself by this name. In the row, the lease holder is the process's index.
_ME = "me"
PLACES = ("0", "1", "2", "3")
URGENT = Goal(_ME)
BACKGROUND = Goal(_ME, urgent=False)
ISSUING = Goal(_ME, issues=True)
EMPTY = -1  # the pair of an empty row


def _after_unsettled(_: Settle) -> Step:
    """End with the database's error if the failure could not be written to the row in any attempt.

    The refresh must not end with "log in again": the row may contain a newer refresh token by now.
    """
    return End(Outcome.FAILED)


def _inserted(row: Row[int] | None, generation: int) -> Row[int] | None:
    """Insert an empty row; None (refused): there is a row."""
    return Row(EMPTY, generation) if row is None else None


# `...`, because pyright cannot infer the row's type in a generic function.
Statement = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Protocol:
    """The functions under test: the real ones, unless a test replaces one by a broken one.

    Attributes:
        after_unsettled: The step after a settling (the statement that writes a failure to the row) whose result is
            unknown.
        renames: Whether a refresh whose settling was refused continues with a new lease holder's name.
        inserted: Inserts an empty row.
        empty_is_valid: Whether an empty row counts as one with a valid access token.
    """

    written: Callable[[Row[int], int], Row[int]] = leases.written
    claimed: Statement = leases.claimed
    completed: Statement = leases.completed
    released: Statement = leases.released
    after_read: Callable[[Goal, View | None], tuple[Goal, Step]] = steps.after_read
    after_insert: Callable[[Insert], Step] = steps.after_insert
    after_claim: Callable[..., Step] = steps.after_claim
    after_call: Callable[[Call, Failure | None], Step] = steps.after_call
    after_save: Callable[..., Step] = steps.after_save
    after_reread: Callable[[Goal, Reread, View | None], tuple[Goal, Step]] = steps.after_reread
    after_settle: Callable[..., Step] = steps.after_settle
    after_unsettled: Callable[[Settle], Step] = _after_unsettled
    renames: bool = True
    inserted: Callable[[Row[int] | None, int], Row[int] | None] = _inserted
    empty_is_valid: bool = False


@dataclass(frozen=True, slots=True)
class Scenario:
    """The events that may happen, and how often.

    Attributes:
        strict: Whether the provider revokes the grant when it gets a used refresh token; otherwise it only refuses it.
        goals: The goals of the processes, one for each.
        due: Whether the first access token is still valid, but within the refresh margin; otherwise it has expired.
        faults: The maximum number of faults of all kinds.
        kinds: The kinds of fault that can happen.
        logins: How often the user logs in again, which ends the earlier grant.
        deletions: How often the row is deleted.
        ageings: How often the row's access token expires.
        issues: Whether the provider issues tokens without a refresh token. Then there is no row at first.
        points: Whether to record where a process crashed, for :func:`crash_points`.
    """

    strict: bool
    goals: tuple[Goal, ...] = (URGENT, URGENT, URGENT)
    due: bool = False
    faults: int = 2
    kinds: frozenset[str] = FAULTS
    logins: int = 0
    deletions: int = 0
    ageings: int = 0
    issues: bool = False
    points: bool = False


@dataclass(frozen=True, slots=True)
class Crashed:
    """The step of a process that has crashed."""

    point: str = ""


class Late(NamedTuple):
    """A statement that the server has not executed yet, and for which its sender no longer waits."""

    step: Insert | Claim | Save | Settle
    pair: int | None


class Proc(NamedTuple):
    """A process with one refresh.

    Attributes:
        goal: The goal of the refresh; its ``holder`` is always "me".
        step: The next step.
        token: The refresh token from the last read, if the step needs it.
        hand: The pair of tokens that the provider issued to this process and that is not stored yet.
        wire: The state of the provider call: "sent", then its response: a pair, "refused" or "unavailable".
        leased: Whether this process was granted a lease that has not ended; used only by the invariants.
        late: A statement of this process that the server has not executed yet.
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
        """Whether the process has ended or crashed."""
        return isinstance(self.step, (End, Crashed))


class State(NamedTuple):
    """The state of the model. Pairs of tokens are numbered as issued; a refresh token has its pair's number.

    Attributes:
        row: The row; None: it was deleted.
        procs: The processes.
        issued: The last pair that the provider issued.
        live: The refresh token that the provider accepts; None: none.
        grant: The first pair of the grant.
        adrift: Refresh tokens of requests that may still arrive, and whose senders no longer wait for a response.
        aged: Access tokens of pairs with lower numbers have expired.
        login: A pair from a login that is not written yet.
        generation: The highest generation so far, also of deleted rows.
        faults: The number of faults that may still happen.
        logins: The number of logins that may still happen.
        deletions: The number of deletions that may still happen.
        ageings: How often the access token may still expire.
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
    """One move, which is one line of a trace.

    Attributes:
        who: The index of the process that moves, or None.
        what: What happened, as text.
        calm: Whether the move happens eventually without faults and users; otherwise it is a fault or a user's action.
        sends: Whether the move sends the process's refresh token to the provider.
    """

    who: int | None
    what: str
    calm: bool = True
    sends: bool = False


Successor = tuple[Move, State]


class Model:
    """Yields the moves of one scenario."""

    def __init__(self, scenario: Scenario, protocol: Protocol | None = None) -> None:
        self.scenario = scenario
        self.protocol = protocol or Protocol()
        self._ids: dict[Proc, int] = {}

    def start(self) -> State:
        scenario = self.scenario
        return State(
            row=None if scenario.issues else Row(0, 1),
            procs=tuple(Proc(goal, Read()) for goal in scenario.goals),
            issued=0,
            live=0,
            grant=0,
            adrift=(),
            aged=0 if scenario.due else 1,
            login=None,
            generation=0 if scenario.issues else 1,
            faults=scenario.faults,
            logins=scenario.logins,
            deletions=scenario.deletions,
            ageings=scenario.ageings,
        )

    def canonical(self, state: State) -> tuple[State, tuple[int, ...]]:
        """Sort the processes, which are interchangeable, so that equivalent states are equal; return also the order."""
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
        """Yield each possible next move with the state after it."""
        for place, proc in enumerate(state.procs):
            if proc.late is not None:
                after = self._carry_out(state, place, *proc.late) or state
                after = after.with_proc(place, after.procs[place]._replace(late=None))
                yield Move(place, f"'s delayed {_described(proc.late.step)} is executed"), after
            if not proc.gone:
                yield from self._act(state, place, proc)
                if self._may(CRASH, state):
                    yield _fault(place, " crashes", self._crash(state, place, proc))
        yield from self._time(state)
        yield from self._others(state)

    # -- moves of the environment ------------------------------------------------------------------

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
                yield _fault(place, f" is frozen ({_described(holder.step)}), and its lease expires", over)
        if row.failure_code is not None and row.retry_at == AHEAD:
            yield Move(None, "the time to retry comes"), state._replace(row=replace(row, retry_at=NOW))

    def _others(self, state: State) -> Iterator[Successor]:
        for token in sorted(set(state.adrift)):
            rest = list(state.adrift)
            rest.remove(token)
            after, answer = self._decide(state._replace(adrift=tuple(rest)), token)
            yield (
                Move(None, f"an abandoned request with token {token} arrives: {_answer(answer)}, and is not read"),
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
            if state.ageings and state.row.tokens >= max(state.aged, 0):
                after = state._replace(aged=state.row.tokens + 1, ageings=state.ageings - 1)
                yield Move(None, "the row's access token expires", calm=False), after

    @staticmethod
    def _without_leases(state: State) -> State:
        return state._replace(procs=tuple(proc._replace(leased=False) for proc in state.procs))

    def _decide(self, state: State, token: int) -> tuple[State, int | str]:
        """Handle a request as the provider does: one refresh token is live, and works once; or none is needed."""
        if self.scenario.issues or token == state.live:
            pair = state.issued + 1
            return state._replace(issued=pair, live=pair), pair
        if self.scenario.strict and token >= state.grant:
            return state._replace(live=None), "refused"
        return state, "refused"

    # -- moves of the processes --------------------------------------------------------------------

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

    def _validity(self, state: State, pair: int) -> Validity:
        if pair == EMPTY:
            return Validity.FRESH if self.protocol.empty_is_valid else Validity.EXPIRED
        if pair < state.aged:
            return Validity.EXPIRED
        return Validity.DUE if pair == 0 else Validity.FRESH

    def _act(self, state: State, place: int, proc: Proc) -> Iterator[Successor]:
        step = proc.step
        match step:
            case Read() | Wait():
                goal, following = self.protocol.after_read(proc.goal, self._view(state, place))
                if (goal, following) == (proc.goal, step):
                    return  # nothing has changed: the process keeps waiting
                token = None if state.row is None else state.row.tokens
                after = state.with_proc(place, _tidy(proc._replace(goal=goal, token=token), following))
                yield Move(place, f" reads the row: {_described(following)}"), after
            case Reread():
                goal, following = self.protocol.after_reread(proc.goal, step, self._view(state, place))
                if (goal, following) == (proc.goal, step):
                    return
                token = None if state.row is None else state.row.tokens
                after = state.with_proc(place, _tidy(proc._replace(goal=goal, token=token), following))
                yield Move(place, f" reads the row again, pair {proc.hand} in hand: {_described(following)}"), after
            case Call():
                yield from self._call(state, place, proc, step)
            case Insert() | Claim() | Save() | Settle():
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

    def _statement(
        self, state: State, place: int, proc: Proc, step: Insert | Claim | Save | Settle
    ) -> Iterator[Successor]:
        def answered(state: State, *, done: bool) -> State:
            proc = state.procs[place]
            following: Step
            match step:
                case Insert():
                    following = self.protocol.after_insert(step)
                    if state.row is not None:
                        # Not in the engine, which reads the row; a protocol that does not read it needs to know it.
                        proc = proc._replace(token=state.row.tokens)
                case Claim():
                    following = self.protocol.after_claim(step, granted=done)
                case Save():
                    following = self.protocol.after_save(step, saved=done)
                case Settle():
                    following = self.protocol.after_settle(step, settled=done)
                    if self.protocol.renames and proc.late is not None and isinstance(proc.late.step, Settle):
                        proc = proc._replace(late=None)  # with a new name, the delayed settling can no longer succeed
            return state.with_proc(place, _tidy(proc, following))

        def silence(state: State) -> Iterator[tuple[str, State]]:
            """Yield what the process may do if it does not learn whether the statement was executed."""
            if isinstance(step, Insert | Claim):
                yield "", answered(state, done=False)
                return
            yield "", state  # the process sends the statement again
            if isinstance(step, Settle):
                proc = _tidy(state.procs[place], self.protocol.after_unsettled(step))
                yield ", and it gives up", state.with_proc(place, proc)

        what = _described(step)
        after = self._carry_out(state, place, step, proc.hand)
        verdict = "is refused" if after is None else "is executed"
        yield Move(place, f"'s {what} {verdict}"), answered(after or state, done=after is not None)
        # A statement can get lost whether the row would refuse it or not.
        silences = [(NOT_DONE, state)] if after is None else [(NOT_DONE, state), (LOST_ANSWER, after)]
        if proc.late is None:
            late = Late(step, proc.hand if isinstance(step, Save) else None)
            silences.append((LATE, state.with_proc(place, proc._replace(late=late))))
        for kind, then in silences:
            if self._may(kind, state):
                for ending, silent in silence(then):
                    if silent != state:
                        yield _fault(place, f"'s {what} {_SILENCES[kind]}{ending}", silent)

    def _carry_out(
        self, state: State, place: int, step: Insert | Claim | Save | Settle, pair: int | None
    ) -> State | None:
        row = state.row
        new: Row[int] | None
        if isinstance(step, Insert):
            new = self.protocol.inserted(row, state.generation + 1)
            return None if new is None else self._without_leases(_with_row(state, new))
        if row is None:
            return None
        holder = PLACES[place]
        match step:
            case Claim():
                new = self.protocol.claimed(row, generation=step.generation, holder=holder, now=NOW, duration=AHEAD)
            case Save():
                new = self.protocol.completed(row, pair, generation=step.generation, holder=holder, now=NOW)
            case Settle(failure=failure):
                told = (failure.code, None if failure.retry_in is None else AHEAD)
                new = self.protocol.released(row, generation=step.generation, holder=holder, now=NOW, failure=told)
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
    """Set the next step, and clear the fields that it does not use, so that equivalent states are equal."""
    if isinstance(step, End):
        return Proc(URGENT, step, leased=proc.leased, late=proc.late)
    return proc._replace(
        step=step,
        token=proc.token if isinstance(step, (Claim, Call)) else None,
        hand=proc.hand if isinstance(step, (Save, Reread)) else None,
    )


def _described(step: Step | Crashed) -> str:
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
    """Return where a process is, in the words of docs/refresh.md."""
    match proc.step:
        case Read() | Wait() | Insert() | Claim():
            return "before the claim"
        case Call():
            on_the_wire = {None: "after the claim", "sent": "request under way"}
            return on_the_wire.get(None if proc.wire is None else str(proc.wire), "response under way")
        case Save():
            return "before the write"
        case Settle():
            return "before the failure is left"
    return "later"
