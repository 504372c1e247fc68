"""Tests of resealing, watching and calls at the same time."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from tokenstore.protocol import Backend, SupportsWatching
from tokenstore.records import Failure, SealedTokens, TokenKey
from tokenstore.testing.conformance._helpers import (
    KEY,
    LONG,
    THIRD,
    TIMEOUT,
    each_operation,
    read_row,
    sealed,
    store_row,
    without_times,
)
from tokenstore.testing.conformance._testbed import Testbed, on_one_backend, on_two_backends


class ConcurrencyTests(Testbed):
    """Tests of resealing, watching and calls at the same time."""

    @on_one_backend
    async def test_rewrap_changes_only_the_sealed_values(self, backend: Backend) -> None:
        """Generation, lease, failure and times stay, so that a lease holder can still end its lease."""
        generation = await store_row(backend, tag="old")
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        before = await read_row(backend)
        anew = sealed("anew", access_token_expiry_known=False)
        assert await backend.rewrap(KEY, anew, generation=generation) is True
        kept = replace(
            anew,
            access_token_expires_at=before.tokens.access_token_expires_at,
            refresh_token_expires_at=before.tokens.refresh_token_expires_at,
            access_token_expiry_known=before.tokens.access_token_expiry_known,
        )
        record = await read_row(backend)
        assert without_times(record) == without_times(replace(before, tokens=kept))
        assert record.lease_expires_in is not None
        assert before.lease_expires_in is not None
        assert LONG - TIMEOUT < record.lease_expires_in <= before.lease_expires_in
        assert await backend.release_lease(KEY, generation=generation, holder="h", failure=Failure("invalid_grant"))
        assert await backend.rewrap(KEY, sealed("again"), generation=generation) is True
        assert (await read_row(backend)).failure == Failure("invalid_grant")

    @on_one_backend
    async def test_rewrap_does_not_replace_newer_tokens(self, backend: Backend) -> None:
        assert await backend.rewrap(KEY, sealed(), generation=1) is False
        assert await backend.get(KEY) is None
        generation = await store_row(backend, tag="old")
        await backend.put(KEY, sealed("newer"))
        assert await backend.rewrap(KEY, sealed("stale"), generation=generation) is False
        assert (await read_row(backend)).tokens == sealed("newer")

    # Waiting while another holder has the lease

    @on_two_backends()
    async def test_watch_returns_in_time_and_holds_no_connection(self, backend: Backend, other: Backend) -> None:
        """40 watchers of one row, or of a row that does not exist, do not delay reads, and can be cancelled."""
        if not isinstance(backend, SupportsWatching):
            return
        generation = await store_row(backend)
        assert await other.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        for key in (KEY, THIRD):  # there is no row for THIRD
            async with asyncio.timeout(3):
                await asyncio.gather(*(backend.watch(key) for _ in range(40)))
        watching = [asyncio.ensure_future(backend.watch(KEY)) for _ in range(40)]
        await asyncio.sleep(0)
        async with asyncio.timeout(2):
            await asyncio.gather(*(backend.get(KEY) for _ in range(8)))
        for watch in watching[::2]:
            watch.cancel()
        await asyncio.wait(watching, timeout=3)
        assert all(watch.done() for watch in watching)
        await backend.put(KEY, sealed("b"))
        assert (await read_row(other)).tokens == sealed("b")

    # Concurrent callers

    @on_one_backend
    async def test_a_write_does_not_block_the_event_loop(self, backend: Backend) -> None:
        """While a row is written, other tasks run. A driver's calls that block belong into a thread."""
        if self.in_memory:
            return
        await store_row(backend)
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        for _ in range(10):
            before = turns
            await backend.put(KEY, sealed())
            assert turns > before, "no other task ran during the write"
        counting.cancel()
        await asyncio.wait([counting])

    @on_two_backends()
    async def test_every_concurrent_put_gets_its_own_generation(self, backend: Backend, other: Backend) -> None:
        """After 32 concurrent puts of one row, its generation has grown by 32."""
        generation = await store_row(backend)
        await asyncio.gather(*((backend, other)[i % 2].put(KEY, sealed(str(i))) for i in range(32)))
        record = await read_row(backend)
        assert record.generation == generation + 32
        assert record.tokens in [sealed(str(i)) for i in range(32)]

    @on_two_backends()
    async def test_concurrent_first_puts_make_one_row(self, backend: Backend, other: Backend) -> None:
        for number in range(3):
            key = TokenKey("github", f"new-{number}")
            await asyncio.gather(*((backend, other)[i % 2].put(key, sealed(str(i))) for i in range(8)))
            assert (await read_row(backend, key)).tokens in [sealed(str(i)) for i in range(8)]
            assert len(await backend.scan(user_id=key.user_id, limit=3)) == 1

    @on_two_backends()
    async def test_a_read_never_mixes_two_writes(self, backend: Backend, other: Backend) -> None:
        await store_row(backend, tag="0")
        versions = [sealed(str(i), access_token=str(i).encode() * 20_000) for i in range(12)]
        seen: list[SealedTokens] = []
        written = asyncio.Event()

        async def read() -> None:
            while not written.is_set():
                seen.append((await read_row(other)).tokens)
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            for tokens in versions:
                await backend.put(KEY, tokens)
            written.set()
        assert set(seen) <= {sealed("0"), *versions}

    @on_one_backend
    async def test_cancelled_calls_release_locks_and_connections(self, backend: Backend) -> None:
        """A call is cancelled after any number of steps of the event loop; the row is always one complete write."""
        generation = await store_row(backend)
        attempts = 0
        for steps in range(0, 40, 2):
            for operation in each_operation(backend)[:2]:
                task = asyncio.ensure_future(operation())
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                attempts += 1
        # The database may still execute the statement of a cancelled call, so the number of writes is not known.
        async with asyncio.timeout(TIMEOUT):
            await asyncio.gather(*(backend.get(KEY) for _ in range(32)))
            await asyncio.gather(*(backend.put(KEY, sealed("d")) for _ in range(8)))
        record = await read_row(backend)
        assert record.tokens == sealed("d")
        assert generation + 8 <= record.generation <= generation + 8 + attempts
