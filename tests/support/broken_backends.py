"""Backends with a fault: each is a real backend with one method that is overridden by a plausible wrong one.

contract/test_broken_backends.py shows that the property tests find each fault. ``_network`` gives other tasks time to
run between two statements, as a slow network does.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Executable, Select, text, update

from tokenstore.leases import written
from tokenstore.protocol import BackendTransaction
from tokenstore.records import Failure, SealedMetadata, SealedRecord, SealedTokens, TokenKey
from tokenstore.registry import backend_for_url
from tokenstore_memory import MemoryBackend
from tokenstore_sql.backend import SQLBackend
from tokenstore_sql.dialect import LockScope
from tokenstore_sql.rows import Rows
from tokenstore_sql.sqlite.busy import until_not_busy
from tokenstore_sql.sqlite.dialect import SQLiteDialect
from tokenstore_sql.statements.grammar import Grammar

__all__ = ["FAULTS", "UPDATE_FAULTS", "Fault", "fault_named"]

T = TypeVar("T")

# Each fault is a mixin for any of the real classes. For the type checker, its base is one of these classes.
if TYPE_CHECKING:
    AnyBackend = MemoryBackend
    AnySQLBackend = SQLBackend
    AnyGrammar = Grammar
    AnySQLiteDialect = SQLiteDialect
else:
    AnyBackend = AnySQLBackend = AnyGrammar = AnySQLiteDialect = object

ALL = ("memory", "sqlite", "postgres", "mysql")
SERVERS = ("postgres", "mysql")
# The same fault can show as several kinds of violation, depending on the next operation. The first kind is the usual.
_LOST = ("lost update", "wrong delete", "wrong generation", "stale read", "own write unseen")
_TAKEN = ("two live holders", "wrong refusal", "stale completion", "stale release")


@dataclass(frozen=True)
class Fault:
    """A fault in a backend.

    Attributes:
        name: A description of the fault.
        kinds: The kinds of violation that the property tests may report for it.
        marks: The pytest markers of the backends that are tested with it.
        breaks: Makes the broken class from a backend's class.
    """

    name: str
    kinds: frozenset[str]
    marks: tuple[str, ...]
    breaks: Callable[[type[Any]], type[Any]] = field(repr=False)

    def backend(self, url: str) -> Any:
        """Make the backend for a URL, with this fault."""
        return self.breaks(type(backend_for_url(url, {}))).from_url(url, {})

    def __reduce__(self) -> tuple[Any, ...]:
        return fault_named, (self.name, self.marks[0])  # pickled by name for another process


FAULTS: list[Fault] = []
UPDATE_FAULTS: list[Fault] = []
"""Faults in updates of metadata, which the generated programs do not make: races of updates find them."""


def _fault(
    name: str, *kinds: str, on: tuple[str, ...] = ALL, faults: list[Fault] = FAULTS
) -> Callable[[type[Any]], type[Any]]:
    """Register a mixin for the backend's class, or for the class of its dialect or grammar."""

    def register(mixin: type[Any]) -> type[Any]:
        def breaks(real: type[Any]) -> type[Any]:
            if "Grammar" in mixin.__name__:
                grammar = type("BrokenGrammar", (mixin, type(real.dialect_class.grammar)), {})
                dialect = type(f"Broken{real.dialect_class.__name__}", (real.dialect_class,), {"grammar": grammar()})
                return type(f"Broken{real.__name__}", (real,), {"dialect_class": dialect})
            if "Dialect" in mixin.__name__:
                dialect = type(f"Broken{real.dialect_class.__name__}", (mixin, real.dialect_class), {})
                return type(f"Broken{real.__name__}", (real,), {"dialect_class": dialect})
            return type(f"Broken{real.__name__}", (mixin, real), {})

        faults.append(Fault(name, frozenset(kinds), on, breaks))
        return mixin

    return register


def fault_named(name: str, mark: str) -> Fault:
    """Return the fault with this name for the backends with this marker."""
    [fault] = [fault for fault in (*FAULTS, *UPDATE_FAULTS) if fault.name == name and mark in fault.marks]
    return fault


async def _network(steps: int = 100) -> None:
    for _ in range(steps):
        await asyncio.sleep(0)


@_fault("no FOR UPDATE", *_LOST, on=SERVERS)
class _NoForUpdateGrammar(AnyGrammar):
    def for_update(self, query: Select[Any]) -> Select[Any]:
        return query


