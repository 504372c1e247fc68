"""The linearizability checker accepts possible histories, and names the fault of impossible ones."""

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
    "concurrent updates in one order": [put(0, 1, 0), update(2, 8, 0, 1), update(3, 9, 1, 2), get(10, 11, 2)],
    "concurrent updates whose order follows only from their reads": [
        put(0, 1, 0), update(2, 9, 1, 2), update(3, 8, 0, 1)
    ],
    "a cancelled write that took effect": [put(0, 1, 0), put(2, None, 1), get(8, 9, 1)],
    "a cancelled write that did not take effect": [put(0, 1, 0), put(2, None, 1), get(8, 9, 0)],
    "a cancelled write that took effect after a read": [
        *FIRST, put(4, None, 1), get(5, 6, 0, G), get(8, 9, 1, G + 1)
    ],
    "a cancelled write that took effect before its caller got the cancellation": [
        *FIRST, op("put", 4, None, value=1, ended=9), get(5, 6, 0, G), get(7, 8, 1, G + 1), get(10, 11, 1)
    ],
    "a cancelled delete that took effect before or after a refused release": [
        *FIRST, A_CLAIMS, lease("release", 6, 7, "a", True), op("delete", 8, None, ended=9),
        lease("release", 10, 11, "a", False), op("delete", 12, 13, ok=False),
    ],
    "two cancelled writes, one after the other": [
        put(0, 1, 0), op("put", 2, None, value=1, ended=3), op("put", 4, None, value=2, ended=5), get(6, 7, 1)
    ],
    "a cancelled claim that was granted": [
        *FIRST, lease("claim", 4, None, "a", None), lease("claim", 6, 7, "b", False)
    ],
    "a deleted row starts with another generation": [
        *FIRST, op("delete", 4, 5, ok=True), put(6, 7, 1), get(8, 9, 1, 90)
    ],
    "an update that deletes": [put(0, 1, 0), update(2, 3, 0, None), get(4, 5), op("delete", 6, 7, ok=False)],
    "operations on one key do not affect another": [put(0, 1, 0), op("get", 2, 3, key="other", seen=None)],
    "a claim is refused while another is live": [*FIRST, A_CLAIMS, lease("claim", 6, 7, "b", False)],
    "a brief lease may or may not have expired": [
        *FIRST, A_CLAIMS_BRIEFLY, lease("claim", 6, 7, "b", False), lease("claim", 8, 9, "c", True)
    ],
    "a former holder cannot end the new holder's lease": [
        *FIRST, A_CLAIMS_BRIEFLY, B_TAKES_OVER, lease("release", 8, 9, "a", False),
        lease("complete", 10, 11, "a", False, value=1), lease("complete", 12, 13, "b", True, value=2),
        get(14, 15, 2, G + 1),
    ],
    "a holder completes an expired lease that no other holder claimed": [
        *FIRST, A_CLAIMS_BRIEFLY, lease("complete", 6, 7, "a", True, value=1)
    ],
    "a former holder completes after the new holder released": [
        *FIRST, A_CLAIMS_BRIEFLY, B_TAKES_OVER, lease("release", 8, 9, "b", True, failed=True),
        lease("complete", 10, 11, "a", True, value=1), get(12, 13, 1, G + 1),
        lease("claim", 14, 15, "c", True, generation=G + 1),
    ],
    "the new holder's lease may or may not have expired when the former holder completes": [
        *FIRST, A_CLAIMS_BRIEFLY, lease("claim", 6, 7, "b", True, lasting=False),
        lease("complete", 8, 9, "a", False, value=1), lease("complete", 10, 11, "a", True, value=2),
        lease("complete", 12, 13, "b", False, value=3),
    ],
    "a completion after the lease was released": [
        *FIRST, A_CLAIMS, lease("release", 6, 7, "a", True), lease("complete", 8, 9, "a", True, value=1)],
    "a write ends a lease": [*FIRST, A_CLAIMS, put(6, 7, 1), lease("release", 8, 9, "a", False),
                             lease("claim", 10, 11, "b", True, generation=G + 1)],
    "a failure forbids claims until the next write": [
        *FIRST, A_CLAIMS, lease("release", 6, 7, "a", True, failed=True), lease("claim", 8, 9, "b", False),
        put(10, 11, 1), lease("claim", 12, 13, "b", True, generation=G + 1),
    ],
}  # fmt: skip

