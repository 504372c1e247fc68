"""Backends with a fault: each is a real backend with one method that is overridden by a plausible wrong one.

contract/test_broken_backends.py shows that the property tests find each fault, and that the shipped conformance tests
find those of ``KIT_FAULTS``. ``_network`` gives other tasks time to run between two statements, as a slow network does.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Executable, Select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tokenstore.errors import BackendError, LockTimeoutError, StoreClosedError
from tokenstore.leases import written
from tokenstore.protocol import BackendTransaction
from tokenstore.records import DueKey, DueRow, Failure, SealedMetadata, SealedRecord, SealedTokens, TokenKey
from tokenstore.registry import backend_for_url
from tokenstore.value_records import SealedValue, ValueKey, ValueRow
from tokenstore_memory import MemoryBackend
from tokenstore_sql.backend import SQLBackend
from tokenstore_sql.dialect import LockScope
from tokenstore_sql.rows import Rows
from tokenstore_sql.sqlite.busy import until_not_busy
from tokenstore_sql.sqlite.dialect import SQLiteDialect
from tokenstore_sql.statements.grammar import Grammar

__all__ = ["FAULTS", "KIT_FAULTS", "UPDATE_FAULTS", "Fault", "fault_named"]

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
        kinds: The kinds of violation that the property tests may report for it; of a fault of ``KIT_FAULTS``, the
            conformance tests that fail.
        marks: The pytest markers of the backends that are tested with it.
        breaks: Makes the broken class from a backend's class.
    """

    name: str
    kinds: frozenset[str]
    marks: tuple[str, ...]
    breaks: Callable[[type[Any]], type[Any]] = field(repr=False)

    def backend(self, url: str, **options: object) -> Any:
        """Make the backend for a URL, with this fault."""
        return self.breaks(type(backend_for_url(url, {}))).from_url(url, options)

    def __reduce__(self) -> tuple[Any, ...]:
        return fault_named, (self.name, self.marks[0])  # pickled by name for another process


FAULTS: list[Fault] = []
UPDATE_FAULTS: list[Fault] = []
"""Faults in updates of metadata, which the generated programs do not make: races of updates find them."""
KIT_FAULTS: list[Fault] = []
"""Faults that the generated programs cannot find: the conformance tests find them."""


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
    [fault] = [fault for fault in (*FAULTS, *UPDATE_FAULTS, *KIT_FAULTS) if fault.name == name and mark in fault.marks]
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


# -- faults that the conformance tests find ------------------------------------------------------------

_kit_fault = functools.partial(_fault, on=("memory", "sqlite"), faults=KIT_FAULTS)


