"""The pool of driver connections: its bound, its order, and what a cancelled caller leaves behind."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from support.database import Place, source_of
from support.matrix import Row, params
from support.polling import until
from tokenstore import AuthTokenStore, BackendUnavailableError, Keyring, StoreClosedError, open_store
from tokenstore.cancellation import FINISH_GRACE
from tokenstore_sql import pool as pool_module
from tokenstore_sql.connection import ConnectionLostError, DriverConnection, Result, _Process
from tokenstore_sql.pool import Pool
from tokenstore_sql.sqlite import _SQLiteConnection

_TIMEOUT, _RECYCLE = 10.0, 1800.0
main_rows = pytest.mark.parametrize("row", params(names=["sqlite", "postgresql+asyncpg", "mariadb+asyncmy"]))


# ---- A clock that moves when everybody waits for it


class _Loop(asyncio.SelectorEventLoop):
    """An event loop without waits: where nothing else can happen, it is at once as late as the next timer says."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        self._select = selector.select
        selector.select = self._skip

    def time(self) -> float:
        return self.now

    def _skip(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise AssertionError("somebody would wait for ever")
        self.now += max(timeout, 0)
        return self._select(0)


@pytest.fixture(autouse=True)
def _one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's clock is the loop's, where the loop is one of these."""

    def now() -> float:
        return asyncio.get_running_loop().time()  # on Linux the same clock, where it is no such loop

    monkeypatch.setattr(pool_module, "monotonic", now)


def _run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=_Loop) as runner:
        runner.run(main())


async def _settled() -> None:
    """Until nobody has anything left to do but wait."""
    loop: Any = asyncio.get_running_loop()
    quiet = 0
    while quiet < 2:
        await asyncio.sleep(0)
        quiet = 0 if loop._ready else quiet + 1


# ---- A driver


class _DriverError(Exception):
    pass


class _Fake(DriverConnection):
    """A connection to nowhere. ``hang`` stops the statements that begin so, ``fail`` lets them fail."""

    def __init__(self, number: int, server: _Server) -> None:
        self.number, self.server = number, server
        self.closed = self.dead = self.forgotten = False
        self.sent: list[str] = []
        self.hang: dict[str, asyncio.Event] = {}
        self.fail = set(server.failing)
        dialect: Any = _Ways()
        compiler: Any = dialect
        super().__init__(None, compiler, dialect, server.connect)
        self.opened_at = self.used_at = asyncio.get_running_loop().time()

    def __repr__(self) -> str:
        return f"<{self.number}>"

    def begin_statement(self) -> str:
        return "BEGIN"

    def is_closed(self) -> bool:
        return self.closed or self.dead

    def socket(self) -> None:
        """None."""

    async def send(self, sql: str, arguments: Any, returns_rows: bool) -> Result:
        assert not self.closed, "a closed connection is used"
        self.sent.append(sql)
        if sql in self.hang:
            await self.hang[sql].wait()
        if sql in self.fail:
            self.dead = True
            raise _DriverError("gone")
        return Result((), 0)

    async def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True
        self.server.open.discard(self)

    def forget(self) -> None:
        self.forgotten = True
        self.server.open.discard(self)


class _Ways:
    """What a connection asks of its dialect, and of SQLAlchemy's."""

    dialect = None

    def classify(self, error: BaseException) -> tuple[type[Exception], None]:
        return BackendUnavailableError, None

    def driver_errors(self) -> tuple[type[Exception], ...]:
        return (_DriverError,)


class _Server:
    """Where connections come from. ``answers`` says how each attempt ends, as long as there is something in it."""

    def __init__(self) -> None:
        self.made: list[_Fake] = []
        self.open: set[_Fake] = set()
        self.opening = 0
        self.failing: set[str] = set()
        self.answers: list[asyncio.Event | type[BaseException] | None] = []

    async def connect(self) -> DriverConnection:
        self.opening += 1
        try:
            answer = self.answers.pop(0) if self.answers else None
            if isinstance(answer, asyncio.Event):
                await answer.wait()
            elif answer is not None:
                raise answer
        finally:
            self.opening -= 1
        connection = _Fake(len(self.made) + 1, self)
        self.made.append(connection)
        self.open.add(connection)
        return connection

    def pool(self, size: int = 1, **options: float) -> Pool:
        return Pool(self.connect, size=size, **{"timeout": _TIMEOUT, "recycle": _RECYCLE, **options})


async def _got(pool: Pool, *, transactional: bool = False, write: bool = False) -> _Fake:
    connection = await pool.acquire(transactional=transactional, write=write)
    assert isinstance(connection, _Fake)
    return connection


def _ask(pool: Pool, *, transactional: bool = False, write: bool = False) -> asyncio.Task[_Fake]:
    return asyncio.create_task(_got(pool, transactional=transactional, write=write))


async def _used_up(pool: Pool, count: int) -> list[_Fake]:
    return [await _got(pool) for _ in range(count)]


# ---- Order


def test_the_one_used_last_comes_first() -> None:
    """So that what is no longer needed goes idle, and the server may close it."""

    async def main() -> None:
        pool = _Server().pool(3)
        first, second, third = await _used_up(pool, 3)
        for connection in (second, first, third):
            await pool.release(connection)
        assert (pool.open, pool.in_use) == (3, 0)
        assert [await _got(pool) for _ in range(3)] == [third, first, second]
        assert (pool.open, pool.in_use) == (3, 3)

    _run(main)


def test_those_who_wait_are_served_in_their_order_and_before_newcomers() -> None:
    """Who comes at the moment in which one is given back does not get it before those who wait for it."""

    async def main() -> None:
        pool = _Server().pool(1)
        connection = await _got(pool)
        served: list[int] = []

        async def use(number: int) -> None:
            mine = await _got(pool)
            served.append(number)
            await asyncio.sleep(0)
            await pool.release(mine)

        users = [asyncio.create_task(use(number)) for number in range(10)]
        await _settled()
        await pool.release(connection)
        users.append(asyncio.create_task(use(10)))
        await asyncio.gather(*users)
        assert served == list(range(11))

    _run(main)


def test_one_that_is_too_old_is_replaced() -> None:
    """Whether it was idle or in use when its time came; who waits for it gets a new one."""

    async def main() -> None:
        server = _Server()
        pool = server.pool(recycle=100.0)
        first = await _got(pool)
        await asyncio.sleep(99)
        await pool.release(first)
        assert await _got(pool) is first
        await pool.release(first)
        await asyncio.sleep(1)
        second = await _got(pool)
        await asyncio.sleep(99)
        waiter = _ask(pool)
        await asyncio.sleep(1)
        await pool.release(second)
        third = await waiter
        await _settled()
        assert server.open == {third}
        assert (third.number, first.closed, second.closed) == (3, True, True)

    _run(main)


# ---- The bound, in any order of events


_STEPS = st.one_of(
    st.tuples(st.just("ask"), st.sampled_from(["read", "write", "transaction"])),
    st.tuples(st.sampled_from(["give back", "lose", "cancel", "open", "stick"]), st.integers(0, 30)),
    st.tuples(st.just("turn"), st.integers(1, 3)),
    st.tuples(st.just("pass"), st.sampled_from([0.5, 1.5, 11.0, 31.0])),
)
_FAILURES: dict[str, type[BaseException]] = {"fails": _DriverError, "is cancelled": asyncio.CancelledError}
_ANSWERS = st.lists(st.sampled_from(["opens", "opens", "hangs", "fails", "is cancelled"]), max_size=12)


class _Users:
    """Tasks that use a pool, and what must hold at each turn of the loop, whatever becomes of them."""

    def __init__(self, size: int, answers: list[str]) -> None:
        self.size = size
        self.server = _Server()
        self.hanging = [asyncio.Event() for answer in answers if answer == "hangs"]
        hanging = iter(self.hanging)
        self.server.answers = [next(hanging) if answer == "hangs" else _FAILURES.get(answer) for answer in answers]
        self.pool = self.server.pool(size)
        self.tasks: list[asyncio.Task[None]] = []
        self.held: dict[_Fake, asyncio.Event] = {}
        self.in_line: dict[asyncio.Future[Any], int] = {}

    async def use(self, how: str) -> None:
        connection = await _got(self.pool, transactional=how == "transaction", write=how != "read")
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
        await _settled()
        assert (self.pool.in_use, self.pool._opening) == (0, 0)
        for task in self.tasks:
            error = None if task.cancelled() else task.exception()
            assert error is None or isinstance(error, (PoolTimeoutError, _DriverError, TimeoutError)), repr(error)
        # Whatever happened, the whole bound is there to be used again.
        assert len({connection.number for connection in await _used_up(self.pool, self.size)}) == self.size
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

    _run(main)


# ---- Waiting


def test_who_waits_for_too_long_is_told_and_out_of_the_line() -> None:
    """What is given back later goes to the next, and is not kept for somebody who has gone."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        pool = _Server().pool(timeout=3.0)
        connection = await _got(pool)
        started = loop.time()
        early = _ask(pool)
        await asyncio.sleep(2)
        late = _ask(pool)
        with pytest.raises(PoolTimeoutError):
            await early
        assert loop.time() == pytest.approx(started + 3)
        await pool.release(connection)
        assert await late is connection

    _run(main)


@main_rows
def test_a_pool_that_is_used_up_is_an_error_that_names_the_option(row: Row, url: str, keyring: Keyring) -> None:
    """One connection, which a transaction has: others wait for ``pool_timeout``, and are told of it and of a row."""

    async def main() -> None:
        async with open_store(url, keyring=keyring, pool_size=1, pool_timeout=0.05) as store:
            await store.setup()
            await _store(store, "u1")
            async with store.transaction() as tx:
                assert await tx.load_tokens("github", "u1")
                for call in (store.load_tokens("github", "u2"), _store(store, "u2"), _all_of(store)):
                    with pytest.raises(BackendUnavailableError, match="pool_timeout") as caught:
                        await call
                    assert "pool_size" in str(caught.value)
                assert source_of(store).in_use == source_of(store).open == 1
            assert await store.load_tokens("github", "u1")
            assert source_of(store).in_use == 0

    asyncio.run(main())


@main_rows
def test_a_pool_of_a_store_keeps_to_its_size(row: Row, url: str, keyring: Keyring) -> None:
    """However many tasks load, store, open transactions and are cancelled half-way; in the end all is given back."""

    async def main() -> None:
        async with open_store(url, keyring=keyring, pool_size=3) as store:
            await store.setup()
            source = source_of(store)
            seen = 0

            async def use(number: int) -> None:
                nonlocal seen
                user = f"u{number % 10}"
                await _store(store, user)
                seen = max(seen, source.open)
                async with store.transaction() as tx:
                    assert await tx.load_tokens("github", user, for_update=True)
                    seen = max(seen, source.open)
                assert await store.load_tokens("github", user)

            tasks = [asyncio.create_task(use(number)) for number in range(40)]
            await until(lambda: any(task.done() for task in tasks), 0.001)
            for task in tasks[::4]:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ends)
            assert 1 <= seen <= 3
            await until(lambda: source.in_use == 0)

    asyncio.run(main())


async def _store(store: AuthTokenStore, user: str) -> None:
    await store.store_tokens("github", user, "gho_x", None, datetime.now(UTC) + timedelta(hours=1))


async def _all_of(store: AuthTokenStore) -> list[object]:
    return [entry async for entry in store.list_tokens()]


# ---- Cancellation


def test_who_is_cancelled_when_handed_a_connection_passes_it_on() -> None:
    """Both in one turn of the loop: the next in line gets it; without one, it is idle."""

    async def main() -> None:
        pool = _Server().pool()
        connection = await _got(pool)
        first, second = _ask(pool), _ask(pool)
        await _settled()
        await pool.release(connection)
        first.cancel()
        assert await second is connection
        assert first.cancelled()
        third = _ask(pool)
        await _settled()
        await pool.release(connection)
        third.cancel()
        await _settled()
        assert (pool.open, pool.in_use) == (1, 0)

    _run(main)


def test_who_is_cancelled_when_allowed_to_open_one_passes_that_on() -> None:
    """A lost connection lets the first in line open another; cancelled in that turn, he leaves it to the second."""

    async def main() -> None:
        server = _Server()
        pool = server.pool()
        connection = await _got(pool)
        first, second = _ask(pool), _ask(pool)
        await _settled()
        connection.dead = True
        _ = pool.put_back(connection)
        first.cancel()
        assert (await second).number == 2
        assert first.cancelled()
        assert (pool.open, pool.in_use, pool._opening) == (1, 1, 0)

    _run(main)


@pytest.mark.parametrize("someone_waits", [False, True])
def test_a_connection_that_is_opened_for_nobody_serves_the_next(someone_waits: bool) -> None:
    """Its caller is cancelled at once; what is opened goes to who waits for it, or becomes idle."""

    async def main() -> None:
        server = _Server()
        pool = server.pool()
        opens = asyncio.Event()
        server.answers = [opens]
        caller = _ask(pool)
        await _settled()
        waiters = [_ask(pool)] if someone_waits else []
        await _settled()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        opens.set()
        await _settled()
        assert pool.open == 1
        assert pool.in_use == int(someone_waits)
        connection = await waiters[0] if waiters else await _got(pool)
        assert server.made == [connection]

    _run(main)


def test_a_failure_to_open_lets_the_next_in_line_try() -> None:
    """Whoever was to have it is told what happened; so is nobody else."""

    async def main() -> None:
        server = _Server()
        pool = server.pool()
        opens = asyncio.Event()
        server.answers = [opens, _DriverError, asyncio.CancelledError]
        first = _ask(pool)
        await _settled()
        second, third, fourth = _ask(pool), _ask(pool), _ask(pool)
        await _settled()
        opens.set()
        connection = await first
        connection.dead = True
        await pool.release(connection)
        with pytest.raises(_DriverError):
            await second
        with pytest.raises(asyncio.CancelledError):
            await third
        assert (await fourth).number == 2

    _run(main)


def test_an_opening_that_hangs_ends_and_lets_the_next_in_line_try() -> None:
    """Drivers have timeouts of their own; this is the last resort."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = _Server()
        server.answers = [asyncio.Event()]
        pool = server.pool(timeout=60.0)
        started = loop.time()
        first, second = _ask(pool), _ask(pool)
        with pytest.raises(TimeoutError):
            await first
        assert loop.time() == pytest.approx(started + pool_module._OPEN_TIMEOUT)
        assert (await second).number == 1

    _run(main)


def test_a_rollback_that_is_cancelled_keeps_neither_connection_nor_slot() -> None:
    """The clean-up has a moment to end; then the connection is given up, and another can be opened."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = _Server()
        pool = server.pool()
        connection = await _got(pool, transactional=True)
        connection.hang["ROLLBACK"] = asyncio.Event()
        leaving = asyncio.create_task(pool.release(connection))
        waiter = _ask(pool)
        await _settled()
        started = loop.time()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert loop.time() == pytest.approx(started + FINISH_GRACE)
        assert (await waiter).number == 2
        await _settled()
        assert connection.closed
        assert (pool.open, pool.in_use) == (1, 1)

    _run(main)


def test_a_rollback_that_ends_within_its_moment_keeps_the_connection() -> None:
    """Cancelled or not, the caller leaves a connection without a transaction."""

    async def main() -> None:
        pool = _Server().pool()
        connection = await _got(pool, transactional=True)
        connection.hang["ROLLBACK"] = asyncio.Event()
        leaving = asyncio.create_task(pool.release(connection))
        await _settled()
        leaving.cancel()
        await _settled()
        connection.hang["ROLLBACK"].set()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert await _got(pool) is connection
        assert connection.sent == ["BEGIN", "ROLLBACK"]

    _run(main)


@pytest.mark.parametrize("statement", ["BEGIN", "SELECT 1"])
def test_who_is_cancelled_while_a_connection_is_made_ready_keeps_nothing(statement: str) -> None:
    """A statement without an answer leaves a connection that nobody can use."""

    async def main() -> None:
        pool = _Server().pool()
        connection = await _got(pool)
        await pool.release(connection)
        await asyncio.sleep(pool_module._TRUSTED + 1)
        connection.hang[statement] = asyncio.Event()
        caller = _ask(pool, transactional=statement == "BEGIN", write=True)
        await _settled()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await _settled()
        assert connection.closed
        assert (pool.open, pool.in_use) == (0, 0)

    _run(main)


# ---- The dead


@pytest.mark.parametrize("statement", ["SELECT 1", "BEGIN"])
@pytest.mark.parametrize("ends", ["fails", "is silent"])
def test_after_idleness_a_write_asks_first_and_replaces_the_dead(statement: str, ends: str) -> None:
    """The caller notices nothing; one that is silent has a bounded time to answer. A transaction's BEGIN asks, too."""

    async def main() -> None:
        server = _Server()
        pool = server.pool()
        dead = await _got(pool)
        await pool.release(dead)
        if ends == "fails":
            dead.fail.add(statement)
        else:
            dead.hang[statement] = asyncio.Event()
        await asyncio.sleep(pool_module._TRUSTED + 1)
        connection = await _got(pool, transactional=statement == "BEGIN", write=True)
        await _settled()
        assert (connection.number, dead.sent, dead.closed) == (2, [statement], True)
        assert server.open == {connection}

    _run(main)


def test_nobody_is_asked_for_a_sign_of_life_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before a read, which is sent again if need be; nor one that was in use a moment ago."""

    async def main() -> None:
        pool = _Server().pool()
        connection = await _got(pool, write=True)
        for pause, write in ((pool_module._TRUSTED, True), (100.0, False), (0.0, True)):
            await pool.release(connection)
            await asyncio.sleep(pause)
            assert await _got(pool, write=write) is connection
        assert connection.sent == []
        monkeypatch.setattr(pool_module, "_TRUSTED", -1.0)
        await pool.release(connection)
        assert await _got(pool, write=True) is connection
        assert connection.sent == ["SELECT 1"]

    _run(main)


@main_rows
def test_a_dead_connection_is_replaced_before_a_write(
    row: Row, url: str, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every write preceded by the question, stores go on as if nothing had happened."""
    monkeypatch.setattr(pool_module, "_TRUSTED", -1.0)
    really = DriverConnection.send_text
    asked: list[DriverConnection] = []

    async def ping(connection: DriverConnection) -> None:
        asked.append(connection)
        await really(connection, "SELECT 1")
        if len(asked) == 1:
            connection._unanswered = True
            raise ConnectionLostError(OSError("reset"))

    async def main() -> None:
        async with open_store(url, keyring=keyring, pool_size=1) as store:
            await store.setup()
            await _store(store, "u1")
            for connection_class in (DriverConnection, _SQLiteConnection):  # who have a way to ask
                monkeypatch.setattr(connection_class, "ping", ping)
            for _ in range(3):
                await _store(store, "u1")
            assert len(asked) >= 3
            assert asked[0] is not asked[1]
            assert len(set(asked[1:])) == 1
            assert (source_of(store).open, source_of(store).in_use) == (1, 0)

    asyncio.run(main())


def test_a_lost_connection_is_not_kept() -> None:
    """Given back or idle: nobody gets it, and another one is opened in its place."""

    async def main() -> None:
        server = _Server()
        pool = server.pool(2)
        first, second = await _used_up(pool, 2)
        first.dead = True
        await pool.release(first)
        await pool.release(second)
        assert (pool.open, pool.in_use) == (1, 0)
        second.dead = True
        third = await _got(pool)
        await _settled()
        assert server.open == {third}
        assert (first.closed, second.closed) == (True, True)

    _run(main)


def test_a_transaction_that_cannot_begin_leaves_nothing_behind() -> None:
    """On a new connection, that is: its caller gets the driver's error, and the next one another connection."""

    async def main() -> None:
        server = _Server()
        pool = server.pool()
        server.failing = {"BEGIN"}
        with pytest.raises(ConnectionLostError, match="gone"):
            await _got(pool, transactional=True)
        server.failing = set()
        assert (await _got(pool, transactional=True)).number == 2
        await _settled()
        assert server.made[0].closed

    _run(main)


def test_a_rollback_that_fails_is_the_servers_affair() -> None:
    """It tells nobody, and the connection is not kept."""

    async def main() -> None:
        pool = _Server().pool()
        connection = await _got(pool, transactional=True)
        connection.fail.add("ROLLBACK")
        await pool.release(connection)
        await _settled()
        assert (pool.open, connection.closed) == (0, True)

    _run(main)


def test_a_rollback_without_an_answer_ends() -> None:
    """Whoever leaves a transaction waits for a bounded time, and notices nothing but that."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        pool = _Server().pool()
        connection = await _got(pool, transactional=True)
        connection.hang["ROLLBACK"] = asyncio.Event()
        started = loop.time()
        await pool.release(connection)
        assert loop.time() <= started + pool_module._PING_TIMEOUT + FINISH_GRACE
        await _settled()
        assert (pool.open, connection.closed) == (0, True)

    _run(main)


def test_those_that_nobody_uses_can_be_discarded() -> None:
    """Those in use stay, and are kept when they are given back."""

    async def main() -> None:
        server = _Server()
        pool = server.pool(3)
        first, second, third = await _used_up(pool, 3)
        await pool.release(first)
        await pool.release(second)
        pool.discard_idle()
        await _settled()
        assert server.open == {third}
        await pool.release(third)
        assert await _got(pool) is third

    _run(main)


# ---- The end


def test_closing_closes_the_idle_at_once_and_the_others_when_they_come_back() -> None:
    """Also one that is just being opened, for a caller who goes away."""

    async def main() -> None:
        server = _Server()
        pool = server.pool(3)
        idle, used = await _used_up(pool, 2)
        await pool.release(idle)
        opens = asyncio.Event()
        server.answers = [opens]
        keeper, caller = _ask(pool), _ask(pool)
        await _settled()
        assert (await keeper) is idle
        await pool.release(idle)
        closing = asyncio.create_task(pool.aclose())
        caller.cancel()
        await _settled()
        assert idle.closed
        assert not used.closed
        assert not closing.done(), "a connection is being opened"
        opens.set()
        await closing
        await _settled()
        assert server.open == {used}
        with pytest.raises(StoreClosedError):
            await _got(pool)
        await pool.release(used)
        await pool.aclose()
        assert server.open == set()
        assert (pool.open, pool.in_use) == (0, 0)

    _run(main)


def test_closing_tells_those_who_wait() -> None:
    """At once: what they wait for is not going to come."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        pool = _Server().pool()
        connection = await _got(pool)
        waiters = [_ask(pool), _ask(pool), _ask(pool)]
        await _settled()
        waiters[0].cancel()
        started = loop.time()
        await pool.aclose()
        await asyncio.wait(waiters)
        assert loop.time() == started
        assert waiters[0].cancelled()
        assert all(isinstance(waiter.exception(), StoreClosedError) for waiter in waiters[1:])
        assert waiters[1].exception() is not waiters[2].exception()
        await pool.release(connection)
        await _settled()
        assert connection.closed

    _run(main)


def test_closing_does_not_wait_for_a_server_that_is_silent() -> None:
    """Taking leave has a bounded time."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        pool = _Server().pool()
        connection = await _got(pool)
        await pool.release(connection)

        async def hangs() -> None:
            await asyncio.Event().wait()

        connection.close = hangs  # type: ignore[method-assign]
        started = loop.time()
        await pool.aclose()
        assert loop.time() == pytest.approx(started + pool_module._CLOSE_TIMEOUT)

    _run(main)


def test_after_a_fork_the_parents_connections_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told to be forgotten, never used or closed; what comes back later is no concern of the pool's."""

    async def main() -> None:
        server = _Server()
        pool = server.pool(2)
        idle, used = await _used_up(pool, 2)
        await pool.release(idle)
        monkeypatch.setattr(_Process, "forks", _Process.forks + 1)
        pool.forget()
        assert (pool.open, pool.in_use) == (0, 0)
        assert all(connection.forgotten for connection in (idle, used))
        await pool.release(used)
        own = await _used_up(pool, 2)
        assert Counter(connection.number for connection in own) == Counter([3, 4])
        await _settled()
        assert not idle.closed
        assert not used.closed
        assert idle.sent == used.sent == []

    _run(main)


def test_a_new_event_loop_finds_the_whole_bound() -> None:
    """Also where the former one ended while a connection was in use, and while others waited for it."""
    server = _Server()
    pool = server.pool(2)

    async def first() -> None:
        held = await _got(pool)
        assert held.number == 1
        server.answers = [asyncio.Event()]
        for _ in range(3):
            _ = _ask(pool)
        await _settled()

    async def second() -> None:
        pool.forget()
        assert [connection.number for connection in await _used_up(pool, 2)] == [2, 3]
        waiter = _ask(pool)
        with pytest.raises(PoolTimeoutError):
            await waiter
        await pool.aclose()

    _run(first)
    _run(second)


def test_a_loop_that_was_closed_under_an_opening_does_not_widen_the_bound() -> None:
    """What was under way is dropped by the garbage collector, which changes nothing in the pool of the next loop."""
    server = _Server()
    pool = server.pool()
    server.answers = [asyncio.Event()]
    loop = _Loop()
    loop.set_exception_handler(lambda *_: None)  # a task is destroyed while it is pending: that is the test
    dropped = loop.create_task(_got(pool))

    async def look() -> None:
        await _settled()
        assert server.opening == 1

    loop.run_until_complete(look())
    loop.close()
    pool.forget()
    del dropped, loop
    gc.collect()
    assert pool._opening == 0


def test_no_number_of_tasks_opens_more_than_the_bound() -> None:
    """A thousand users, a fifth of them cancelled, and a connection now and then lost."""

    async def main() -> None:
        server = _Server()
        pool = server.pool(7, timeout=600.0)
        served = itertools.count()

        async def use(number: int) -> None:
            connection = await _got(pool, transactional=number % 2 == 0)
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

    _run(main)


@main_rows
def test_closing_a_store_closes_what_a_transaction_has_when_it_ends(row: Row, url: str, keyring: Keyring) -> None:
    """The idle ones at once; the last connection goes with the block that uses it."""

    async def main() -> None:
        store = open_store(url, keyring=keyring)
        await store.setup()
        await _store(store, "u1")
        source = source_of(store)
        async with AsyncExitStack() as stack:
            tx = await stack.enter_async_context(store.transaction())
            assert await tx.load_tokens("github", "u1")
            await _store(store, "u2")
            assert source.open == 2
            await store.aclose()
            assert source.open == source.in_use == 1
            with pytest.raises(StoreClosedError):
                await tx.load_tokens("github", "u1")
        assert source.open == 0
        await source.aclose()
        await Place(row, url).until_idle()

    asyncio.run(main())
