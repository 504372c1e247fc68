"""Tests of a backend's row locks and transactions."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from tokenstore.errors import ConflictError, LockTimeoutError
from tokenstore.protocol import BackendTransaction, SupportsRowLocks
from tokenstore.records import NO_METADATA, SealedMetadata, SealedRecord, SealedTokens, TokenKey
from tokenstore.testing.conformance._empty_rows import LockedEmptyRowTests
from tokenstore.testing.conformance._helpers import (
    KEY,
    LONG,
    OTHER,
    PAUSE,
    SHORT,
    THIRD,
    TIMEOUT,
    LockingBackend,
    assert_cannot_change,
    assert_unchained,
    assert_waiting,
    at_least,
    put_all,
    raises,
    read_row,
    read_rows,
    sealed,
    store_row,
    until,
    wait_for_expiry,
    without_times,
)
from tokenstore.testing.conformance._testbed import on_two_backends


class _RolledBack(Exception):  # not an error: ends a transaction with a roll-back
    pass


class RowLockConformance(LockedEmptyRowTests):
    """The tests of :class:`tokenstore.protocol.SupportsRowLocks` and :class:`tokenstore.protocol.BackendTransaction`.

    The backend must accept the option ``lock_timeout``, in seconds.
    """

    @on_two_backends()
    async def test_is_a_backend_with_row_locks(self, backend: LockingBackend, other: LockingBackend) -> None:
        for each in (backend, other):
            assert isinstance(each, SupportsRowLocks)
            async with each.transaction() as transaction:
                assert isinstance(transaction, BackendTransaction)

    @on_two_backends()
    async def test_a_transaction_reads_its_own_writes_and_others_read_them_after_the_commit(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """The isolation level is READ COMMITTED, and reads never wait for a row's lock."""
        generation = await store_row(backend, tag="old")
        await store_row(backend, OTHER)
        async with backend.transaction() as transaction:
            locked = await transaction.lock(KEY)
            assert locked is not None
            assert without_times(locked) == without_times(await read_row(other))
            await put_all(transaction, {KEY: sealed("new"), THIRD: sealed("new")})
            assert await transaction.delete(OTHER) is True
            assert await transaction.delete(TokenKey("no", "body")) is False
            own = await read_rows(transaction, KEY, OTHER, THIRD)
            assert [record and record.tokens for record in own] == [sealed("new"), None, sealed("new")]
            assert own[0] is not None
            assert own[0].generation == generation + 1
            relocked = await transaction.lock(KEY)
            assert relocked is not None
            assert relocked.tokens == sealed("new")
            async with asyncio.timeout(2):
                seen = await read_rows(other, KEY, OTHER, THIRD)
                assert [record and record.tokens for record in seen] == [sealed("old"), sealed(), None]
                assert [row.key for row in await other.scan(limit=5)] == [KEY, OTHER]
        assert [row.key for row in await other.scan(limit=5)] == [KEY, THIRD]
        record = await read_row(other)
        assert (record.tokens, record.generation) == (sealed("new"), generation + 1)

    @on_two_backends()
    async def test_a_transaction_reads_what_others_commit(self, backend: LockingBackend, other: LockingBackend) -> None:
        """An earlier read of the row in the same transaction hides no later commit, and prevents no write."""
        generation = await store_row(backend, tag="old")
        async with backend.transaction() as transaction:
            assert (await read_row(transaction)).tokens == sealed("old")
            await other.put(KEY, sealed("new"))
            assert (await read_row(transaction)).tokens == sealed("new")
            locked = await transaction.lock(KEY)
            assert locked is not None
            assert locked.tokens == sealed("new")
            await transaction.put(KEY, sealed("own"))
        record = await read_row(other)
        assert (record.tokens, record.generation) == (sealed("own"), generation + 2)

    @on_two_backends()
    async def test_an_error_rolls_back(self, backend: LockingBackend, other: LockingBackend) -> None:
        """The caller's exception is raised unchanged; nothing is stored, and no lock or connection stays taken."""
        await store_row(backend, tag="old")
        before = await read_row(backend)
        for _ in range(12):  # more transactions than a usual pool has connections
            with pytest.raises(KeyError, match="the caller's own"):  # noqa: PT012
                async with backend.transaction() as transaction:
                    await transaction.lock(KEY)
                    await put_all(transaction, {KEY: sealed("new"), OTHER: sealed("new")})
                    await transaction.delete(KEY)
                    raise KeyError("the caller's own")
        found, missing = await read_rows(other, KEY, OTHER)
        assert missing is None
        assert found is not None
        assert without_times(found) == without_times(before)
        async with asyncio.timeout(5):
            await other.put(KEY, sealed("next"))

    @on_two_backends()
    async def test_metadata_is_replaced_in_a_transaction(self, backend: LockingBackend, other: LockingBackend) -> None:
        """The writes are seen in the transaction, committed with it, and undone with it."""
        first, second = SealedMetadata(b"first", "k"), SealedMetadata(b"second", "k")
        await store_row(backend)
        with pytest.raises(KeyError, match="the caller's own"):  # noqa: PT012
            async with backend.transaction() as transaction:
                assert await transaction.set_metadata(KEY, first, replacing=None) is True
                assert await transaction.set_metadata(KEY, second, replacing=None) is False
                assert await transaction.set_metadata(THIRD, second, replacing=None) is False
                assert (await read_row(transaction)).metadata == first
                assert await transaction.set_metadata(KEY, second, replacing=b"first") is True
                await transaction.put(OTHER, sealed(), metadata=first)
                raise KeyError("the caller's own")
        assert (await read_row(other)).metadata == NO_METADATA
        assert await other.get(OTHER) is None
        async with backend.transaction() as transaction:
            assert await transaction.set_metadata(KEY, first, replacing=None) is True
            await transaction.put(KEY, sealed("new"))
            await transaction.put(OTHER, sealed(), metadata=first)
            await transaction.put(OTHER, sealed(), metadata=second)
            assert await transaction.insert(THIRD, sealed(), metadata=second) is True
        found = [(await read_row(other, key)).metadata for key in (KEY, OTHER, THIRD)]
        assert found == [first, second, second]

    @on_two_backends()
    async def test_a_waiter_reads_what_the_lock_holder_stored(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """A caller that waited never gets the old row; if the lock holder deleted the row, the caller gets None."""
        generation = await store_row(backend, tag="0")
        await store_row(backend, OTHER)

        async def wait(key: TokenKey) -> tuple[SealedRecord | None, SealedRecord | None]:
            async with other.transaction() as transaction:
                return await transaction.lock(key), await transaction.get(key)

        async with backend.transaction() as transaction:
            for key in (KEY, OTHER):
                await transaction.lock(key)
            waiters = [asyncio.create_task(wait(key)) for key in (KEY, OTHER)]
            await assert_waiting(*waiters)
            await transaction.put(KEY, sealed("1"))
            await transaction.delete(OTHER)
            await assert_waiting(*waiters)
        (locked, read), gone = await asyncio.gather(*waiters)
        assert locked is not None
        assert read is not None
        assert (locked.tokens, locked.generation) == (sealed("1"), generation + 1)
        assert without_times(read) == without_times(locked)
        assert gone == (None, None)

    @on_two_backends()
    async def test_increments_under_the_lock_are_not_lost(self, backend: LockingBackend, other: LockingBackend) -> None:
        """Twenty tasks lock the row, add one to a number in it, and write it: the number becomes 20."""
        await backend.put(KEY, sealed(access_token_expires_at=0))

        async def add_one(mine: LockingBackend) -> None:
            async with mine.transaction() as transaction:
                record = await transaction.lock(KEY)
                assert record is not None
                number = record.tokens.access_token_expires_at
                assert number is not None
                await asyncio.sleep(0)
                await transaction.put(KEY, replace(record.tokens, access_token_expires_at=number + 1))

        await asyncio.gather(*(add_one((backend, other)[i % 2]) for i in range(20)))
        assert (await read_row(backend)).tokens.access_token_expires_at == 20

    @on_two_backends()
    async def test_writes_outside_a_transaction_wait_for_the_lock(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """After the wait a put or delete takes effect; a claim or rewrap is refused if the lock holder wrote tokens."""
        keys = {name: TokenKey("github", name) for name in ("put", "delete", "changed", "unchanged", "rewrap")}
        await put_all(backend, {key: sealed("old") for key in keys.values()})
        generations = {name: (await read_row(backend, key)).generation for name, key in keys.items()}

        def claim(name: str) -> Awaitable[bool]:
            return other.claim_lease(keys[name], generation=generations[name], holder="h", duration=1.0)

        async with backend.transaction() as transaction:
            for key in keys.values():
                await transaction.lock(key)
            tasks = {
                "put": asyncio.ensure_future(other.put(keys["put"], sealed("lone"))),
                "delete": asyncio.ensure_future(other.delete(keys["delete"])),
                "changed": asyncio.ensure_future(claim("changed")),
                "unchanged": asyncio.ensure_future(claim("unchanged")),
                "rewrap": asyncio.ensure_future(
                    other.rewrap(keys["rewrap"], sealed("stale"), generation=generations["rewrap"])
                ),
            }
            await assert_waiting(*tasks.values())
            await put_all(transaction, {keys[name]: sealed("held") for name in ("put", "delete", "changed", "rewrap")})
            await assert_waiting(*tasks.values())
            held = time.monotonic()
        outcomes = dict(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))
        assert outcomes == {"put": None, "delete": True, "changed": False, "unchanged": True, "rewrap": False}
        record = await read_row(backend, keys["unchanged"])
        elapsed = time.monotonic() - held
        assert record.lease_expires_in is not None
        # The lease must be granted by the clock after the wait of two pauses; otherwise it would expire too soon.
        assert record.lease_expires_in >= 1.0 - elapsed - PAUSE
        record = await read_row(backend, keys["put"])
        assert (record.tokens, record.generation) == (sealed("lone"), generations["put"] + 2)
        assert await backend.get(keys["delete"]) is None
        assert (await read_row(backend, keys["rewrap"])).tokens == sealed("held")

    @on_two_backends(lock_timeout=1)
    async def test_waiting_for_a_lock_ends_with_lock_timeout_error(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """The call ends after ``lock_timeout`` and stores nothing; once the lock is free, the row can be locked."""
        await store_row(backend, OTHER, "old")

        async def lock() -> None:
            async with other.transaction() as transaction:
                await transaction.lock(OTHER)

        async def lone_put() -> None:
            await other.put(OTHER, sealed("timed out"))

        async def bounded(operation: Callable[[], Awaitable[None]]) -> float:
            started = time.monotonic()
            with raises(LockTimeoutError) as caught:
                await operation()
            assert isinstance(caught.value, TimeoutError)
            return time.monotonic() - started

        async with backend.transaction() as transaction:
            await transaction.lock(OTHER)
            for waited in await asyncio.gather(bounded(lock), bounded(lone_put)):
                assert 0.8 <= waited <= 2.5
            await transaction.put(OTHER, sealed("held"))
        async with asyncio.timeout(2):
            async with other.transaction() as transaction:
                locked = await transaction.lock(OTHER)
        assert locked is not None
        assert locked.tokens == sealed("held"), "the lock holder's write is missing"

    @on_two_backends()
    async def test_a_cancelled_waiter_releases_lock_and_connection(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """A call that waits for a row's lock and is cancelled ends within a second and stores nothing."""
        await store_row(backend)

        async def lock() -> None:
            async with other.transaction() as transaction:
                await transaction.lock(KEY)

        async with backend.transaction() as transaction:
            await transaction.lock(KEY)
            waiters = [asyncio.create_task(lock()) for _ in range(12)]
            waiters.append(asyncio.ensure_future(other.put(KEY, sealed("cancelled"))))
            await assert_waiting(*waiters)
            for waiter in waiters:
                waiter.cancel()
            _, pending = await asyncio.wait(waiters, timeout=1)
            assert not pending
            assert all(waiter.cancelled() for waiter in waiters)
            await transaction.put(KEY, sealed("held"))
        assert (await read_row(other)).tokens == sealed("held")
        async with asyncio.timeout(5):
            await lock()

    @on_two_backends()
    async def test_cancellation_in_a_transaction_rolls_back(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        await store_row(backend, tag="old")
        inside = asyncio.Event()

        async def hold() -> None:
            async with backend.transaction() as transaction:
                await transaction.lock(KEY)
                await transaction.put(KEY, sealed("new"))
                inside.set()
                await asyncio.Event().wait()

        for _ in range(12):
            inside.clear()
            holder = asyncio.create_task(hold())
            await inside.wait()
            holder.cancel()
            await asyncio.wait([holder], timeout=1)
            assert holder.cancelled()
            assert (await read_row(other)).tokens == sealed("old")
        async with asyncio.timeout(5):
            await other.put(KEY, sealed("next"))

    @on_two_backends()
    async def test_a_transaction_cancelled_at_any_step_stores_all_or_nothing(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """It is committed or rolled back as a whole, and leaves no lock for which the next transaction would wait."""
        await store_row(backend, tag="old")

        async def replace_row() -> None:
            async with backend.transaction() as transaction:
                await transaction.lock(KEY)
                await put_all(transaction, {KEY: sealed("new"), OTHER: sealed("new")})

        for steps in range(0, 60, 4):
            task = asyncio.create_task(replace_row())
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            async with asyncio.timeout(5), other.transaction() as transaction:
                locked = await transaction.lock(KEY)
                assert locked is not None
                found = await transaction.get(OTHER)
                assert (locked.tokens == sealed("new")) is (found is not None), "only one of the two rows was stored"
                await transaction.put(KEY, sealed("old"))
                await transaction.delete(OTHER)

    @on_two_backends()
    async def test_two_transactions_can_lock_a_missing_row_and_insert(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """Both find no row, then both insert without an error, the same row or a row each."""
        found: list[SealedRecord | None] = []

        async def first_insert(mine: LockingBackend, key: TokenKey, tag: str) -> None:
            async with mine.transaction() as transaction:
                found.append(await transaction.lock(key))
                # Unless the backend locks more than a row, both transactions get here before either writes.
                together.release()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(both.wait(), PAUSE)
                await transaction.put(key, sealed(tag))

        for keys in ((KEY, KEY), (OTHER, THIRD)):
            together, both = asyncio.Semaphore(0), asyncio.Event()

            async def meet(together: asyncio.Semaphore = together, both: asyncio.Event = both) -> None:
                for _ in range(2):
                    await together.acquire()
                both.set()

            await asyncio.gather(first_insert(backend, keys[0], "1"), first_insert(other, keys[1], "2"), meet())
            for key in keys:
                assert (await read_row(backend, key)).tokens in (sealed("1"), sealed("2"))
        assert found.count(None) >= 3, "more than one of the four locking reads found a row"

    @on_two_backends()
    async def test_an_insert_in_a_transaction(self, backend: LockingBackend, other: LockingBackend) -> None:
        """It shows the row to others after the commit, does nothing if there is a row, and reads the clock."""
        async with backend.transaction() as transaction:
            before = await transaction.clock()
            assert await transaction.lock(KEY) is None
            assert await transaction.insert(KEY, sealed("a")) is True
            assert await transaction.insert(KEY, sealed("b")) is False
            assert (await read_row(transaction)).tokens == sealed("a")
            assert await other.get(KEY) is None
        assert (await read_row(other)).tokens == sealed("a")
        assert before <= (await read_row(other)).created_at
        async with other.transaction() as transaction:
            assert await transaction.insert(KEY, sealed("c")) is False
            assert await transaction.insert(OTHER, sealed("d")) is True
            await transaction.rollback()
        assert (await read_row(backend)).tokens == sealed("a")
        assert await backend.get(OTHER) is None

    @on_two_backends()
    async def test_an_insert_waits_for_the_insert_of_another_transaction(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """It succeeds if the other transaction is rolled back, and otherwise does nothing."""
        for commits in (False, True):
            inserting: asyncio.Task[bool] | None = None
            with contextlib.suppress(_RolledBack):
                async with backend.transaction() as transaction:
                    assert await transaction.insert(KEY, sealed("first")) is True
                    inserting = asyncio.ensure_future(other.insert(KEY, sealed("second")))
                    await assert_waiting(inserting)
                    if not commits:
                        raise _RolledBack
            assert inserting is not None
            assert await asyncio.wait_for(inserting, TIMEOUT) is not commits
            assert (await read_row(other)).tokens == sealed("first" if commits else "second")
            assert await other.delete(KEY)

    @on_two_backends(lock_timeout=1)
    async def test_a_deadlock_ends_with_an_error(self, backend: LockingBackend, other: LockingBackend) -> None:
        """Two transactions lock two rows in opposite orders: one or both raise, and a failed one stores nothing."""
        await put_all(backend, {KEY: sealed("old"), OTHER: sealed("old")})

        async def lock_both(mine: LockingBackend, keys: list[TokenKey], tag: str) -> None:
            async with mine.transaction() as transaction:
                for key in keys:
                    await transaction.lock(key)
                    await transaction.put(key, sealed(tag))
                    await asyncio.sleep(0.05)

        async with asyncio.timeout(6):
            outcomes = await asyncio.gather(
                lock_both(backend, [KEY, OTHER], "1"), lock_both(other, [OTHER, KEY], "2"), return_exceptions=True
            )
        for outcome in outcomes:
            if outcome is not None:
                assert isinstance(outcome, ConflictError | LockTimeoutError)
                assert_unchained(outcome)
        rows = [await read_row(backend, KEY), await read_row(backend, OTHER)]
        assert len({row.tokens for row in rows}) == 1
        assert (rows[0].tokens == sealed("old")) is (None not in outcomes)
        async with asyncio.timeout(2):
            await lock_both(other, [KEY, OTHER], "next")

    @on_two_backends()
    async def test_an_idle_transaction_takes_no_connection(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """Before their first call, 60 transactions can be open, which is more than a usual pool has connections."""
        await store_row(backend)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(60):
                await stack.enter_async_context(backend.transaction())
            async with asyncio.timeout(5):
                assert (await read_row(backend)).tokens == sealed()
                await other.put(KEY, sealed("b"))

    @on_two_backends()
    async def test_the_clock_is_read_after_waiting_for_the_lock(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """A lease that expires while a call waits for the row's lock counts as expired, for reads and completions."""
        generation = await store_row(backend, tag="old")
        await store_row(backend, OTHER, "old")
        assert await backend.claim_lease(KEY, generation=generation, holder="late", duration=SHORT)
        await wait_for_expiry(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="new", duration=2 * PAUSE)

        async def lock() -> SealedRecord | None:
            async with other.transaction() as transaction:
                return await transaction.lock(KEY)

        async with backend.transaction() as transaction:
            held = await transaction.lock(KEY)
            locking = asyncio.create_task(lock())
            await assert_waiting(locking)
            # Nothing is written, so the waiter reads the same row version as before the wait, where a stale time shows.
            await asyncio.sleep(2 * PAUSE)
        record = await locking
        assert record is not None
        assert held is not None
        assert record.as_of - held.as_of >= 2.5 * PAUSE * 1_000_000
        assert record.lease_expires_in is not None
        assert record.lease_expires_in < 0

        generation = await store_row(backend, tag="old")
        assert await backend.claim_lease(KEY, generation=generation, holder="new", duration=2 * PAUSE)
        async with backend.transaction() as transaction:
            await transaction.lock(KEY)
            completing = asyncio.ensure_future(
                other.complete_lease(KEY, sealed("late"), generation=generation, holder="late")
            )
            await asyncio.wait([completing], timeout=PAUSE)
            # A backend may also refuse without waiting, because the lease was live at that moment.
            refused_at_once = completing.done()
            await asyncio.sleep(2 * PAUSE)
        assert await completing is not refused_at_once
        assert (await read_row(backend)).generation == generation + (not refused_at_once)

    @on_two_backends()
    async def test_a_transaction_continues_after_rollback(self, backend: LockingBackend, other: LockingBackend) -> None:
        """``rollback()`` undoes all writes and releases all locks; it can be called several times."""
        generation = await store_row(backend, tag="old")
        async with backend.transaction() as transaction:
            await transaction.rollback()  # before the first statement
            for tag in "12":
                await transaction.lock(KEY)
                await put_all(transaction, {KEY: sealed("undone"), OTHER: sealed("undone")})
                await transaction.delete(KEY)
                await transaction.rollback()
                await transaction.rollback()
                # Other callers can lock and write without waiting, and this transaction reads what they wrote.
                async with asyncio.timeout(2):
                    async with other.transaction() as another:
                        locked = await another.lock(KEY)
                        assert locked is not None
                        assert locked.tokens == sealed("old" if tag == "1" else "1")
                    await other.put(KEY, sealed(tag))
                assert [record and record.tokens for record in await read_rows(transaction, KEY, OTHER)] == [
                    sealed(tag),
                    None,
                ]
            locked = await transaction.lock(KEY)
            assert locked is not None
            assert (locked.tokens, locked.generation) == (sealed("2"), generation + 2)
            writing = asyncio.ensure_future(other.put(KEY, sealed("last")))
            await assert_waiting(writing)
            await put_all(transaction, {KEY: sealed("kept"), THIRD: sealed("kept")})
        await writing
        found = await read_rows(other, KEY, OTHER, THIRD)
        assert [record and record.tokens for record in found] == [sealed("last"), None, sealed("kept")]
        assert (await read_row(other)).generation == generation + 4
        async with backend.transaction() as transaction:
            await transaction.put(KEY, sealed("undone"))
            await transaction.rollback()
        assert (await read_row(other)).tokens == sealed("last"), "the write before the rollback was stored"

    @on_two_backends()
    async def test_waiting_for_a_lease_with_rollbacks(self, backend: LockingBackend, other: LockingBackend) -> None:
        """As in the core: lock, find a live lease, roll back, and repeat until the lease holder has completed."""
        generation = await store_row(backend, tag="old")
        assert await other.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        tries = 0

        async def lock_unleased() -> SealedTokens:
            nonlocal tries
            async with backend.transaction() as transaction:
                while True:
                    record = await transaction.lock(KEY)
                    assert record is not None
                    if record.lease_holder is None:
                        return record.tokens
                    tries += 1
                    await transaction.rollback()
                    await asyncio.sleep(0.005)

        waiters = [asyncio.create_task(lock_unleased()) for _ in range(12)]  # more than a usual pool has connections
        await until(lambda: at_least(12, lambda: tries), "waiting transactions have found the lease 12 times")
        assert await other.complete_lease(KEY, sealed("new"), generation=generation, holder="h") is True
        async with asyncio.timeout(TIMEOUT):
            assert await asyncio.gather(*waiters) == [sealed("new")] * 12

    @on_two_backends()
    async def test_a_rollback_cancelled_at_any_step_is_complete(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """No write of the transaction is stored, and no lock or connection stays taken."""
        await store_row(backend, tag="old")

        async def undo() -> None:
            async with backend.transaction() as transaction:
                await transaction.lock(KEY)
                await transaction.put(KEY, sealed("undone"))
                begun.set()
                await transaction.rollback()

        for steps in range(12):
            begun = asyncio.Event()
            task = asyncio.create_task(undo())
            await begun.wait()
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task], timeout=1)
            assert task.done()
            async with asyncio.timeout(5), other.transaction() as transaction:
                locked = await transaction.lock(KEY)
                assert locked is not None
                assert locked.tokens == sealed("old")

    @on_two_backends()
    async def test_a_write_in_a_transaction_ends_a_lease_unless_rolled_back(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """A locking read returns the lease; after a roll-back the lease is unchanged."""
        generation = await store_row(backend)
        assert await other.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        with pytest.raises(KeyError):  # noqa: PT012
            async with backend.transaction() as transaction:
                locked = await transaction.lock(KEY)
                assert locked is not None
                assert locked.lease_holder == "h"
                await transaction.put(KEY, sealed("undone"))
                raise KeyError
        record = await read_row(backend)
        assert (record.tokens, record.generation, record.lease_holder) == (sealed(), generation, "h")
        async with backend.transaction() as transaction:
            await transaction.put(KEY, sealed("new"))
        await assert_cannot_change(other, generation, "h")
        assert (await read_row(backend)).lease_holder is None
