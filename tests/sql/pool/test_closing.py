"""Closing a pool, the end of its event loop, and forks of its process."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter

import pytest
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from support.fake_clock_loop import FakeClockLoop, run_with_fake_clock, until_all_wait
from support.fake_driver import FakeServer, acquired, acquiring, used_up
from tokenstore import StoreClosedError, event_loops
from tokenstore_sql.connections import pool as pool_module


def test_closing_closes_idle_connections_at_once_and_others_when_they_are_returned() -> None:
    """A connection that is being opened for a cancelled caller is closed too."""

    async def main() -> None:
        server = FakeServer()
        pool = server.pool(3)
        idle, used = await used_up(pool, 2)
        await pool.release(idle)
        opens = asyncio.Event()
        server.answers = [opens]
        keeper, caller = acquiring(pool), acquiring(pool)
        await until_all_wait()
        assert (await keeper) is idle
        await pool.release(idle)
        closing = asyncio.create_task(pool.aclose())
        caller.cancel()
        await until_all_wait()
        assert idle.closed
        assert not used.closed
        assert not closing.done(), "closing did not wait for the connection that is being opened"
        opens.set()
        await closing
        await until_all_wait()
        assert server.open == {used}
        with pytest.raises(StoreClosedError):
            await acquired(pool)
        await pool.release(used)
        await pool.aclose()
        assert server.open == set()
        assert (pool.open, pool.in_use) == (0, 0)

    run_with_fake_clock(main)


def test_closing_raises_an_error_in_waiting_callers_at_once() -> None:
    """They would never get a connection."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        pool = FakeServer().pool()
        connection = await acquired(pool)
        waiters = [acquiring(pool), acquiring(pool), acquiring(pool)]
        await until_all_wait()
        waiters[0].cancel()
        started = loop.time()
        await pool.aclose()
        await asyncio.wait(waiters)
        assert loop.time() == started
        assert waiters[0].cancelled()
        assert all(isinstance(waiter.exception(), StoreClosedError) for waiter in waiters[1:])
        assert waiters[1].exception() is not waiters[2].exception()
        await pool.release(connection)
        await until_all_wait()
        assert connection.closed

    run_with_fake_clock(main)


def test_closing_does_not_wait_for_a_server_that_does_not_answer() -> None:
    """There is a time limit for closing a connection."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        pool = FakeServer().pool()
        connection = await acquired(pool)
        await pool.release(connection)

        async def hangs() -> None:
            await asyncio.Event().wait()

        connection.close = hangs  # type: ignore[method-assign]
        started = loop.time()
        await pool.aclose()
        assert loop.time() == pytest.approx(started + pool_module._CLOSE_TIMEOUT)

    run_with_fake_clock(main)


def test_after_a_fork_the_child_does_not_use_or_close_the_parent_s_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """``forget`` is called on them; one that is returned to the pool later is ignored."""

    async def main() -> None:
        server = FakeServer()
        pool = server.pool(2)
        idle, used = await used_up(pool, 2)
        await pool.release(idle)
        monkeypatch.setattr(event_loops._Process, "forks", event_loops.forks() + 1)
        pool.forget()
        assert (pool.open, pool.in_use) == (0, 0)
        assert all(connection.forgotten for connection in (idle, used))
        await pool.release(used)
        own = await used_up(pool, 2)
        assert Counter(connection.number for connection in own) == Counter([3, 4])
        await until_all_wait()
        assert not idle.closed
        assert not used.closed
        assert idle.sent == used.sent == []

    run_with_fake_clock(main)


def test_in_a_new_event_loop_all_slots_of_the_pool_are_free() -> None:
    """Also if the last event loop ended while a connection was in use and other callers waited for it."""
    server = FakeServer()
    pool = server.pool(2)

    async def first() -> None:
        held = await acquired(pool)
        assert held.number == 1
        server.answers = [asyncio.Event()]
        for _ in range(3):
            _ = acquiring(pool)
        await until_all_wait()

    async def second() -> None:
        pool.forget()
        assert [connection.number for connection in await used_up(pool, 2)] == [2, 3]
        waiter = acquiring(pool)
        with pytest.raises(PoolTimeoutError):
            await waiter
        await pool.aclose()

    run_with_fake_clock(first)
    run_with_fake_clock(second)


def test_an_event_loop_closed_during_an_attempt_to_connect_does_not_change_the_number_of_slots() -> None:
    """The attempt is garbage-collected later, in the next event loop, and must not change the pool's counters there."""
    server = FakeServer()
    pool = server.pool()
    server.answers = [asyncio.Event()]
    loop = FakeClockLoop()
    loop.set_exception_handler(
        lambda *_: None
    )  # the event loop reports a pending task that was destroyed, which this test causes on purpose
    dropped = loop.create_task(acquired(pool))

    async def look() -> None:
        await until_all_wait()
        assert server.opening == 1

    loop.run_until_complete(look())
    loop.close()
    pool.forget()
    del dropped, loop
    gc.collect()
    assert pool._opening == 0
