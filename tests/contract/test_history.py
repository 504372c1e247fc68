"""The linearizability checker against histories whose verdict is known."""

from __future__ import annotations

import random
from typing import Any, get_args, get_type_hints

import pytest

from tokenstore.testing.history import Kind, Mixture, NotLinearizable, Operation, Row, Version, check_history

G = 7  # the first generation


def op(name: Any, invoked: int, returned: int | None, *, key: str = "k", **fields: Any) -> Operation:
    return Operation(name=name, key=key, by="t", invoked=invoked, returned=returned, **fields)


def put(invoked: int, returned: int | None, value: int) -> Operation:
    return op("put", invoked, returned, value=value)


def get(invoked: int, returned: int, value: object = None, generation: int | None = None) -> Operation:
    return op("get", invoked, returned, seen=None if value is None else Version(value, generation))


def update(invoked: int, returned: int | None, old: int, new: int | None) -> Operation:
    return op("update", invoked, returned, seen=Version(old), value=new)


def lease(name: str, invoked: int, returned: int | None, holder: str, ok: bool | None, **fields: Any) -> Operation:
    return op(name, invoked, returned, holder=holder, ok=ok, **{"generation": G, **fields})


FIRST = [put(0, 1, 0), get(2, 3, 0, G)]
A_CLAIMS = lease("claim", 4, 5, "a", True)
A_CLAIMS_BRIEFLY = lease("claim", 4, 5, "a", True, lasting=False)
B_TAKES_OVER = lease("claim", 6, 7, "b", True)

POSSIBLE: dict[str, list[Operation]] = {
    "nothing": [],
    "a read may come before or after a concurrent write": [put(0, 1, 0), put(2, 9, 1), get(3, 4, 0), get(5, 6, 1)],
    "updates that follow each other": [put(0, 1, 0), update(2, 8, 0, 1), update(3, 9, 1, 2), get(10, 11, 2)],
    "concurrent updates whose order only the reads tell": [put(0, 1, 0), update(2, 9, 1, 2), update(3, 8, 0, 1)],
    "a cancelled write that happened": [put(0, 1, 0), put(2, None, 1), get(8, 9, 1)],
    "a cancelled write that never happened": [put(0, 1, 0), put(2, None, 1), get(8, 9, 0)],
    "a cancelled write that happened later than a read": [
        *FIRST, put(4, None, 1), get(5, 6, 0, G), get(8, 9, 1, G + 1)
    ],
    "a cancelled write that happened before its caller was told": [
        *FIRST, op("put", 4, None, value=1, ended=9), get(5, 6, 0, G), get(7, 8, 1, G + 1), get(10, 11, 1)
    ],
    "a cancelled delete that a refused release does not tell from none": [
        *FIRST, A_CLAIMS, lease("release", 6, 7, "a", True), op("delete", 8, None, ended=9),
        lease("release", 10, 11, "a", False), op("delete", 12, 13, ok=False),
    ],
    "two cancelled writes, one after the other": [
        put(0, 1, 0), op("put", 2, None, value=1, ended=3), op("put", 4, None, value=2, ended=5), get(6, 7, 1)
    ],
    "a cancelled claim that holds": [*FIRST, lease("claim", 4, None, "a", None), lease("claim", 6, 7, "b", False)],
    "a deleted row starts with another generation": [
        *FIRST, op("delete", 4, 5, ok=True), put(6, 7, 1), get(8, 9, 1, 90)
    ],
    "an update that deletes": [put(0, 1, 0), update(2, 3, 0, None), get(4, 5), op("delete", 6, 7, ok=False)],
    "keys do not touch each other": [put(0, 1, 0), op("get", 2, 3, key="other", seen=None)],
    "a claim is refused while another is live": [*FIRST, A_CLAIMS, lease("claim", 6, 7, "b", False)],
    "a brief lease may be live or not": [
        *FIRST, A_CLAIMS_BRIEFLY, lease("claim", 6, 7, "b", False), lease("claim", 8, 9, "c", True)
    ],
    "the loser of a take-over ends nothing": [
        *FIRST, A_CLAIMS_BRIEFLY, B_TAKES_OVER, lease("release", 8, 9, "a", False),
        lease("complete", 10, 11, "a", False, value=1), lease("complete", 12, 13, "b", True, value=2),
        get(14, 15, 2, G + 1),
    ],
    "an expired holder nobody replaced completes": [
        *FIRST, A_CLAIMS_BRIEFLY, lease("complete", 6, 7, "a", True, value=1)
    ],
    "the loser of a take-over completes once the winner has given up": [
        *FIRST, A_CLAIMS_BRIEFLY, B_TAKES_OVER, lease("release", 8, 9, "b", True, failed=True),
        lease("complete", 10, 11, "a", True, value=1), get(12, 13, 1, G + 1),
        lease("claim", 14, 15, "c", True, generation=G + 1),
    ],
    "the winner's lease may have expired, or not, when the loser completes": [
        *FIRST, A_CLAIMS_BRIEFLY, lease("claim", 6, 7, "b", True, lasting=False),
        lease("complete", 8, 9, "a", False, value=1), lease("complete", 10, 11, "a", True, value=2),
        lease("complete", 12, 13, "b", False, value=3),
    ],
    "a completion without any lease": [
        *FIRST, A_CLAIMS, lease("release", 6, 7, "a", True), lease("complete", 8, 9, "a", True, value=1)],
    "a write ends a lease": [*FIRST, A_CLAIMS, put(6, 7, 1), lease("release", 8, 9, "a", False),
                             lease("claim", 10, 11, "b", True, generation=G + 1)],
    "a failure forbids claims until the next write": [
        *FIRST, A_CLAIMS, lease("release", 6, 7, "a", True, failed=True), lease("claim", 8, 9, "b", False),
        put(10, 11, 1), lease("claim", 12, 13, "b", True, generation=G + 1),
    ],
}  # fmt: skip

