"""Programs for several tasks that use the same rows. `ProgramRun` runs and records them.

`support.program_strategy` generates them. It is apart from this module, because every worker process imports this one,
and Hypothesis takes longer to import than all the rest.

Each write has an id that is part of all its values, so that a read shows which write it comes from, or that it is a
mixture of several. A program waits by steps of the event loop, never for a time; a step of a program can be cancelled
at any of its suspensions.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from support.stepping import stepped
from support.written_values import sealed, tokens, version
from tokenstore import Keyring, open_store
from tokenstore.errors import ConflictError
from tokenstore.protocol import Backend, SupportsRowLocks
from tokenstore.records import Failure, SealedRecord, TokenKey
from tokenstore.sealing import Sealer
from tokenstore.store import AuthTokenStore
from tokenstore.testing.history import Operation, Version
from tokenstore.validation import requested_row

T = TypeVar("T")
Action = Literal["store", "load", "update", "delete", "reseal", "claim", "complete", "release"]
STORES = 3
# Seconds: a brief lease may expire during the program, a lasting one cannot.
BRIEF, LASTING = 0.000_001, 3600.0
# The rows' users, and their accounts.
_ROWS = ((0, ""), (0, "work"), (1, ""))
# Neighbouring stores seal with different keys, so that each store finds rows to reseal.
_KEYS = {"north": b"n" * 32, "south": b"s" * 32}


class Unexpected(AssertionError):
    """A step raised an unexpected error, or did not read its own write."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)  # both in `args`, so that the error can be pickled for another process
        self.kind = kind

    def __str__(self) -> str:
        return ": ".join(self.args)


class Rollback(Exception):
    """Raised inside a transaction to roll it back."""