@_fault("deferred BEGIN", "unexpected LockTimeoutError", on=("sqlite",))
class _DeferredDialect(AnySQLiteDialect):
    begin_statement = text("BEGIN")


@_fault("no BEGIN", *_LOST, on=("sqlite",))
class _NoBeginDialect(AnySQLiteDialect):
    async def run_locking(self, scope: LockScope, action: Callable[[], Awaitable[T]], *, brief: bool = False) -> T:
        return await until_not_busy(action, self.lock_timeout)


class _Unlocked:
    """A transaction whose lock is a plain read."""

    def __init__(self, real: BackendTransaction) -> None:
        self.get, self.put, self.delete, self.rollback = real.get, real.put, real.delete, real.rollback
        self.insert, self.clock = real.insert, real.clock
        self.set_metadata = real.set_metadata

    async def lock(self, key: TokenKey) -> SealedRecord | None:
        row = await self.get(key)
        await _network()
        return row


@_fault("lock that only reads", *_LOST)
class _NoLock(AnyBackend):
    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        async with super().transaction() as transaction:
            yield _Unlocked(transaction)


class _KeepsWritesOnRollback:
    """A transaction whose ``rollback()`` does nothing."""

    def __init__(self, real: BackendTransaction) -> None:
        self.get, self.put, self.delete, self.lock = real.get, real.put, real.delete, real.lock
        self.insert, self.clock = real.insert, real.clock
        self.set_metadata = real.set_metadata

    async def rollback(self) -> None:
        await _network()


@_fault("rollback that does nothing", *_LOST)
class _NoRollback(AnyBackend):
    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        async with super().transaction() as transaction:
            yield _KeepsWritesOnRollback(transaction)


async def _execute(statement: Executable, rows: Rows) -> None:
    _ = await rows.connection.run(statement)