@_kit_fault("insert that keeps an empty row's metadata", "test_an_insert_replaces_the_metadata_of_an_empty_row")
class _InsertKeepsMetadata(AnyBackend):
    async def insert(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> bool:
        row = await self.get(key)
        kept = row.metadata if metadata is None and row is not None else metadata
        return await super().insert(key, tokens, metadata=kept)


@_kit_fault("failure that is cleared at any age", "test_a_failure_is_cleared_if_it_is_old_enough")
class _ClearsAtAnyAge(AnyBackend):
    async def clear_failure(self, key: TokenKey, *, min_age: float = 0.0, as_of: int | None = None) -> bool:
        return await super().clear_failure(key)


@_kit_fault("failure that is cleared whenever it came", "test_a_failure_is_cleared_if_it_came_before_a_time")
class _ClearsWheneverItCame(AnyBackend):
    async def clear_failure(self, key: TokenKey, *, min_age: float = 0.0, as_of: int | None = None) -> bool:
        return await super().clear_failure(key, min_age=min_age)


@_fault(
    "dead row without a refresh token made due",
    "test_a_dead_row_whose_failure_is_cleared_is_due_again",
    on=("memory",),
    faults=KIT_FAULTS,
)
class _IssuedTokensDueAgain(AnyBackend):
    async def clear_failure(self, key: TokenKey, *, min_age: float = 0.0, as_of: int | None = None) -> bool:
        cleared = await super().clear_failure(key, min_age=min_age, as_of=as_of)
        if cleared:
            stored = self._rows[key]
            self._rows[key] = replace(stored, due_at=stored.row.tokens.due_at)
        return cleared


@_kit_fault("later pages that repeat the sweep's time", "test_a_later_page_tells_when_it_was_read")
class _DueAsOfArgument(AnyBackend):
    async def scan_due(
        self, *, provider: str, within: float, as_of: int | None = None, after: DueKey | None = None, limit: int
    ) -> list[DueRow]:
        rows = await super().scan_due(provider=provider, within=within, as_of=as_of, after=after, limit=limit)
        return rows if as_of is None else [replace(row, as_of=as_of) for row in rows]


@_kit_fault("purge without a limit", "test_purge_values_deletes_expired_values_in_batches")
class _PurgesAll(AnyBackend):
    async def purge_values(self, *, limit: int) -> int:
        return await super().purge_values(limit=1000)


@_fault(
    "expired value that counts when it is replaced",
    "test_a_value_put_after_an_earlier_one_expired_is_a_new_one",
    on=("memory",),
    faults=KIT_FAULTS,
)
class _ReplacesExpiredValue(AnyBackend):
    async def put_value(self, key: ValueKey, value: SealedValue, *, ttl: float | None) -> None:
        earlier = self._stored.get(key)
        await super().put_value(key, value, ttl=ttl)
        if earlier is not None:
            self._stored[key] = replace(self._stored[key], created_at=earlier.created_at)


@_kit_fault("driver's exception chained", "test_operations_after_aclose_raise_store_closed_error")
class _ChainsDriverError(AnyBackend):
    async def get(self, key: TokenKey) -> SealedRecord | None:
        try:
            return await super().get(key)
        except StoreClosedError as error:
            raise error from sqlite3.ProgrammingError("Cannot operate on a closed database.")


@_fault(
    "driver called in the event loop's thread",
    "test_a_write_does_not_block_the_event_loop",
    on=("memory",),
    faults=KIT_FAULTS,
)
class _Blocks(AnyBackend):
    """As the memory backend does, which has no driver."""


# -- and those that ProcessConformance finds, on SQLite -----------------------------------------------

_process_fault = functools.partial(_fault, on=("sqlite",), faults=KIT_FAULTS)
_LOCKS: dict[str, asyncio.Lock] = {}


@_process_fault(
    "row locks in one process's memory",
    "test_increments_under_the_lock_are_not_lost",
    "test_the_lock_of_a_killed_process_is_released",
)
class _LocksInOneProcess(AnySQLBackend):
    """Its backend objects in one process exclude each other, so that no other conformance test finds the fault."""

    def __init_subclass__(cls) -> None:
        cls.dialect_class = type("BrokenDialect", (_NoBeginDialect, cls.dialect_class), {})

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        async with _LOCKS.setdefault(str(self), asyncio.Lock()), super().transaction() as transaction:
            yield transaction


def _made(folder: Path) -> bool:
    with suppress(FileExistsError):
        folder.mkdir()
        return True
    return False


@_process_fault("lock that outlives its process", "test_the_lock_of_a_killed_process_is_released")
class _LockFile(AnySQLBackend):
    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        lock, deadline = Path(f"{str(self).split('///')[1].rstrip('>')}.lock"), time.monotonic() + 2
        while not _made(lock):
            if time.monotonic() > deadline:
                raise LockTimeoutError("the row stayed locked")
            await asyncio.sleep(0.01)
        try:
            async with super().transaction() as transaction:
                yield transaction
        finally:
            lock.rmdir()  # noqa: ASYNC240


@_process_fault("insert that reads, then writes", "test_one_process_inserts_a_row")
class _ReadsThenInserts(AnyBackend):
    async def insert(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> bool:
        if await self.get(key) is not None:
            return False
        await self.put(key, tokens, metadata=metadata)
        return True


@_process_fault("put that reads, then writes", "test_every_put_gets_its_own_generation")
class _ReadsThenPuts(_ReadThenWrite):
    pass


@_process_fault("claim that reads, then writes", "test_one_process_gets_a_lease")
class _ReadsThenClaims(AnyBackend):
    async def claim_lease(self, key: TokenKey, *, generation: int, holder: str, duration: float) -> bool:
        row = await self.get(key)
        if row is None or row.generation != generation or row.lease_holder is not None:
            return False
        _ = await super().claim_lease(key, generation=generation, holder=holder, duration=duration)
        return True


@_process_fault("pop that reads, then deletes", "test_one_process_pops_a_value")
class _ReadsThenPops(AnyBackend):
    async def pop_value(self, key: ValueKey) -> ValueRow | None:
        row = await self.get_value(key)
        if row is not None:
            _ = await super().pop_value(key)
        return row


@_process_fault("setup that looks, then creates", "test_setup_from_several_processes_at_once")
class _UnlockedSetupDialect(AnySQLiteDialect):
    @asynccontextmanager
    async def exclusive_setup(self, connection: AsyncConnection) -> AsyncIterator[None]:
        _ = await connection.begin()
        yield


@_process_fault("event loop of the first call kept", "test_a_backend_can_be_used_in_another_event_loop")
class _KeepsFirstLoop(AnyBackend):
    async def get(self, key: TokenKey) -> SealedRecord | None:
        loop = vars(self).setdefault("_loop", asyncio.get_running_loop())
        if loop.is_closed():
            raise BackendError("the event loop is closed")
        return await super().get(key)


@_process_fault("connection kept in a forked process", "test_a_backend_can_be_used_after_a_fork")
class _KeepsConnectionAfterFork(AnyBackend):
    async def get(self, key: TokenKey) -> SealedRecord | None:
        if vars(self).setdefault("_pid", os.getpid()) != os.getpid():
            raise BackendError("the connection's other end reads what two processes send")
        return await super().get(key)