IMPOSSIBLE: dict[str, tuple[str, list[Operation]]] = {
    "two updates of the same version": ("lost update", [put(0, 1, 0), update(2, 8, 0, 1), update(3, 9, 0, 2)]),
    "an update of a version overwritten before it began": (
        "lost update", [put(0, 1, 0), put(2, 3, 1), update(4, 5, 0, 2)]),
    "an old value after a newer one was read": ("stale read", [put(0, 1, 0), put(2, 9, 1), get(3, 4, 1), get(5, 6, 0)]),
    "an old value after the write returned": ("stale read", [put(0, 1, 0), put(2, 3, 1), get(4, 5, 0)]),
    "a value before its write began": ("stale read", [put(0, 1, 0), get(2, 3, 1), put(4, 5, 1)]),
    "a row after it was deleted": ("stale read", [put(0, 1, 0), op("delete", 2, 3, ok=True), get(4, 5, 0)]),
    "a rolled back value": ("stale read", [put(0, 1, 0), get(2, 3, 5)]),
    "a cancelled write that is read and then gone": (
        "stale read", [put(0, 1, 0), put(2, None, 1), get(3, 4, 1), get(5, 6, 0)]),
    "a cancelled write that takes effect after its caller got the cancellation": (
        "stale read", [put(0, 1, 0), op("put", 2, None, value=1, ended=3), get(4, 5, 0), get(6, 7, 1)]),
    "a cancelled write over a later one": (
        "stale read", [put(0, 1, 0), op("put", 2, None, value=1, ended=3), put(4, 5, 2), get(6, 7, 1)]),
    "a cancelled write over a later one that was cancelled too": (
        "stale read", [put(0, 1, 0), op("put", 2, None, value=1, ended=3), op("put", 4, None, value=2, ended=5),
                       get(6, 7, 2), get(8, 9, 1)]),
    "parts of two writes": ("mixed read", [put(0, 1, 0), put(2, 9, 1), get(3, 4, Mixture((0, 1, 1)))]),
    "a write that skips a generation": ("wrong generation", [*FIRST, put(4, 5, 1), get(6, 7, 1, G + 2)]),
    "two writes with the same generation": (
        "wrong generation", [*FIRST, put(4, 8, 1), put(5, 9, 2), get(10, 11, 2, G + 1)]),
    "a generation that is used again after a delete": (
        "wrong generation", [*FIRST, op("delete", 4, 5, ok=True), put(6, 7, 1), get(8, 9, 1, G)]),
    "two holders of a lease at the same time": ("two live holders", [*FIRST, A_CLAIMS, B_TAKES_OVER]),
    "a lease released by its former holder": (
        "stale release", [*FIRST, A_CLAIMS_BRIEFLY, B_TAKES_OVER, lease("release", 8, 9, "a", True)]),
    "tokens written by the former holder of a lease": (
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
    "a claim granted for an old generation": (
        "wrong grant", [*FIRST, put(4, 5, 1), get(6, 7, 1), lease("claim", 8, 9, "a", True)]),
    "a claim granted although a failure forbids it": (
        "wrong grant",
        [*FIRST, A_CLAIMS, lease("release", 6, 7, "a", True, failed=True), lease("claim", 8, 9, "b", True)]),
    "a completion by the lease holder that is refused": (
        "wrong refusal", [*FIRST, A_CLAIMS, lease("complete", 6, 7, "a", False, value=1)]),
    "a completion by a former holder that is refused after the new holder released": (
        "wrong refusal",
        [*FIRST, A_CLAIMS_BRIEFLY, B_TAKES_OVER, lease("release", 8, 9, "b", True, failed=True),
         lease("complete", 10, 11, "a", False, value=1)]),
    "a claim refused although the row has no lease": ("wrong refusal", [*FIRST, lease("claim", 4, 5, "a", False)]),
    "a row deleted twice": (
        "wrong delete", [put(0, 1, 0), op("delete", 2, 3, ok=True), op("delete", 4, 5, ok=True)]),
}  # fmt: skip


@pytest.mark.parametrize("name", POSSIBLE)
def test_a_possible_history_is_accepted(name: str) -> None:
    """A history that some order of its operations explains passes, in whatever order it was recorded."""
    history = POSSIBLE[name]
    check_history(history)
    check_history(reversed(history))


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_history_is_rejected_with_the_kind_of_its_fault(name: str) -> None:
    """A history that no order of its operations explains fails, and the error has the kind of the fault."""
    kind, history = IMPOSSIBLE[name]
    with pytest.raises(NotLinearizable) as failure:
        check_history(reversed(history))
    assert failure.value.kind == kind
    assert set(failure.value.operations) <= set(history)


def test_the_error_message_shows_the_operations_of_the_race() -> None:
    """The message lists the operations of the failing part in order, and marks the one that does not fit."""
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


def test_two_writes_of_the_same_value_are_refused() -> None:
    """With equal values, the checker could not tell which write a read comes from."""
    with pytest.raises(ValueError, match="same value"):
        check_history([put(0, 1, 5), put(2, 3, 5)])


def test_every_kind_has_an_example() -> None:
    """Each kind of fault is the result of an example."""
    assert {kind for kind, _ in IMPOSSIBLE.values()} == set(get_args(Kind))


def test_every_operation_has_an_example() -> None:
    """Each operation of the model appears in an example of an impossible history."""
    names = get_args(get_type_hints(Operation)["name"])
    assert {operation.name for _, history in IMPOSSIBLE.values() for operation in history} >= set(names) - {"get"}


@pytest.mark.parametrize("seed", range(50))
def test_a_sequential_history_with_widened_times_is_accepted(seed: int) -> None:
    """The history is linearizable, because each operation took effect within its times; with a wrong read it is not."""
    random_source = random.Random(seed)
    row: Row | None = None
    history = []
    for number in range(60):
        at = 10 * number
        times: dict[str, Any] = {
            "invoked": at - random_source.randrange(40),
            "returned": at + random_source.randrange(40),
        }
        if row is None or random_source.random() < 0.3:
            row = Row(number, 1 if row is None or row.generation is None else row.generation + 1)
            history.append(op("put", **times, value=number))
        elif random_source.random() < 0.4:
            history.append(op("update", **times, seen=Version(row.value, row.generation), value=number))
            row = Row(number, (row.generation or 0) + 1)
        else:
            history.append(op("get", **times, seen=Version(row.value, row.generation)))
    check_history(history)
    last = 10 * 60 + 50
    with pytest.raises(NotLinearizable):
        check_history([*history, op("get", last, last + 1, seen=Version(-1))])
