"""A linearizability checker for recorded histories of a store.

Tasks, threads or processes record each call: when it began and when it ended, on one shared clock, and its result. For
each key, :func:`check_history` searches for an order of the calls such that each one takes effect between its beginning
and its end, and a single row that answers one call after the other would have given the same results. If there is no
such order, the store has a race, and :class:`NotLinearizable` names it and shows the calls::

    lost update of 'user-1': no order of these operations explains what they returned
         0..1   setup   put 0
         2..3   setup   get                                        -> 0 in generation 7
         4..7   a       update of 0 in generation 7 to 1           -> done
      >  5..8   b       update of 0 in generation 7 to 2           -> done
    before the marked operation returned, the row can only have been: 1 in generation 8

The search is Wing and Gong's ("Testing and verifying concurrent objects", 1993), with the set of visited states that
Lowe added ("Testing for linearizability", 2017). Linearizability is local, so each key is checked separately; that
keeps the search small.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

__all__ = ["Kind", "Mixture", "NotLinearizable", "Operation", "Row", "Version", "check_history"]

Kind = Literal[
    "lost update",  # a locking read returned a version that was already replaced, or not yet written
    "stale read",  # a plain read did
    "mixed read",
    "wrong generation",  # a write did not add exactly one to the generation, or a generation was used twice
    "wrong delete",  # its result did not say whether there was a row
    "two live holders",
    "wrong grant",  # a claim was granted for an old generation, or although a failure forbids claims
    "stale completion",  # it replaced newer tokens, or another holder had a live lease
    "stale release",  # it ended a lease that was not the caller's
    "wrong refusal",  # a claim, completion or release was refused although its conditions were met
]

_MOST_LINES = 60


class Version(NamedTuple):
    """The version of a row that a read returned.

    Attributes:
        value: The value that was read; a :class:`Mixture` if its parts come from several writes.
        generation: The row's generation; None: the caller did not look at it.
    """

    value: Hashable
    generation: int | None = None

    def __str__(self) -> str:
        return str(self.value) if self.generation is None else f"{self.value} in generation {self.generation}"


class Mixture(NamedTuple):
    """A value whose parts come from different writes."""

    parts: tuple[Hashable, ...]

    def __str__(self) -> str:
        return f"a mixture of {', '.join(map(str, self.parts))}"


class Row(NamedTuple):
    """The row of the sequential model.

    Attributes:
        value: The value that was written last.
        generation: The row's generation; None: not observed yet, so that any generation fits.
        holder: The holder of the lease, or of the last lease.
        live: Whether the lease still excludes other holders; None: it may have expired.
        failed: Whether a failure forbids further claims.
    """

    value: Hashable
    generation: int | None = None
    holder: str | None = None
    live: bool | None = False
    failed: bool = False

    def __str__(self) -> str:
        lease = {True: f", leased to {self.holder}", None: f", once leased to {self.holder}", False: ""}[self.live]
        return f"{Version(self.value, self.generation)}{lease}{', failed' * self.failed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One call and its result.

    Attributes:
        name: The operation. ``update`` is a whole transaction: a locking read, then a write or delete. If the
            transaction found no row, record a ``get`` and a ``put`` instead, because a missing row cannot be locked.
        key: The row's key.
        by: The caller's name, shown in the report.
        invoked: When the call began, on the history's clock.
        returned: When the call returned a result. None: it was cancelled or raised an error, so that it may or may not
            have taken effect. Leave out reads without a result.
        ended: For a call without a result: when its caller got the cancellation or the error. The call took effect
            before that time or never. None: it may take effect at any later time.
        value: The value that ``put``, ``update`` or ``complete`` wrote, different for each write; None: ``update``
            deleted the row.
        seen: The version that ``get`` or ``update`` read; None: there was no row.
        generation: The generation that ``claim``, ``complete`` or ``release`` compared with the row's.
        holder: The holder that claimed, completed or released.
        ok: The result of ``delete``, ``claim``, ``complete`` or ``release``.
        lasting: For ``claim``: whether the lease outlives the history; otherwise it may expire at any moment.
        failed: For ``release``: whether it stored a failure that forbids claims of this generation.
    """

    name: Literal["get", "put", "delete", "update", "claim", "complete", "release"]
    key: Hashable
    by: str = ""
    invoked: int
    returned: int | None = None
    ended: int | None = None
    value: Hashable = None
    seen: Version | None = None
    generation: int | None = None
    holder: str | None = None
    ok: bool | None = None
    lasting: bool = True
    failed: bool = False

    def __str__(self) -> str:
        what = {
            "put": f" {self.value}",
            "update": f" of {self.seen} {'away' if self.value is None else f'to {self.value}'}",
            "claim": f" for {self.holder} on generation {self.generation}{'' if self.lasting else ', brief'}",
            "complete": f" with {self.value} by {self.holder} on generation {self.generation}",
            "release": f" by {self.holder} on generation {self.generation}{', failed' * self.failed}",
        }.get(self.name, "")
        if self.returned is None:
            result = "outcome unknown"
        elif self.name == "get":
            result = "no row" if self.seen is None else str(self.seen)
        else:
            result = "done" if self.ok is None else str(self.ok)
        return f"{self.name + what:<48} -> {result}"

    @property
    def is_pure(self) -> bool:
        """Whether the call changes no row. Placing such a call as soon as it fits rules out no order."""
        return self.name == "get" or self.ok is False