@dataclass(frozen=True)
class Step:
    """One action of a task.

    Attributes:
        action: `update` is a transaction with a locking read and a write; `claim` reads the generation first.
        keys: Indexes of the rows, ascending; only `update` uses more than the first.
        pause: How many steps of the event loop to wait between the parts of the action.
        cancel_at: The suspension of this action at which it is cancelled.
        deletes: For `update`: delete the row instead of writing it.
        rolls_back: For `update`: roll back at the end.
        restarts: For `update`: call `rollback()` after the writes, and do them again in the same transaction.
        brief: For `claim`: the lease may expire at once.
        ends: For `claim`: how to end the lease after the pause, if it was granted.
        which: For `complete` and `release`: which claim to end, counted from the last one.
        fails: For `release`, or a `claim` that ends with one: store a failure.
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
# Before a program, rows 0 and 1 are stored and read, so that their generations are known; row 2 does not exist. After
# it, each row is locked, written and read, to find locks that were left behind and writes that came late.
BEFORE: Program = (tuple(step for row in ((0,), (1,)) for step in (Step("store", row), Step("load", row))),)
AFTER: Program = (tuple(step for row in ((0,), (1,), (2,)) for step in (Step("update", row), Step("load", row))),)


class Store(NamedTuple):
    """A store and its backend; leases are claimed on the backend."""

    tokens: AuthTokenStore
    backend: Backend
    keyring: Keyring


def stores_over(backends: Sequence[Backend]) -> list[Store]:
    """Make stores for the tasks, which use these backend objects in turn."""
    stores = []
    for index, backend in zip(range(STORES), itertools.cycle(backends), strict=False):
        keyring = Keyring(dict(sorted(_KEYS.items(), reverse=bool(index % 2))))
        stores.append(Store(open_store(backend, keyring=keyring), backend, keyring))
    return stores


@dataclass
class ProgramRun:
    """One run of a program, or of its tasks in one process.

    Attributes:
        stores: The stores, which the tasks use in turn.
        user_id: The prefix of the rows' user ids, different for each program.
        clock: The clock of the history, the same for all tasks and processes.
        name: The prefix of the tasks' names.
        history: The calls so far.
        claims: All claims so far, granted or not, each with the holder and the generation.
    """

    stores: Sequence[Store]
    user_id: str
    clock: Callable[[], int]
    name: str = ""
    history: list[Operation] = field(default_factory=list)
    claims: list[tuple[TokenKey, str, int]] = field(default_factory=list)

    async def execute(self, program: Program, name: str = "") -> None:
        """Run the tasks of a program concurrently.

        Args:
            program: The steps of each task.
            name: The name of the tasks; default: a, b, c …

        Raises:
            Unexpected: A task failed.
        """
        tasks = [
            _Task(self, self.name + (name or chr(ord("a") + index)), self.stores[index % len(self.stores)])
            for index in range(len(program))
        ]
        outcomes = await asyncio.gather(
            *(task.perform(steps) for task, steps in zip(tasks, program, strict=True)), return_exceptions=True
        )
        for task, outcome in zip(tasks, outcomes, strict=True):
            if isinstance(outcome, Unexpected):
                raise outcome
            if isinstance(outcome, BaseException):
                kind = f"unexpected {type(outcome).__name__}"
                raise Unexpected(kind, f"{outcome} (task {task.name})") from outcome


class _Task:
    def __init__(self, run: ProgramRun, name: str, store: Store) -> None:
        self.run = run
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
                raise Unexpected("unexpected CancelledError", f"{step.action} was not cancelled (task {self.name})")

    async def _act(self, step: Step) -> None:
        key = self._key(step.keys[0])
        match step.action:
            case "store":
                value = next(self.ids)
                with self._recorded("put", key, value=value):
                    await self.tokens.store_tokens(**key._asdict(), **tokens(value))
            case "load":
                await self._load(key)
            case "delete":
                with self._recorded("delete", key) as outcome:
                    outcome["ok"] = await self.tokens.delete_tokens(**key._asdict())
            case "reseal":
                await self.tokens.reseal_tokens(**key._asdict())  # not recorded: other calls must not see it
            case "update":
                await self._update(step)
            case "claim":
                seen = await self._load(key)
                if seen is not None and seen.generation is not None:
                    await self._claim(step, key, seen.generation)
            case "complete" | "release":
                if claims := self.run.claims:
                    await self._end_lease(step.action, *claims[-1 - step.which % len(claims)], fails=step.fails)

    async def _load(self, key: TokenKey) -> Version | None:
        with self._recorded("get", key) as outcome:
            seen = outcome["seen"] = version(await self.tokens.load_tokens(**key._asdict()))
        return seen

    async def _claim(self, step: Step, key: TokenKey, generation: int) -> None:
        holder = next(self.ids)
        self.run.claims.append((key, holder, generation))
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
            # The backend's transaction, not the store's: that one waits for leases, and programs leave leases behind.
            assert isinstance(self.backend, SupportsRowLocks)
            async with self.backend.transaction() as transaction:
                if step.restarts:
                    for key in map(self._key, step.keys):
                        await transaction.lock(key)
                        await transaction.put(key, sealed(self.keyring, key, f"undone by {self.name}"))
                        await _pause(step.pause)
                    await transaction.rollback()
                for key in map(self._key, step.keys):
                    begun: dict[str, Any] = {"key": key, "by": self.name, "invoked": self.run.clock()}
                    seen = self._version(key, await transaction.lock(key))
                    self._record("get", **begun, returned=self.run.clock(), seen=seen)
                    await _pause(step.pause)
                    if seen is None:
                        begun["invoked"] = self.run.clock()  # a missing row was not locked: the write begins now
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
                    own = self._version(key, await transaction.get(key))
                    if (own and own.value) != written and not (step.deletes and seen is None):
                        raise Unexpected("own write unseen", f"{self.name} wrote {written} and then read {own}")
                    await _pause(step.pause)
                if step.rolls_back:
                    raise Rollback
                committing = True
        except (Rollback, ConflictError):
            return  # a conflict also rolls back; InnoDB can deadlock on a single row if it is deleted concurrently
        except asyncio.CancelledError:
            if committing:
                for name, fields in writes:
                    self._record(name, **fields | {"ok": None}, ended=self.run.clock())
            raise  # a transaction that is cancelled before its commit began is rolled back, so nothing is recorded
        for name, fields in writes:
            self._record(name, **fields, returned=self.run.clock())

    def _version(self, key: TokenKey, answer: SealedRecord | None) -> Version | None:
        row = requested_row(key, answer)
        return version(None if row is None else Sealer(self.keyring).open(key, row))

    @contextmanager
    def _recorded(
        self, name: Literal["get", "put", "delete", "claim", "complete", "release"], key: TokenKey, **fields: Any
    ) -> Iterator[dict[str, Any]]:
        fields |= {"key": key, "by": self.name, "invoked": self.run.clock()}
        outcome: dict[str, Any] = {}
        try:
            yield outcome
        except asyncio.CancelledError:
            if name != "get":
                self._record(name, **fields, ended=self.run.clock())
            raise
        self._record(name, **fields, **outcome, returned=self.run.clock())

    def _record(
        self, name: Literal["get", "put", "delete", "update", "claim", "complete", "release"], **fields: Any
    ) -> None:
        self.run.history.append(Operation(name=name, **fields))

    def _key(self, index: int) -> TokenKey:
        number, account = _ROWS[index]
        return TokenKey("provider", f"{self.run.user_id}{number}", account)


async def _pause(points: int) -> None:
    for _ in range(points):
        await asyncio.sleep(0)


async def _cancelled_at(point: int | None, work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine, and cancel its task at the n-th suspension."""
    waits = itertools.count(1)

    def step() -> None:
        if next(waits) == point:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()

    return await stepped(work, step)
