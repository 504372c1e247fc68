"""The end of a pool, of its event loop and of its process."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter

import pytest
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from support.fake_driver import FakeServer, acquired, acquiring, used_up
from support.waitless_loop import WaitlessLoop, everybody_waits, run_waitless
from tokenstore import StoreClosedError, event_loops
from tokenstore_sql.connections import pool as pool_module


def test_closing_closes_the_idle_at_once_and_the_others_when_they_come_back() -> None:
    """Also one that is just being opened, for a caller who goes away."""

    async def main() -> None:
        server = FakeServer()
        pool = server.pool(3)
        idle, used = await used_up(pool, 2)
        await pool.release(idle)
        opens = asyncio.Event()
        server.answers = [opens]
        keeper, caller = acquiring(pool), acquiring(pool)
        await everybody_waits()
        assert (await keeper) is idle
        await pool.release(idle)
        closing = asyncio.create_task(pool.aclose())
        caller.cancel()
        await everybody_waits()
        assert idle.closed
        assert not used.closed
        assert not closing.done(), "a connection is being opened"
        opens.set()
        await closing
        await everybody_waits()
        assert server.open == {used}
        with pytest.raises(StoreClosedError):
            await acquired(pool)
        await pool.release(used)
        await pool.aclose()
        assert server.open == set()
        assert (pool.open, pool.in_use) == (0, 0)

    run_waitless(main)


def test_closing_tells_those_who_wait() -> None:
    """At once: what they wait for is not going to come."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        pool = FakeServer().pool()
        connection = await acquired(pool)
        waiters = [acquiring(pool), acquiring(pool), acquiring(pool)]
        await everybody_waits()
        waiters[0].cancel()
        started = loop.time()
        await pool.aclose()
        await asyncio.wait(waiters)
        assert loop.time() == started
        assert waiters[0].cancelled()
        assert all(isinstance(waiter.exception(), StoreClosedError) for waiter in waiters[1:])
        assert waiters[1].exception() is not waiters[2].exception()
        await pool.release(connection)
        await everybody_waits()
        assert connection.closed

    run_waitless(main)


def test_closing_does_not_wait_for_a_server_that_is_silent() -> None:
    """Taking leave has a bounded time."""

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

    run_waitless(main)


def test_after_a_fork_the_parents_connections_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told to be forgotten, never used or closed; what comes back later is no concern of the pool's."""

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
        await everybody_waits()
        assert not idle.closed
        assert not used.closed
        assert idle.sent == used.sent == []

    run_waitless(main)


def test_a_new_event_loop_finds_the_whole_bound() -> None:
    """Also where the former one ended while a connection was in use, and while others waited for it."""
    server = FakeServer()
    pool = server.pool(2)

    async def first() -> None:
        held = await acquired(pool)
        assert held.number == 1
        server.answers = [asyncio.Event()]
        for _ in range(3):
            _ = acquiring(pool)
        await everybody_waits()

    async def second() -> None:
        pool.forget()
        assert [connection.number for connection in await used_up(pool, 2)] == [2, 3]
        waiter = acquiring(pool)
        with pytest.raises(PoolTimeoutError):
            await waiter
        await pool.aclose()

    run_waitless(first)
    run_waitless(second)


def test_a_loop_that_was_closed_under_an_opening_does_not_widen_the_bound() -> None:
    """What was under way is dropped by the garbage collector, which changes nothing in the pool of the next loop."""
    server = FakeServer()
    pool = server.pool()
    server.answers = [asyncio.Event()]
    loop = WaitlessLoop()
    loop.set_exception_handler(lambda *_: None)  # a task is destroyed while it is pending: that is the test
    dropped = loop.create_task(acquired(pool))

    async def look() -> None:
        await everybody_waits()
        assert server.opening == 1

    loop.run_until_complete(look())
    loop.close()
    pool.forget()
    del dropped, loop
    gc.collect()
    assert pool._opening == 0