class NotLinearizable(AssertionError):
    """No order of the operations explains their results.

    Attributes:
        kind: The kind of fault, derived from the operation that fits into no order.
        operations: A part of the history that suffices to show the fault.
    """

    def __init__(self, message: str, kind: Kind, operations: Sequence[Operation]) -> None:
        super().__init__(message)
        self.kind = kind
        self.operations = operations

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.kind, self.operations), vars(self)


def check_history(operations: Iterable[Operation]) -> None:
    """Check that a history is linearizable, each key starting without a row.

    Args:
        operations: The history, in any order. Each write to a key must write a different value.

    Raises:
        NotLinearizable: The history is not linearizable; the message shows a part of it that suffices to see this.
        ValueError: Two writes to one key wrote the same value.
    """
    by_key: dict[Hashable, list[Operation]] = defaultdict(list)
    for operation in operations:
        by_key[operation.key].append(operation)
    for key, history in by_key.items():
        values = [operation.value for operation in history if operation.value is not None]
        if len(values) != len(set(values)):
            raise ValueError(f"two writes to {key!r} wrote the same value; each write needs a different one")
        _check_generations(history)
        if not _final_rows(history):
            raise _explain(history)


def _next(row: Row | None, operation: Operation) -> list[Row | None]:
    """Return the states that the row can have after this operation; none if the operation's result is impossible."""
    succeeds = operation.returned is None or operation.ok
    match operation.name:
        case "get":
            return _read(row, operation.seen)
        case "put":
            return [_written(row, operation.value)]
        case "delete":
            return [None] if operation.returned is None or operation.ok == (row is not None) else []
        case "update":
            return [
                None if operation.value is None else _written(found, operation.value)
                for found in _read(row, operation.seen)
            ]
    # A generation that no read has returned yet may or may not be the one that this call compared with.
    same = row is not None and row.generation in {None, operation.generation}
    certain = row is not None and row.generation == operation.generation
    if operation.name == "claim":
        if not succeeds:
            return [] if row is not None and certain and row.live is False and not row.failed else [row]
        if row is None or not same or row.live or row.failed:
            return []
        live = True if operation.lasting else None
        return [row._replace(generation=operation.generation, holder=operation.holder, live=live)]
    owned = row is not None and row.holder == operation.holder
    if operation.name == "complete":
        # If another holder's lease may have expired, both results are possible.
        if not succeeds:
            return [] if row is not None and certain and (owned or row.live is False) else [row]
        if row is None or not same or (row.live and not owned):
            return []
        return [_written(row._replace(generation=operation.generation), operation.value)]
    if not succeeds:
        return [] if owned and certain else [row]
    if row is None or not same or not owned:
        return []
    row = row._replace(generation=operation.generation)
    return [row._replace(holder=None, live=False, failed=operation.failed)]