@_fault("read-then-write upsert", *_LOST, on=ALL[1:])
class _ReadThenWrite(AnySQLBackend):
    async def put(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> None:
        row = await self.get(key)
        await _network()
        if row is None:
            await super().put(key, tokens, metadata=metadata)
            return
        this_row = (self.table.c[name] == part for name, part in key._asdict().items())
        fresh = {**asdict(tokens), "generation": row.generation + 1, "lease_holder": None, "lease_expires_at": None}
        del fresh["issued"]  # has no column
        statement = update(self.table).where(*this_row).values(fresh)
        await self._run([key], functools.partial(_execute, statement), write=True)


@_fault("read-then-write upsert", *_LOST, on=("memory",))
class _ReadThenWriteInMemory(AnyBackend):
    async def put(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> None:
        stored = self._rows.get(key)
        await _network()
        if stored is None:
            await super().put(key, tokens, metadata=metadata)
        else:
            self._rows[key] = stored.after(written(stored.row, tokens), self._now(), metadata)


@_fault("commit in place of rollback", *_LOST)
class _CommitsFailures(AnyBackend):
    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        failure: Exception | None = None
        async with super().transaction() as transaction:
            try:
                yield transaction
            except Exception as error:  # noqa: BLE001 - the fault itself
                failure = error
        if failure is not None:
            raise failure


@_fault("delete of all accounts", *_LOST)
class _DeletesAllAccounts(AnyBackend):
    """A deletion that looks at the provider and the user alone."""

    async def delete(self, key: TokenKey) -> bool:
        for account in {"", "work"} - {key.account}:
            await super().delete(key._replace(account=account))
        return await super().delete(key)


@_fault("read in two halves", "mixed read")
class _TornRead(AnyBackend):
    async def get(self, key: TokenKey) -> SealedRecord | None:
        a = await super().get(key)
        await _network()
        b = await super().get(key)
        return replace(b, tokens=replace(b.tokens, access_token=a.tokens.access_token)) if a and b else None


@_fault("read that joins one under way", "stale read", "own write unseen", on=ALL[1:])
class _JoinsSentRead(AnySQLBackend):
    """A caller shares the result of another caller's read that was sent before the caller asked."""

    async def get(self, key: TokenKey) -> SealedRecord | None:
        under_way: dict[TokenKey, asyncio.Task[SealedRecord | None]] = vars(self).setdefault("_under_way", {})
        if (task := under_way.get(key)) is None:
            task = under_way[key] = asyncio.create_task(self._slow(key))
            task.add_done_callback(lambda _: under_way.pop(key))
        return await asyncio.shield(task)

    async def _slow(self, key: TokenKey) -> SealedRecord | None:
        found = await super().get(key)
        await _network(1000)  # longer than another task's write, which waits for the disk
        return found


@_fault("cache that knows its own writes alone", "stale read", *_LOST, *_TAKEN, on=ALL[1:])
class _Caches(AnySQLBackend):
    """A read cache in each process: it sees the writes of its own store, but not those of other stores."""

    async def get(self, key: TokenKey) -> SealedRecord | None:
        cache: dict[TokenKey, SealedRecord | None] = vars(self).setdefault("_cache", {})
        if key not in cache:
            cache[key] = await super().get(key)
        return cache[key]

    async def _run(self, keys: Sequence[Any], operation: Any, *, write: bool) -> Any:
        self._forget(keys)
        try:
            return await super()._run(keys, operation, write=write)
        finally:
            self._forget(keys)

    async def put(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> None:
        try:
            await super().put(key, tokens, metadata=metadata)
        finally:
            self._forget([key])

    def _forget(self, keys: Sequence[TokenKey]) -> None:
        for key in keys:
            vars(self).setdefault("_cache", {}).pop(key, None)


@_fault("lease checked, then taken", *_TAKEN)
class _CheckThenClaim(AnyBackend):
    async def claim_lease(self, key: TokenKey, *, generation: int, holder: str, duration: float) -> bool:
        row = await self.get(key)
        await _network()
        if row is not None and row.lease_holder is None and row.failure is None:
            now = await self.get(key)
            if now is not None and now.lease_holder is not None:
                await super().release_lease(key, generation=now.generation, holder=now.lease_holder)
        return await super().claim_lease(key, generation=generation, holder=holder, duration=duration)


@_fault("unconditional release", *_TAKEN)
class _ReleasesAnyLease(AnyBackend):
    async def release_lease(
        self, key: TokenKey, *, generation: int, holder: str, failure: Failure | None = None
    ) -> bool:
        row = await self.get(key)
        if row is None or row.lease_holder is None:
            return False
        return await super().release_lease(key, generation=row.generation, holder=row.lease_holder, failure=failure)


@_fault("unconditional completion", *_TAKEN)
class _CompletesBesideALease(AnyBackend):
    async def complete_lease(
        self,
        key: TokenKey,
        tokens: SealedTokens,
        *,
        generation: int,
        holder: str,
        metadata: SealedMetadata | None = None,
    ) -> bool:
        row = await self.get(key)
        holder = row.lease_holder or holder if row else holder
        return await super().complete_lease(key, tokens, generation=generation, holder=holder, metadata=metadata)


@_fault("completion over newer tokens", "stale completion", *_LOST)
class _CompletesAnything(AnyBackend):
    async def complete_lease(
        self,
        key: TokenKey,
        tokens: SealedTokens,
        *,
        generation: int,
        holder: str,
        metadata: SealedMetadata | None = None,
    ) -> bool:
        await self.put(key, tokens, metadata=metadata)
        return True


@_fault("completion by the holder alone", "wrong refusal")
class _RefusesFormerHolder(AnyBackend):
    async def complete_lease(
        self,
        key: TokenKey,
        tokens: SealedTokens,
        *,
        generation: int,
        holder: str,
        metadata: SealedMetadata | None = None,
    ) -> bool:
        row = await self.get(key)
        if row is None or row.lease_holder != holder:
            return False
        return await super().complete_lease(key, tokens, generation=generation, holder=holder, metadata=metadata)


@_fault("rewrap of whatever is there", "mixed read", *_LOST)
class _RewrapsAnything(AnyBackend):
    async def rewrap(self, key: TokenKey, tokens: SealedTokens, *, generation: int) -> bool:
        await _network()
        row = await self.get(key)
        return row is not None and await super().rewrap(key, tokens, generation=row.generation)


@_fault("metadata written without a comparison", faults=UPDATE_FAULTS)
class _ReplacesAnyMetadata(AnyBackend):
    """Compares the stored metadata with what it reads itself, and not with what the caller has read."""

    async def set_metadata(self, key: TokenKey, metadata: SealedMetadata, *, replacing: bytes | None) -> bool:
        row = await self.get(key)
        return row is not None and await super().set_metadata(key, metadata, replacing=row.metadata.value)
