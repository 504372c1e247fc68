"""Programs for several tasks on one store's data: Hypothesis writes them, `play` runs and records them.

Every write carries an id in each of its parts, so that a read shows whose it is, or that it is a mixture. A program's
waits are scheduling points, never times; a step can be cancelled at any of its own.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from hypothesis import strategies as st

from support.stepping import stepped
from support.written_values import sealed, tokens, version
from tokenstore import Keyring, open_store
from tokenstore.errors import ConflictError
from tokenstore.protocol import Backend, SupportsRowLocks
from tokenstore.records import Failure, SealedRecord, TokenKey
from tokenstore.sealing import open_record
from tokenstore.store import AuthTokenStore
from tokenstore.testing.history import Operation, Version

T = TypeVar("T")
Action = Literal["store", "load", "update", "delete", "reseal", "claim", "complete", "release"]
STORES = 3
BRIEF, LASTING = 0.000_001, 3600.0  # leases that may have, and cannot have, expired before the program's end
_PAUSES = (0, 1, 3, 10, 40)
# Each store seals with another of two keys, so that there is always something for another one to reseal.
_KEYS = {"north": b"n" * 32, "south": b"s" * 32}


class Unexpected(AssertionError):
    """A step that raised what it never should, or did not see its own write."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)  # both as args, so that it pickles between processes
        self.kind = kind

    def __str__(self) -> str:
        return ": ".join(self.args)


class Rollback(Exception):
    """Raised inside a transaction to undo it."""


@dataclass(frozen=True)
class Step:
    """One thing that a task does.

    Attributes:
        action: `update` is a transaction of a locking read and a write; `claim` reads the generation first.
        keys: Indexes of the rows, ascending; all but `update` use the first alone.
        pause: How many scheduling points to let pass between the parts of a step.
        cancel_at: Which of its own suspensions the step is cancelled at.
        deletes: `update` deletes what it read.
        rolls_back: `update` is undone.
        restarts: `update` rolls back in the middle, and starts again in the same transaction.
        brief: `claim` takes a lease that may expire at once.
        ends: How `claim` goes on when it was granted, after the pause.
        which: Whose claim to `complete` or `release`, counted from the last one.
        fails: `release`, or a `claim` that ends in one, leaves a failure behind.
    """

    action: Action
    keys: tuple[int, ...] = (0,)
    pause: int = 0
    cancel_at: int | None = None
    deletes: bool = False
    rolls_back: bool = False
    restarts: bool = False
    brief: bool = False
    ends: Literal["complete", "release"] | None = None
    which: int = 0
    fails: bool = False


Program = tuple[tuple[Step, ...], ...]
"""The steps of each task."""
# What a program's tasks are busy with. One theme gets deeper than a mixture of everything.
_THEMES: tuple[tuple[Action, ...], ...] = (
    ("store", "load", "update", "update", "delete"),
    ("claim", "claim", "claim", "complete", "release"),
    ("reseal", "reseal", "store", "load", "update"),
    ("store", "load", "update", "update", "delete", "reseal", "claim", "claim", "complete", "release"),
)


def programs(tasks: int = 4, steps: int = 5) -> st.SearchStrategy[Program]:
    """Programs for two or more tasks, over one to three rows."""
    rarely = st.sampled_from((False, False, False, True))
    which = st.integers(0, 2)
    fields: dict[Action, dict[str, st.SearchStrategy[Any]]] = {
        "update": {"deletes": rarely, "rolls_back": rarely, "restarts": rarely},
        "claim": {"brief": st.booleans(), "ends": st.sampled_from((None, "complete", "release")), "fails": rarely},
        "complete": {"which": which},
        "release": {"which": which, "fails": rarely},
    }
    mostly_one = ((0,), (0,), (0,), (0,), (0,), (1,), (2,))

    def step(action: Action) -> st.SearchStrategy[Step]:
        return st.builds(
            Step,
            st.just(action),
            keys=st.sampled_from((*mostly_one, (0, 1), (0, 2)) if action == "update" else mostly_one),
            pause=st.sampled_from(_PAUSES),
            cancel_at=st.none() | st.none() | st.integers(1, 24),
            **fields.get(action, {}),
        )

    def themed(theme: tuple[Action, ...]) -> st.SearchStrategy[Program]:
        task = st.lists(st.sampled_from(theme).flatmap(step), min_size=1, max_size=steps).map(tuple)
        return st.lists(task, min_size=2, max_size=tasks).map(tuple)

    return st.sampled_from(_THEMES).flatmap(themed)