IMPOSSIBLE: dict[str, tuple[str, list[Operation]]] = {
    "two updates of one version": ("lost update", [put(0, 1, 0), update(2, 8, 0, 1), update(3, 9, 0, 2)]),
    "an update of a version overwritten before it began": (
        "lost update", [put(0, 1, 0), put(2, 3, 1), update(4, 5, 0, 2)]),
    "an old value after a newer one was read": ("stale read", [put(0, 1, 0), put(2, 9, 1), get(3, 4, 1), get(5, 6, 0)]),
    "an old value after the write returned": ("stale read", [put(0, 1, 0), put(2, 3, 1), get(4, 5, 0)]),
    "a value before its write began": ("stale read", [put(0, 1, 0), get(2, 3, 1), put(4, 5, 1)]),
    "a row after it was deleted": ("stale read", [put(0, 1, 0), op("delete", 2, 3, ok=True), get(4, 5, 0)]),
    "a rolled back value": ("stale read", [put(0, 1, 0), get(2, 3, 5)]),
    "a cancelled write that comes and goes": (
        "stale read", [put(0, 1, 0), put(2, None, 1), get(3, 4, 1), get(5, 6, 0)]),
    "a cancelled write that happens after its caller was told": (
        "stale read", [put(0, 1, 0), op("put", 2, None, value=1, ended=3), get(4, 5, 0), get(6, 7, 1)]),
    "a cancelled write over a later one": (
        "stale read", [put(0, 1, 0), op("put", 2, None, value=1, ended=3), put(4, 5, 2), get(6, 7, 1)]),
    "a cancelled write over a later one that was cancelled too": (
        "stale read", [put(0, 1, 0), op("put", 2, None, value=1, ended=3), op("put", 4, None, value=2, ended=5),
                       get(6, 7, 2), get(8, 9, 1)]),
    "parts of two writes": ("mixed read", [put(0, 1, 0), put(2, 9, 1), get(3, 4, Mixture((0, 1, 1)))]),
    "a write that skips a generation": ("wrong generation", [*FIRST, put(4, 5, 1), get(6, 7, 1, G + 2)]),
    "two writes that share a generation": (
        "wrong generation", [*FIRST, put(4, 8, 1), put(5, 9, 2), get(10, 11, 2, G + 1)]),
    "a generation that comes back after a delete": (
        "wrong generation", [*FIRST, op("delete", 4, 5, ok=True), put(6, 7, 1), get(8, 9, 1, G)]),
    "two holders at once": ("two live holders", [*FIRST, A_CLAIMS, B_TAKES_OVER]),
    "a lease set free by a holder who had lost it": (
        "stale release", [*FIRST, A_CLAIMS_BRIEFLY, B_TAKES_OVER, lease("release", 8, 9, "a", True)]),
    "tokens written by a holder who had lost the lease": (
        "stale completion",
        [*FIRST, A_CLAIMS_BRIEFLY, B_TAKES_OVER, lease("complete", 8, 9, "a", True, value=1)]),
    "tokens written over a newer version": (
        "stale completion",
        [*FIRST, A_CLAIMS, put(6, 7, 1), lease("complete", 8, 9, "a", True, value=2)]),
    "a late completion after newer tokens": (
        "stale completion",
        [*FIRST, A_CLAIMS_BRIEFLY, B_TAKES_OVER, lease("complete", 8, 9, "b", True, value=1),
         lease("complete", 10, 11, "a", True, value=2)]),
    "a late completion after a delete": (
        "stale completion",
        [*FIRST, A_CLAIMS, op("delete", 6, 7, ok=True), lease("complete", 8, 9, "a", True, value=1)]),
    "a claim on a version that is gone": (
        "wrong grant", [*FIRST, put(4, 5, 1), get(6, 7, 1), lease("claim", 8, 9, "a", True)]),
    "a claim in spite of a failure": (
        "wrong grant",
        [*FIRST, A_CLAIMS, lease("release", 6, 7, "a", True, failed=True), lease("claim", 8, 9, "b", True)]),
    "a holder turned away": ("wrong refusal", [*FIRST, A_CLAIMS, lease("complete", 6, 7, "a", False, value=1)]),
    "a loser turned away though the winner has given up": (
        "wrong refusal",
        [*FIRST, A_CLAIMS_BRIEFLY, B_TAKES_OVER, lease("release", 8, 9, "b", True, failed=True),
         lease("complete", 10, 11, "a", False, value=1)]),
    "a free row refused": ("wrong refusal", [*FIRST, lease("claim", 4, 5, "a", False)]),
    "a row deleted twice": (
        "wrong delete", [put(0, 1, 0), op("delete", 2, 3, ok=True), op("delete", 4, 5, ok=True)]),
}  # fmt: skip


