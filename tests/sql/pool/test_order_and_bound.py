"""The pool of driver connections: its bound, its order and who waits."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from support.fake_driver import DriverError, FakeConnection, FakeServer, acquired, acquiring, used_up
from support.waitless_loop import everybody_waits, run_waitless

# ---- Order


def test_the_one_used_last_comes_first() -> None:
    """So that what is no longer needed goes idle, and the server may close it."""

    async def main() -> None:
        pool = FakeServer().pool(3)
        first, second, third = await used_up(pool, 3)
        for connection in (second, first, third):
            await pool.release(connection)
        assert (pool.open, pool.in_use) == (3, 0)
        assert [await acquired(pool) for _ in range(3)] == [third, first, second]
        assert (pool.open, pool.in_use) == (3, 3)

    run_waitless(main)


def test_those_who_wait_are_served_in_their_order_and_before_newcomers() -> None:
    """Who comes at the moment in which one is given back does not get it before those who wait for it."""

    async def main() -> None:
        pool = FakeServer().pool(1)
        connection = await acquired(pool)
        served: list[int] = []

        async def use(number: int) -> None:
            mine = await acquired(pool)
            served.append(number)
            await asyncio.sleep(0)
            await pool.release(mine)

        users = [asyncio.create_task(use(number)) for number in range(10)]
        await everybody_waits()
        await pool.release(connection)
        users.append(asyncio.create_task(use(10)))
        await asyncio.gather(*users)
        assert served == list(range(11))

    run_waitless(main)


def test_one_that_is_too_old_is_replaced() -> None:
    """Whether it was idle or in use when its time came; who waits for it gets a new one."""

    async def main() -> None:
        server = FakeServer()
        pool = server.pool(recycle=100.0)
        first = await acquired(pool)
        await asyncio.sleep(99)
        await pool.release(first)
        assert await acquired(pool) is first
        await pool.release(first)
        await asyncio.sleep(1)
        second = await acquired(pool)
        await asyncio.sleep(99)
        waiter = acquiring(pool)
        await asyncio.sleep(1)
        await pool.release(second)
        third = await waiter
        await everybody_waits()
        assert server.open == {third}
        assert (third.number, first.closed, second.closed) == (3, True, True)

    run_waitless(main)


# ---- The bound, in any order of events

_STEPS = st.one_of(
    st.tuples(st.just("ask"), st.sampled_from(["read", "write", "transaction"])),
    st.tuples(st.sampled_from(["give back", "lose", "cancel", "open", "stick"]), st.integers(0, 30)),
    st.tuples(st.just("turn"), st.integers(1, 3)),
    st.tuples(st.just("pass"), st.sampled_from([0.5, 1.5, 11.0, 31.0])),
)
_FAILURES: dict[str, type[BaseException]] = {"fails": DriverError, "is cancelled": asyncio.CancelledError}
_ANSWERS = st.lists(st.sampled_from(["opens", "opens", "hangs", "fails", "is cancelled"]), max_size=12)


class _Users:
    """Tasks that use a pool, and what must hold at each turn of the loop, whatever becomes of them."""

    def __init__(self, size: int, answers: list[str]) -> None:
        self.size = size
        self.server = FakeServer()
        self.hanging = [asyncio.Event() for answer in answers if answer == "hangs"]
        hanging = iter(self.hanging)
        self.server.answers = [next(hanging) if answer == "hangs" else _FAILURES.get(answer) for answer in answers]
        self.pool = self.server.pool(size)
        self.tasks: list[asyncio.Task[None]] = []
        self.held: dict[FakeConnection, asyncio.Event] = {}
        self.in_line: dict[asyncio.Future[Any], int] = {}

    async def use(self, how: str) -> None:
        connection = await acquired(self.pool, transactional=how == "transaction", write=how != "read")
        assert connection not in self.held, "one connection is two users'"
        assert not connection.lost
        self.held[connection] = asyncio.Event()
        try:
            await self.held[connection].wait()
        finally:
            try:
                await self.pool.release(connection)
            finally:
                del self.held[connection]

    def check(self) -> None:
        pool = self.pool
        assert self.server.opening + pool.open <= self.size, "too many are open"
        assert pool.open - pool.in_use >= 0
        waiting = [waiter for waiter in pool._waiting if not waiter.done()]
        if waiting:
            assert pool.in_use == pool.open, "somebody waits although one is idle"
            assert pool.open + pool._opening == self.size, "somebody waits although another may be opened"
        for waiter in pool._waiting:
            self.in_line.setdefault(waiter, len(self.in_line))
        first = min((self.in_line[waiter] for waiter in waiting), default=len(self.in_line))
        for waiter, place in list(self.in_line.items()):
            if waiter.done():
                del self.in_line[waiter]
                self.in_line[asyncio.get_running_loop().create_future()] = place  # numbers are given once
                assert waiter.cancelled() or place < first, "somebody was overtaken"

    async def turn(self, count: int = 1) -> None:
        for _ in range(count):
            await asyncio.sleep(0)
            self.check()

    async def step(self, what: str, which: Any) -> None:
        held = list(self.held)
        live = [task for task in self.tasks if not task.done()]
        if what == "ask":
            self.tasks.append(asyncio.create_task(self.use(which)))
        elif what in ("give back", "lose", "stick") and held:
            connection = held[which % len(held)]
            connection.dead |= what == "lose"
            if what == "stick":
                connection.hang["ROLLBACK"] = asyncio.Event()
            self.held[connection].set()
        elif what == "cancel" and live:
            live[which % len(live)].cancel()
        elif what == "open" and self.hanging:
            self.hanging[which % len(self.hanging)].set()
        elif what == "turn":
            await self.turn(which)
        elif what == "pass":
            await asyncio.sleep(which)
        self.check()

    async def end(self) -> None:
        """Everybody gives back what he has, and no timer has to help."""
        loop = asyncio.get_running_loop()
        for event in self.hanging:
            event.set()
        self.server.answers.clear()
        now, turns = loop.time(), 0
        while not all(task.done() for task in self.tasks):
            turns += 1
            assert turns < 10_000, "somebody waits for ever, or for a timer"
            for connection, event in self.held.items():
                event.set()
                for statement in connection.hang.values():
                    statement.set()
            await self.turn()
            assert loop.time() == now, "somebody waited for a timer"
        await everybody_waits()
        assert (self.pool.in_use, self.pool._opening) == (0, 0)
        for task in self.tasks:
            error = None if task.cancelled() else task.exception()
            assert error is None or isinstance(error, (PoolTimeoutError, DriverError, TimeoutError)), repr(error)
        # Whatever happened, the whole bound is there to be used again.
        assert len({connection.number for connection in await used_up(self.pool, self.size)}) == self.size
        await self.pool.aclose()


@given(size=st.integers(1, 3), answers=_ANSWERS, steps=st.lists(_STEPS, max_size=60))
def test_no_order_of_events_breaks_the_bound(size: int, answers: list[str], steps: list[tuple[str, Any]]) -> None:
    """Users come, give back, lose what they have, and are cancelled, while opening works, hangs, or fails.

    There are never more connections than allowed, none is two users', nobody waits while there is one to be had or to
    be opened, nobody is overtaken, and in the end nothing is missing.
    """

    async def main() -> None:
        users = _Users(size, answers)
        for what, which in steps:
            await users.step(what, which)
        await users.end()

    run_waitless(main)


# ---- Waiting


def test_who_waits_for_too_long_is_told_and_out_of_the_line() -> None:
    """What is given back later goes to the next, and is not kept for somebody who has gone."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        pool = FakeServer().pool(timeout=3.0)
        connection = await acquired(pool)
        started = loop.time()
        early = acquiring(pool)
        await asyncio.sleep(2)
        late = acquiring(pool)
        with pytest.raises(PoolTimeoutError):
            await early
        assert loop.time() == pytest.approx(started + 3)
        await pool.release(connection)
        assert await late is connection

    run_waitless(main)


# ---- The end


def test_no_number_of_tasks_opens_more_than_the_bound() -> None:
    """A thousand users, a fifth of them cancelled, and a connection now and then lost."""

    async def main() -> None:
        server = FakeServer()
        pool = server.pool(7, timeout=600.0)
        served = itertools.count()

        async def use(number: int) -> None:
            connection = await acquired(pool, transactional=number % 2 == 0)
            assert pool.open + server.opening <= 7
            try:
                await asyncio.sleep(number % 3 / 10)
                connection.dead = number % 11 == 0
                next(served)
            finally:
                await pool.release(connection)

        tasks = [asyncio.create_task(use(number)) for number in range(1000)]
        await asyncio.sleep(0.5)
        for task in tasks[::5]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert next(served) >= 800
        assert pool.in_use == 0
        assert 1 <= pool.open <= 7
        await pool.aclose()
        assert server.open == set()

    run_waitless(main)
