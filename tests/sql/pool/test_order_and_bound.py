"""The pool of driver connections: its maximum size, its order, and waiting callers."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from support.fake_clock_loop import run_with_fake_clock, until_all_wait
from support.fake_driver import DriverError, FakeConnection, FakeServer, acquired, acquiring, used_up

# ---- Order


def test_the_connection_used_last_is_used_first() -> None:
    """So connections that are not needed any more stay idle, and the server can close them."""

    async def main() -> None:
        pool = FakeServer().pool(3)
        first, second, third = await used_up(pool, 3)
        for connection in (second, first, third):
            await pool.release(connection)
        assert (pool.open, pool.in_use) == (3, 0)
        assert [await acquired(pool) for _ in range(3)] == [third, first, second]
        assert (pool.open, pool.in_use) == (3, 3)

    run_with_fake_clock(main)


def test_waiting_callers_are_served_in_order_and_before_new_callers() -> None:
    """A caller that comes just as a connection is returned does not get it before the waiting callers."""

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
        await until_all_wait()
        await pool.release(connection)
        users.append(asyncio.create_task(use(10)))
        await asyncio.gather(*users)
        assert served == list(range(11))

    run_with_fake_clock(main)


def test_a_connection_older_than_recycle_is_replaced() -> None:
    """Whether it was idle or in use when it became too old; a waiting caller gets a new connection."""

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
        await until_all_wait()
        assert server.open == {third}
        assert (third.number, first.closed, second.closed) == (3, True, True)

    run_with_fake_clock(main)


# ---- The maximum size, in any order of events

_STEPS = st.one_of(
    st.tuples(st.just("ask"), st.sampled_from(["read", "write", "transaction"])),
    st.tuples(st.sampled_from(["give back", "lose", "cancel", "open", "stick"]), st.integers(0, 30)),
    st.tuples(st.just("loop step"), st.integers(1, 3)),
    st.tuples(st.just("pass"), st.sampled_from([0.5, 1.5, 11.0, 31.0])),
)
_FAILURES: dict[str, type[BaseException]] = {"fails": DriverError, "is cancelled": asyncio.CancelledError}
_ANSWERS = st.lists(st.sampled_from(["opens", "opens", "hangs", "fails", "is cancelled"]), max_size=12)


class _Users:
    """Tasks that use a pool, and the checks that are made after each step of the event loop."""

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
        assert connection not in self.held, "two users have the same connection"
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
        assert self.server.opening + pool.open <= self.size, "more connections are open than the pool's size"
        assert pool.open - pool.in_use >= 0
        waiting = [waiter for waiter in pool._waiting if not waiter.done()]
        if waiting:
            assert pool.in_use == pool.open, "a caller waits although a connection is idle"
            assert pool.open + pool._opening == self.size, "a caller waits although another connection could be opened"
        for waiter in pool._waiting:
            self.in_line.setdefault(waiter, len(self.in_line))
        first = min((self.in_line[waiter] for waiter in waiting), default=len(self.in_line))
        for waiter, place in list(self.in_line.items()):
            if waiter.done():
                del self.in_line[waiter]
                self.in_line[asyncio.get_running_loop().create_future()] = place  # each number is used once
                assert waiter.cancelled() or place < first, "a caller was served before one that came earlier"

    async def loop_step(self, count: int = 1) -> None:
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
        elif what == "loop step":
            await self.loop_step(which)
        elif what == "pass":
            await asyncio.sleep(which)
        self.check()

    async def end(self) -> None:
        """Return all connections; all waiting callers must then be served without a timer."""
        loop = asyncio.get_running_loop()
        for event in self.hanging:
            event.set()
        self.server.answers.clear()
        now, steps = loop.time(), 0
        while not all(task.done() for task in self.tasks):
            steps += 1
            assert steps < 10_000, "a caller waits for ever, or for a timer"
            for connection, event in self.held.items():
                event.set()
                for statement in connection.hang.values():
                    statement.set()
            await self.loop_step()
            assert loop.time() == now, "a caller waited for a timer"
        await until_all_wait()
        assert (self.pool.in_use, self.pool._opening) == (0, 0)
        for task in self.tasks:
            error = None if task.cancelled() else task.exception()
            assert error is None or isinstance(error, (PoolTimeoutError, DriverError, TimeoutError)), repr(error)
        # After any events, as many connections as the pool's size can be used again.
        assert len({connection.number for connection in await used_up(self.pool, self.size)}) == self.size
        await self.pool.aclose()


@given(size=st.integers(1, 3), answers=_ANSWERS, steps=st.lists(_STEPS, max_size=60))
def test_in_every_order_of_events_the_pool_keeps_its_size_and_order(
    size: int, answers: list[str], steps: list[tuple[str, Any]]
) -> None:
    """Callers take, return and lose connections and are cancelled; attempts to connect succeed, hang or fail.

    There are never more connections than the pool's size, no two callers have the same one, no caller waits while a
    connection is idle or could be opened, callers are served in order, and at the end no slot is lost.
    """

    async def main() -> None:
        users = _Users(size, answers)
        for what, which in steps:
            await users.step(what, which)
        await users.end()

    run_with_fake_clock(main)


# ---- Waiting


def test_a_caller_that_waits_longer_than_the_timeout_gets_an_error_and_leaves_the_queue() -> None:
    """A connection that is returned later goes to the next waiting caller."""

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

    run_with_fake_clock(main)


# ---- Many tasks


def test_a_thousand_tasks_open_no_more_connections_than_the_pool_s_size() -> None:
    """A fifth of the tasks is cancelled, and some connections are lost."""

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

    run_with_fake_clock(main)