def _read(row: Row | None, seen: Version | None) -> list[Row | None]:
    if row is None or seen is None:
        return [None] if row is None and seen is None else []
    if row.value != seen.value or (None not in (row.generation, seen.generation) and row.generation != seen.generation):
        return []
    return [row._replace(generation=row.generation if seen.generation is None else seen.generation)]


def _written(row: Row | None, value: Hashable) -> Row:
    return Row(value, None if row is None or row.generation is None else row.generation + 1)


def _final_rows(history: Sequence[Operation], *, every: bool = False) -> set[Row | None]:
    """Return the last row of one order that explains the history, or of every such order; empty if there is none."""
    known = sorted((op for op in history if op.returned is not None), key=lambda op: op.invoked)
    unknown = [op for op in history if op.returned is None]
    # For each call without a result: the calls that began after its end. If it took effect, it did so before them.
    later_known = [_indexes_after(op, known) for op in unknown]
    later_unknown = [_indexes_after(op, unknown) for op in unknown]
    # A state of the search: the operations placed so far (one bit each) and the row that they lead to.
    stack: list[tuple[int, int, Row | None]] = [(0, 0, None)]
    visited = set(stack)
    found: set[Row | None] = set()
    while stack:
        placed, effective, row = stack.pop()
        first = (~placed & (placed + 1)).bit_length() - 1
        # The next operation must have begun before any other unplaced operation ended.
        window, deadline = [], None
        for index in range(first, len(known)):
            if deadline is not None and known[index].invoked > deadline:
                break
            if not placed >> index & 1:
                window.append(index)
                ended = known[index].returned
                deadline = ended if deadline is None or ended is None else min(deadline, ended)
        if not window:
            found.add(row)
            if not every:
                break
        # Placing one of these operations excludes an earlier call without a result from taking effect.
        decisive = 0
        for index, later in enumerate(later_known):
            if not effective >> index & 1 and not placed & later:
                decisive |= later
        following = [
            (placed | 1 << index, effective, after)
            for index in window
            if known[index].is_pure and not decisive >> index & 1
            for after in _next(row, known[index])
        ][:1]
        if not following:
            following = [
                (placed, effective | 1 << index, after)
                for index, op in enumerate(unknown)
                if not effective >> index & 1
                and (deadline is None or op.invoked <= deadline)
                and not placed & later_known[index]
                and not effective & later_unknown[index]
                for after in _next(row, op)
            ]
            following += [
                (placed | 1 << index, effective, after)
                for index in reversed(window)
                for after in _next(row, known[index])
            ]
        for state in following:
            if state not in visited:
                visited.add(state)
                stack.append(state)
    return found


def _indexes_after(ended: Operation, operations: Sequence[Operation]) -> int:
    """Return the operations that began after this one had ended, one bit each."""
    if ended.ended is None:
        return 0
    return sum(1 << index for index, op in enumerate(operations) if op.invoked > ended.ended)


def _check_generations(history: Sequence[Operation]) -> None:
    """Check that no generation was used twice, even after a delete.

    Otherwise a compare-and-set with a generation of a deleted row would succeed on the new row.
    """
    owner: dict[int, Operation] = {}
    for operation in history:
        if operation.seen is None or operation.seen.generation is None:
            continue
        earlier = owner.setdefault(operation.seen.generation, operation)
        if earlier.seen is not None and earlier.seen.value != operation.seen.value:
            mixed = isinstance(operation.seen.value, Mixture) or isinstance(earlier.seen.value, Mixture)
            kind: Kind = "mixed read" if mixed else "wrong generation"
            raise _error(kind, [earlier, operation], operation, "two versions have the same generation")


