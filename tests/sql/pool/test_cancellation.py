"""What a cancelled caller of the pool leaves behind: nothing that others miss."""

from __future__ import annotations

import asyncio

import pytest

from support.fake_driver import DriverError, FakeServer, acquired, acquiring
from support.waitless_loop import everybody_waits, run_waitless
from tokenstore.cancellation import FINISH_GRACE
from tokenstore_sql.connections import pool as pool_module


def test_who_is_cancelled_when_handed_a_connection_passes_it_on() -> None:
    """Both in one turn of the loop: the next in line gets it; without one, it is idle."""

    async def main() -> None:
        pool = FakeServer().pool()
        connection = await acquired(pool)
        first, second = acquiring(pool), acquiring(pool)
        await everybody_waits()
        await pool.release(connection)
        first.cancel()
        assert await second is connection
        assert first.cancelled()
        third = acquiring(pool)
        await everybody_waits()
        await pool.release(connection)
        third.cancel()
        await everybody_waits()
        assert (pool.open, pool.in_use) == (1, 0)

    run_waitless(main)


def test_who_is_cancelled_when_allowed_to_open_one_passes_that_on() -> None:
    """A lost connection lets the first in line open another; cancelled in that turn, he leaves it to the second."""

    async def main() -> None:
        server = FakeServer()
        pool = server.pool()
        connection = await acquired(pool)
        first, second = acquiring(pool), acquiring(pool)
        await everybody_waits()
        connection.dead = True
        _ = pool.put_back(connection)
        first.cancel()
        assert (await second).number == 2
        assert first.cancelled()
        assert (pool.open, pool.in_use, pool._opening) == (1, 1, 0)

    run_waitless(main)


@pytest.mark.parametrize("someone_waits", [False, True])
def test_a_connection_that_is_opened_for_nobody_serves_the_next(someone_waits: bool) -> None:
    """Its caller is cancelled at once; what is opened goes to who waits for it, or becomes idle."""

    async def main() -> None:
        server = FakeServer()
        pool = server.pool()
        opens = asyncio.Event()
        server.answers = [opens]
        caller = acquiring(pool)
        await everybody_waits()
        waiters = [acquiring(pool)] if someone_waits else []
        await everybody_waits()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        opens.set()
        await everybody_waits()
        assert pool.open == 1
        assert pool.in_use == int(someone_waits)
        connection = await waiters[0] if waiters else await acquired(pool)
        assert server.made == [connection]

    run_waitless(main)


def test_a_failure_to_open_lets_the_next_in_line_try() -> None:
    """Whoever was to have it is told what happened; so is nobody else."""

    async def main() -> None:
        server = FakeServer()
        pool = server.pool()
        opens = asyncio.Event()
        server.answers = [opens, DriverError, asyncio.CancelledError]
        first = acquiring(pool)
        await everybody_waits()
        second, third, fourth = acquiring(pool), acquiring(pool), acquiring(pool)
        await everybody_waits()
        opens.set()
        connection = await first
        connection.dead = True
        await pool.release(connection)
        with pytest.raises(DriverError):
            await second
        with pytest.raises(asyncio.CancelledError):
            await third
        assert (await fourth).number == 2

    run_waitless(main)


def test_an_opening_that_hangs_ends_and_lets_the_next_in_line_try() -> None:
    """Drivers have timeouts of their own; this is the last resort."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = FakeServer()
        server.answers = [asyncio.Event()]
        pool = server.pool(timeout=60.0)
        started = loop.time()
        first, second = acquiring(pool), acquiring(pool)
        with pytest.raises(TimeoutError):
            await first
        assert loop.time() == pytest.approx(started + pool_module._OPEN_TIMEOUT)
        assert (await second).number == 1

    run_waitless(main)


def test_a_rollback_that_is_cancelled_keeps_neither_connection_nor_slot() -> None:
    """The clean-up has a moment to end; then the connection is given up, and another can be opened."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = FakeServer()
        pool = server.pool()
        connection = await acquired(pool, transactional=True)
        connection.hang["ROLLBACK"] = asyncio.Event()
        leaving = asyncio.create_task(pool.release(connection))
        waiter = acquiring(pool)
        await everybody_waits()
        started = loop.time()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert loop.time() == pytest.approx(started + FINISH_GRACE)
        assert (await waiter).number == 2
        await everybody_waits()
        assert connection.closed
        assert (pool.open, pool.in_use) == (1, 1)

    run_waitless(main)


def test_a_rollback_that_ends_within_its_moment_keeps_the_connection() -> None:
    """Cancelled or not, the caller leaves a connection without a transaction."""

    async def main() -> None:
        pool = FakeServer().pool()
        connection = await acquired(pool, transactional=True)
        connection.hang["ROLLBACK"] = asyncio.Event()
        leaving = asyncio.create_task(pool.release(connection))
        await everybody_waits()
        leaving.cancel()
        await everybody_waits()
        connection.hang["ROLLBACK"].set()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert await acquired(pool) is connection
        assert connection.sent == ["BEGIN", "ROLLBACK"]

    run_waitless(main)


@pytest.mark.parametrize("statement", ["BEGIN", "SELECT 1"])
def test_who_is_cancelled_while_a_connection_is_made_ready_keeps_nothing(statement: str) -> None:
    """A statement without an answer leaves a connection that nobody can use."""

    async def main() -> None:
        pool = FakeServer().pool()
        connection = await acquired(pool)
        await pool.release(connection)
        await asyncio.sleep(pool_module._TRUSTED + 1)
        connection.hang[statement] = asyncio.Event()
        caller = acquiring(pool, transactional=statement == "BEGIN", write=True)
        await everybody_waits()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await everybody_waits()
        assert connection.closed
        assert (pool.open, pool.in_use) == (0, 0)

    run_waitless(main)