# Rows 0 and 1 exist and their generations are known; row 2 has to be made by the program. Afterwards each row is
# locked, written and read: nothing has stayed locked, and no late write has gone unseen.
BEFORE: Program = (tuple(step for row in ((0,), (1,)) for step in (Step("store", row), Step("load", row))),)
AFTER: Program = (tuple(step for row in ((0,), (1,), (2,)) for step in (Step("update", row), Step("load", row))),)


class Store(NamedTuple):
    """A store and the backend under it, which alone has the leases."""

    tokens: AuthTokenStore
    backend: Backend
    keyring: Keyring


def stores_over(backends: Sequence[Backend]) -> list[Store]:
    """Stores for the tasks, over these backend objects in turn."""
    stores = []
    for index, backend in zip(range(STORES), itertools.cycle(backends), strict=False):
        keyring = Keyring(dict(sorted(_KEYS.items(), reverse=bool(index % 2))))
        stores.append(Store(open_store(backend, keyring=keyring), backend, keyring))
    return stores


@dataclass
class Stage:
    """What the tasks of one program share in one process.

    Attributes:
        stores: The tasks take them in turn.
        user_id: The beginning of the rows' names, fresh for each program.
        clock: One clock for all who take part.
        name: The beginning of the tasks' names.
        history: What happened.
        claims: The leases asked for, by whom and of which generation.
    """

    stores: Sequence[Store]
    user_id: str
    clock: Callable[[], int]
    name: str = ""
    history: list[Operation] = field(default_factory=list)
    claims: list[tuple[TokenKey, str, int]] = field(default_factory=list)

    async def play(self, program: Program, name: str = "") -> None:
        """Run the tasks of a program at once; raise `Unexpected` if one fails.

        Args:
            program: What to do.
            name: What to call the tasks; default: a, b, c …
        """
        actors = [
            _Actor(self, self.name + (name or chr(ord("a") + index)), self.stores[index % len(self.stores)])
            for index in range(len(program))
        ]
        outcomes = await asyncio.gather(
            *(actor.perform(steps) for actor, steps in zip(actors, program, strict=True)), return_exceptions=True
        )
        for actor, outcome in zip(actors, outcomes, strict=True):
            if isinstance(outcome, Unexpected):
                raise outcome
            if isinstance(outcome, BaseException):
                kind = f"unexpected {type(outcome).__name__}"
                raise Unexpected(kind, f"{outcome} (task {actor.name})") from outcome