def _explain(history: Sequence[Operation]) -> NotLinearizable:
    """Find the operation whose result made the history impossible, and leave out operations not needed to see it."""
    ends = sorted(op.returned for op in history if op.returned is not None)
    low, high = 0, len(ends) - 1
    # Bisection works because every prefix of a possible history is possible.
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if _final_rows(_until(history, ends[middle])) else (low, middle)
    part = _until(history, ends[low])
    culprit = next(op for op in part if op.returned == ends[low])
    for operation in [op for op in part if op.is_pure and op is not culprit]:
        without = [op for op in part if op is not operation]
        if not _final_rows(without):
            part = without
    others = [op for op in part if op is not culprit]
    before = _final_rows(others if culprit.is_pure else [*others, replace(culprit, returned=None)], every=True)
    rows = sorted("no row" if row is None else str(row) for row in before)
    remark = f"before the marked operation returned, the row can only have been: {'; or '.join(rows)}"
    # `part` has no results of calls that returned later; show them with their results.
    whole = {replace(op, returned=None, ok=None): op for op in history}
    shown = [whole[replace(op, returned=None, ok=None)] for op in part]
    return _error(_kind(culprit, part, before), shown, culprit, remark)


def _until(history: Sequence[Operation], end: int) -> list[Operation]:
    """Cut the history at that time; a call that had not returned by then may or may not have taken effect."""
    known = [op for op in history if op.returned is not None and op.returned <= end]
    late = [op for op in history if op.invoked <= end and (op.returned is None or op.returned > end)]
    return known + [replace(op, returned=None, ok=None) for op in late if not op.is_pure]


def _kind(culprit: Operation, part: Sequence[Operation], before: Iterable[Row | None]) -> Kind:
    if culprit.name in {"get", "update"}:
        if culprit.name == "get":
            if _possible_if_blind("update", part):
                return "lost update"
            if _possible_if_blind("complete", part):
                return "stale completion"
        if culprit.seen is not None:
            if isinstance(culprit.seen.value, Mixture):
                return "mixed read"
            unnumbered = replace(culprit, seen=culprit.seen._replace(generation=None))
            if _final_rows([unnumbered if op is culprit else op for op in part]):
                return "wrong generation"
        return "stale read" if culprit.name == "get" else "lost update"
    if culprit.name == "delete":
        return "wrong delete"
    if not culprit.ok:
        return "wrong refusal"
    if culprit.name == "claim":
        return "two live holders" if any(row is not None and row.live for row in before) else "wrong grant"
    return "stale completion" if culprit.name == "complete" else "stale release"


def _possible_if_blind(name: str, part: Sequence[Operation]) -> bool:
    """Whether the history would be possible if the writes of this name had been unconditional puts."""
    writes = [replace(op, name="put") if op.name == name and op.value is not None else op for op in part]
    return bool(_final_rows(writes))


def _error(kind: Kind, part: Iterable[Operation], culprit: Operation, remark: str) -> NotLinearizable:
    operations = sorted(part, key=lambda op: op.invoked)
    times = sorted({time for op in operations for time in (op.invoked, op.returned) if time is not None})
    rank = {time: number for number, time in enumerate(times)}
    width = max(len(op.by) for op in operations)
    lines = []
    for op in operations:
        span = f"{rank[op.invoked]}..{'' if op.returned is None else rank[op.returned]}"
        lines.append(f"  {'>' if op is culprit else ' '} {span:>8}   {op.by:{width}}   {op}")
    if len(lines) > _MOST_LINES:
        lines = [f"  … {len(lines) - _MOST_LINES} earlier operations", *lines[-_MOST_LINES:]]
    title = f"{kind} of {culprit.key!r}: no order of these operations explains their results"
    return NotLinearizable("\n".join([title, *lines, remark]), kind, operations)
