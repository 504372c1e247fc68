"""A cancelled caller of the pool loses no connection, no slot, and no other caller's place in the queue."""

from __future__ import annotations

import asyncio

import pytest

from support.fake_clock_loop import run_with_fake_clock, until_all_wait
from support.fake_driver import DriverError, FakeServer, acquired, acquiring
from tokenstore.cancellation import FINISH_GRACE
from tokenstore_sql.connections import pool as pool_module


def test_a_caller_cancelled_as_it_gets_a_connection_passes_it_to_the_next() -> None:
    """Both happen in one step of the event loop. The next waiting caller gets the connection, or it becomes idle."""

    async def main() -> None:
        pool = FakeServer().pool()
        connection = await acquired(pool)
        first, second = acquiring(pool), acquiring(pool)
        await until_all_wait()
        await pool.release(connection)
        first.cancel()
        assert await second is connection
        assert first.cancelled()
        third = acquiring(pool)
        await until_all_wait()
        await pool.release(connection)
        third.cancel()
        await until_all_wait()
        assert (pool.open, pool.in_use) == (1, 0)

    run_with_fake_clock(main)


def test_a_caller_cancelled_as_it_may_open_a_connection_leaves_that_to_the_next() -> None:
    """After a lost connection the first waiting caller may open another; it is cancelled in the same step."""

    async def main() -> None:
        server = FakeServer()
        pool = server.pool()
        connection = await acquired(pool)
        first, second = acquiring(pool), acquiring(pool)
        await until_all_wait()
        connection.dead = True
        _ = pool.put_back(connection)
        first.cancel()
        assert (await second).number == 2
        assert first.cancelled()
        assert (pool.open, pool.in_use, pool._opening) == (1, 1, 0)

    run_with_fake_clock(main)


@pytest.mark.parametrize("someone_waits", [False, True])
def test_a_connection_opened_for_a_cancelled_caller_serves_the_next(someone_waits: bool) -> None:
    """Once open, the connection goes to a waiting caller, or becomes idle."""

    async def main() -> None:
        server = FakeServer()
        pool = server.pool()
        opens = asyncio.Event()
        server.answers = [opens]
        caller = acquiring(pool)
        await until_all_wait()
        waiters = [acquiring(pool)] if someone_waits else []
        await until_all_wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        opens.set()
        await until_all_wait()
        assert pool.open == 1
        assert pool.in_use == int(someone_waits)
        connection = await waiters[0] if waiters else await acquired(pool)
        assert server.made == [connection]

    run_with_fake_clock(main)


def test_after_a_failure_to_connect_the_next_caller_tries() -> None:
    """Only the caller for whom the connection was opened gets the error."""

    async def main() -> None:
        server = FakeServer()
        pool = server.pool()
        opens = asyncio.Event()
        server.answers = [opens, DriverError, asyncio.CancelledError]
        first = acquiring(pool)
        await until_all_wait()
        second, third, fourth = acquiring(pool), acquiring(pool), acquiring(pool)
        await until_all_wait()
        opens.set()
        connection = await first
        connection.dead = True
        await pool.release(connection)
        with pytest.raises(DriverError):
            await second
        with pytest.raises(asyncio.CancelledError):
            await third
        assert (await fourth).number == 2

    run_with_fake_clock(main)


def test_an_attempt_to_connect_that_hangs_times_out_and_the_next_caller_tries() -> None:
    """This timeout applies if the driver's own timeout does not work."""

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

    run_with_fake_clock(main)


def test_after_a_cancelled_rollback_the_connection_is_closed_and_its_slot_is_free() -> None:
    """The rollback may go on for a short time; then the connection is closed, and another can be opened."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = FakeServer()
        pool = server.pool()
        connection = await acquired(pool, transactional=True)
        connection.hang["ROLLBACK"] = asyncio.Event()
        leaving = asyncio.create_task(pool.release(connection))
        waiter = acquiring(pool)
        await until_all_wait()
        started = loop.time()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert loop.time() == pytest.approx(started + FINISH_GRACE)
        assert (await waiter).number == 2
        await until_all_wait()
        assert connection.closed
        assert (pool.open, pool.in_use) == (1, 1)

    run_with_fake_clock(main)


def test_a_cancelled_rollback_that_ends_in_time_keeps_the_connection() -> None:
    """The connection that is returned to the pool has no open transaction."""

    async def main() -> None:
        pool = FakeServer().pool()
        connection = await acquired(pool, transactional=True)
        connection.hang["ROLLBACK"] = asyncio.Event()
        leaving = asyncio.create_task(pool.release(connection))
        await until_all_wait()
        leaving.cancel()
        await until_all_wait()
        connection.hang["ROLLBACK"].set()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert await acquired(pool) is connection
        assert connection.sent == ["BEGIN", "ROLLBACK"]

    run_with_fake_clock(main)


@pytest.mark.parametrize("statement", ["BEGIN", "SELECT 1"])
def test_a_connection_whose_preparation_was_cancelled_is_discarded(statement: str) -> None:
    """A connection on which a statement is unanswered cannot be used by another caller."""

    async def main() -> None:
        pool = FakeServer().pool()
        connection = await acquired(pool)
        await pool.release(connection)
        await asyncio.sleep(pool_module._TRUSTED + 1)
        connection.hang[statement] = asyncio.Event()
        caller = acquiring(pool, transactional=statement == "BEGIN", write=True)
        await until_all_wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await until_all_wait()
        assert connection.closed
        assert (pool.open, pool.in_use) == (0, 0)

    run_with_fake_clock(main)