@pytest.mark.parametrize("name", POSSIBLE)
def test_accepts_what_one_caller_could_have_seen(name: str) -> None:
    """A history that some order explains passes, in whatever order it was recorded."""
    history = POSSIBLE[name]
    check_history(history)
    check_history(reversed(history))


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_rejects_and_names_what_no_order_explains(name: str) -> None:
    """A history that no order explains fails, and the error says which kind of race it shows."""
    kind, history = IMPOSSIBLE[name]
    with pytest.raises(NotLinearizable) as failure:
        check_history(reversed(history))
    assert failure.value.kind == kind
    assert set(failure.value.operations) <= set(history)


def test_the_message_draws_the_race() -> None:
    """The error shows the shortest failing part in order, marks the operation that does not fit, and the row it met."""
    unrelated = [op("put", 0, 99, key="other", value=0), get(20, 21, 2), put(22, 23, 3)]
    with pytest.raises(NotLinearizable) as failure:
        check_history([*FIRST, update(4, 7, 0, 1), update(5, 8, 0, 2), *unrelated])
    assert str(failure.value).splitlines() == [
        "lost update of 'k': no order of these operations explains their results",
        "        0..1   t   put 0                                            -> done",
        "        2..4   t   update of 0 to 1                                 -> done",
        "  >     3..5   t   update of 0 to 2                                 -> done",
        "before the marked operation returned, the row can only have been: 1",
    ]


def test_values_must_tell_writes_apart() -> None:
    """Two writes of one value would make a verdict meaningless, so they are refused."""
    with pytest.raises(ValueError, match="same value"):
        check_history([put(0, 1, 5), put(2, 3, 5)])


def test_every_kind_has_an_example() -> None:
    """The kinds that the examples show are all the kinds there are."""
    assert {kind for kind, _ in IMPOSSIBLE.values()} == set(get_args(Kind))


def test_every_operation_has_an_example() -> None:
    """No operation of the model goes untested."""
    names = get_args(get_type_hints(Operation)["name"])
    assert {operation.name for _, history in IMPOSSIBLE.values() for operation in history} >= set(names) - {"get"}


@pytest.mark.parametrize("seed", range(50))
def test_agrees_with_a_row_used_by_one_caller_at_a_time(seed: int) -> None:
    """Histories made by widening the times of a sequential run are linearizable; with one read bent, they are not."""
    chance = random.Random(seed)
    row: Row | None = None
    history = []
    for number in range(60):
        at = 10 * number
        times: dict[str, Any] = {"invoked": at - chance.randrange(40), "returned": at + chance.randrange(40)}
        if row is None or chance.random() < 0.3:
            row = Row(number, 1 if row is None or row.generation is None else row.generation + 1)
            history.append(op("put", **times, value=number))
        elif chance.random() < 0.4:
            history.append(op("update", **times, seen=Version(row.value, row.generation), value=number))
            row = Row(number, (row.generation or 0) + 1)
        else:
            history.append(op("get", **times, seen=Version(row.value, row.generation)))
    check_history(history)
    last = 10 * 60 + 50
    with pytest.raises(NotLinearizable):
        check_history([*history, op("get", last, last + 1, seen=Version(-1))])