class _Actor:
    def __init__(self, stage: Stage, name: str, store: Store) -> None:
        self.stage = stage
        self.name = name
        self.tokens, self.backend, self.keyring = store
        self.ids = (f"{name}{number}" for number in itertools.count(1))

    async def perform(self, steps: Sequence[Step]) -> None:
        for step in steps:
            task = asyncio.create_task(_cancelled_at(step.cancel_at, self._act(step)))
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()
            elif step.cancel_at is None:
                raise Unexpected("unexpected CancelledError", f"nobody cancelled {step.action} (task {self.name})")

    async def _act(self, step: Step) -> None:
        key = self._key(step.keys[0])
        match step.action:
            case "store":
                value = next(self.ids)
                with self._recorded("put", key, value=value):
                    await self.tokens.store_tokens(*key, **tokens(value))
            case "load":
                await self._load(key)
            case "delete":
                with self._recorded("delete", key) as outcome:
                    outcome["ok"] = await self.tokens.delete_tokens(*key)
            case "reseal":
                await self.tokens.reseal_tokens(*key)  # must show in no history
            case "update":
                await self._update(step)
            case "claim":
                seen = await self._load(key)
                if seen is not None and seen.generation is not None:
                    await self._claim(step, key, seen.generation)
            case "complete" | "release":
                if claims := self.stage.claims:
                    await self._end_lease(step.action, *claims[-1 - step.which % len(claims)], fails=step.fails)

    async def _load(self, key: TokenKey) -> Version | None:
        with self._recorded("get", key) as outcome:
            seen = outcome["seen"] = version(await self.tokens.load_tokens(*key))
        return seen

    async def _claim(self, step: Step, key: TokenKey, generation: int) -> None:
        holder = next(self.ids)
        self.stage.claims.append((key, holder, generation))
        with self._recorded("claim", key, generation=generation, holder=holder, lasting=not step.brief) as outcome:
            duration = BRIEF if step.brief else LASTING
            outcome["ok"] = await self.backend.claim_lease(key, generation=generation, holder=holder, duration=duration)
        if step.ends is not None and outcome["ok"]:
            await _pause(step.pause)
            await self._end_lease(step.ends, key, holder, generation, fails=step.fails)

    async def _end_lease(
        self, action: Literal["complete", "release"], key: TokenKey, holder: str, generation: int, *, fails: bool
    ) -> None:
        of: dict[str, Any] = {"generation": generation, "holder": holder}
        if action == "complete":
            value = next(self.ids)
            with self._recorded("complete", key, value=value, **of) as outcome:
                outcome["ok"] = await self.backend.complete_lease(key, sealed(self.keyring, key, value), **of)
        else:
            with self._recorded("release", key, failed=fails, **of) as outcome:
                failure = Failure("invalid_grant") if fails else None
                outcome["ok"] = await self.backend.release_lease(key, failure=failure, **of)

    async def _update(self, step: Step) -> None:
        writes: list[tuple[Literal["update", "put", "delete"], dict[str, Any]]] = []
        committing = False
        try:
            # The backend's own, as the store's waits for leases, which these programs leave behind.
            assert isinstance(self.backend, SupportsRowLocks)
            async with self.backend.transaction() as transaction:
                if step.restarts:
                    for key in map(self._key, step.keys):
                        await transaction.lock(key)
                        await transaction.put(key, sealed(self.keyring, key, f"undone by {self.name}"))
                        await _pause(step.pause)
                    await transaction.rollback()
                for key in map(self._key, step.keys):
                    begun: dict[str, Any] = {"key": key, "by": self.name, "invoked": self.stage.clock()}
                    seen = self._version(await transaction.lock(key))
                    self._record("get", **begun, returned=self.stage.clock(), seen=seen)
                    await _pause(step.pause)
                    if seen is None:
                        begun["invoked"] = self.stage.clock()  # no row, no lock
                    written = None
                    if step.deletes:
                        effect: dict[str, Any] = {"ok": await transaction.delete(key)}
                    else:
                        written = next(self.ids)
                        await transaction.put(key, sealed(self.keyring, key, written))
                        effect = {"value": written}
                    if seen is not None:
                        writes.append(("update", begun | {"seen": seen, "value": written}))
                    else:
                        writes.append(("delete" if step.deletes else "put", begun | effect))
                    own = self._version(await transaction.get(key))
                    if (own and own.value) != written and not (step.deletes and seen is None):
                        raise Unexpected("own write unseen", f"{self.name} wrote {written} and then read {own}")
                    await _pause(step.pause)
                if step.rolls_back:
                    raise Rollback
                committing = True
        except (Rollback, ConflictError):
            return  # a conflict undoes the transaction, too; InnoDB has dead-locks on one row, around deletes
        except asyncio.CancelledError:
            if committing:
                for name, fields in writes:
                    self._record(name, **fields | {"ok": None}, ended=self.stage.clock())
            raise  # before the commit began, a cancelled transaction is an undone one
        for name, fields in writes:
            self._record(name, **fields, returned=self.stage.clock())

    def _version(self, row: SealedRecord | None) -> Version | None:
        return version(None if row is None else open_record(self.keyring, row.key, row))

    @contextmanager
    def _recorded(
        self, name: Literal["get", "put", "delete", "claim", "complete", "release"], key: TokenKey, **fields: Any
    ) -> Iterator[dict[str, Any]]:
        fields |= {"key": key, "by": self.name, "invoked": self.stage.clock()}
        outcome: dict[str, Any] = {}
        try:
            yield outcome
        except asyncio.CancelledError:
            if name != "get":
                self._record(name, **fields, ended=self.stage.clock())
            raise
        self._record(name, **fields, **outcome, returned=self.stage.clock())

    def _record(
        self, name: Literal["get", "put", "delete", "update", "claim", "complete", "release"], **fields: Any
    ) -> None:
        self.stage.history.append(Operation(name=name, **fields))

    def _key(self, index: int) -> TokenKey:
        return TokenKey("provider", f"{self.stage.user_id}{index}")


async def _pause(points: int) -> None:
    for _ in range(points):
        await asyncio.sleep(0)


async def _cancelled_at(point: int | None, work: Coroutine[Any, Any, T]) -> T:
    """Do some work, and cancel its task as it begins its n-th wait."""
    waits = itertools.count(1)

    def step() -> None:
        if next(waits) == point:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()

    return await stepped(work, step)
