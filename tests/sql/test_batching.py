"""Requests that go together: who goes with whom, what each gets, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Executable

from support.database import Place
from support.matrix import Row, params
from support.polling import until
from tokenstore import AuthTokenStore, BackendError, BackendUnavailableError, Keyring, LockTimeoutError, open_store
from tokenstore.errors import TableMissingError
from tokenstore.records import TokenKey
from tokenstore.registry import backend_for_url
from tokenstore.testing.conformance import sealed
from tokenstore_sql import batching
from tokenstore_sql.base import SQLBackend
from tokenstore_sql.batching import Alone, Batches, Take
from tokenstore_sql.connection import DriverConnection, Result
from tokenstore_sql.sqlite import _SQLiteConnection

main_rows = pytest.mark.parametrize("row", params(names=["sqlite", "postgresql+asyncpg", "mariadb+asyncmy"]))
locking_rows = pytest.mark.parametrize("row", params(names=["postgresql+asyncpg", "mariadb+asyncmy"]))
# Long enough for whatever else the machine does.
_IN_TIME = 10.0


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


def _run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=_Loop) as runner:
        runner.run(main())


async def _settled() -> None:
    """Until nobody has anything left to do but wait. No time passes."""
    loop: Any = asyncio.get_running_loop()
    quiet = 0
    while quiet < 2:
        await asyncio.sleep(0)
        quiet = 0 if loop._ready else quiet + 1


# ---- A database of which the test decides when it does what


class _Trip:
    """One statement: first it waits for a connection, then it is sent, then answered."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.connected: asyncio.Future[None] = loop.create_future()
        self.answered: asyncio.Future[None] = loop.create_future()
        self.sender = asyncio.current_task()
        self.requests: Sequence[int] | None = None

    def fail(self, error: Exception) -> None:
        (self.answered if self.connected.done() else self.connected).set_exception(error)


class _Database:
    """Requests are numbers, which count up; an answer is the number and the clock at which the statement was sent."""

    def __init__(self, *, width: int = 1, most: int = 100, connected: bool = True, alone: bool = False) -> None:
        self.connected = connected
        self.trips: list[_Trip] = []
        self.lone: list[int] = []
        self.clock = 0
        self.subject = Batches[int, tuple[int, int]](
            self._carry_out,
            alone=self._alone if alone else None,
            width=width,
            most=most,
            restate=lambda error, request: type(error)(f"{request}: {error}"),
        )
        self.width, self.most = width, most

    async def _carry_out(self, take: Take[int]) -> Sequence[tuple[int, int]]:
        trip = _Trip()
        self.trips.append(trip)
        try:
            if self.connected:
                trip.connected.set_result(None)
            await trip.connected
            trip.requests = tuple(take())
            sent_at = self.clock
            assert len(trip.requests) <= self.most
            await trip.answered
        finally:
            self.trips.remove(trip)
        return [(request, sent_at) for request in trip.requests]

    async def _alone(self, request: int) -> tuple[int, int]:
        self.lone.append(request)
        ((answer),) = await self._carry_out(lambda: (request,))
        return answer

    def ask(self, *requests: int) -> list[asyncio.Task[tuple[int, int]]]:
        return [asyncio.create_task(self.subject.ask(request)) for request in requests]

    @property
    def sent(self) -> list[Sequence[int]]:
        """What is on its way, in the order in which it set out."""
        return [trip.requests for trip in self.trips if trip.requests is not None]

    async def answer(self, at: int = 0) -> None:
        self.trips[at].answered.set_result(None)
        await _settled()


async def _numbers(tasks: Sequence[Awaitable[tuple[int, int]]]) -> list[int]:
    return [number for number, _ in await asyncio.gather(*tasks)]


# ---- Who goes with whom


@pytest.mark.parametrize("alone", [False, True])
def test_a_lone_request_goes_at_once_in_its_callers_task(alone: bool) -> None:
    """Without a turn of the loop, and by the shorter way, where there is one."""

    async def main() -> None:
        database = _Database(width=2, alone=alone)
        call = database.subject.ask(1)
        task = asyncio.current_task()
        _ = call.send(None)  # as far as it gets by itself
        assert database.sent == [(1,)]
        assert database.trips[0].sender is task
        assert database.lone == [1] * alone
        call.close()
        first, second = database.ask(2, 3)
        await _settled()
        assert database.sent == [(2,), (3,)]
        assert [trip.sender for trip in database.trips] == [first, second]
        await database.answer()
        await database.answer()
        assert await _numbers([first, second]) == [2, 3]

    _run(main)


def test_those_who_come_while_all_are_on_their_way_go_together_when_one_returns() -> None:
    """In the order in which they came, each with its own answer."""

    async def main() -> None:
        database = _Database(width=2)
        tasks = database.ask(1, 2, 3, 4, 5, 6)
        await _settled()
        assert database.sent == [(1,), (2,)]
        await database.answer(1)
        assert database.sent == [(1,), (3, 4, 5, 6)]
        tasks += database.ask(7)
        await _settled()
        assert database.sent == [(1,), (3, 4, 5, 6)]
        await database.answer(1)
        assert database.sent == [(1,), (7,)]
        await database.answer()
        await database.answer()
        assert await _numbers(tasks) == [1, 2, 3, 4, 5, 6, 7]

    _run(main)


def test_what_waits_is_shared_among_the_statements_that_may_go() -> None:
    """So that the database works on one while the other's answers are dealt with; a few are not worth sharing."""

    async def main() -> None:
        database = _Database(width=2)
        tasks = database.ask(*range(12))
        await _settled()
        assert database.sent == [(0,), (1,)]
        for trip in database.trips:
            trip.answered.set_result(None)
        await _settled()
        assert database.sent == [(2, 3, 4, 5, 6), (7, 8, 9, 10, 11)]
        tasks += database.ask(*range(12, 12 + batching._WORTH_ONE))
        for trip in database.trips:
            trip.answered.set_result(None)
        await _settled()
        assert database.sent == [tuple(range(12, 12 + batching._WORTH_ONE))]
        await database.answer()
        assert await _numbers(tasks) == list(range(len(tasks)))

    _run(main)


def test_after_company_the_next_waits_for_a_turn_of_the_loop() -> None:
    """Others are likely to come in it; no time passes. Once somebody has gone by himself, nobody waits."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        database = _Database()
        tasks = database.ask(1, 2, 3)
        await _settled()
        await database.answer()
        await database.answer()
        now = loop.time()
        tasks += database.ask(4, 5)
        await _settled()
        assert database.sent == [(4, 5)]
        await database.answer()
        tasks += database.ask(6)
        await _settled()
        await database.answer()
        tasks += database.ask(7)
        await asyncio.sleep(0)
        assert database.sent == [(7,)]
        assert database.trips[0].sender is tasks[-1]
        assert loop.time() == now
        await database.answer()
        assert await _numbers(tasks) == [1, 2, 3, 4, 5, 6, 7]

    _run(main)


def test_a_request_never_joins_what_has_been_sent() -> None:
    """The answer is taken after the request, so that who has stored something and then loads it finds it."""

    async def main() -> None:
        database = _Database()
        tasks = database.ask(1, 2)
        await _settled()
        await database.answer()
        assert database.sent == [(2,)]
        database.clock = 1
        same = database.ask(2)  # what is asked is the same: it is asked again all the same
        await _settled()
        assert database.sent == [(2,)]
        await database.answer()
        await database.answer()
        assert await asyncio.gather(*tasks, *same) == [(1, 0), (2, 0), (2, 1)]

    _run(main)


def test_a_request_joins_what_still_waits_for_its_connection() -> None:
    """Until that is there, nothing has been sent, and one such statement is enough for all."""

    async def main() -> None:
        database = _Database(width=2, connected=False)
        tasks = database.ask(1, 2, 3)
        await _settled()
        database.trips[0].connected.set_result(None)
        await _settled()
        await database.answer()
        tasks += database.ask(4, 5)
        await asyncio.sleep(3 * batching._OVERDUE)
        assert len(database.trips) == 2
        database.trips[1].connected.set_result(None)
        await _settled()
        assert database.sent == [(3, 4, 5)]
        database.trips[0].connected.set_result(None)
        await _settled()
        for _ in range(2):
            await database.answer()
        assert await _numbers(tasks) == [1, 2, 3, 4, 5]

    _run(main)


def test_no_more_go_together_than_allowed() -> None:
    """The others go next, as soon as something has returned."""

    async def main() -> None:
        database = _Database(most=3)
        tasks = database.ask(*range(9))
        await _settled()
        seen = []
        while database.trips:
            seen += database.sent
            await database.answer()
        assert seen == [(0,), (1, 2, 3), (4, 5, 6), (7, 8)]
        assert await _numbers(tasks) == list(range(9))

    _run(main)


def test_what_is_stuck_does_not_keep_others_waiting() -> None:
    """Beyond ``_OVERDUE`` they set out beside it, together; and so do those who come after them."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        database = _Database()
        stuck = database.ask(1)
        await _settled()
        for round_ in (10, 20, 30):
            tasks = database.ask(round_, round_ + 1)
            started = loop.time()
            await _settled()
            assert database.sent == [(1,)]
            await asyncio.sleep(1.01 * batching._OVERDUE)
            assert loop.time() == pytest.approx(started + 1.01 * batching._OVERDUE)
            assert database.sent == [(1,), (round_, round_ + 1)]
            await database.answer(1)
            assert await _numbers(tasks) == [round_, round_ + 1]
        await database.answer()
        assert await _numbers(stuck) == [1]

    _run(main)


def test_a_batch_that_is_stuck_does_not_keep_others_waiting() -> None:
    """However many are stuck, there is another beside them for who comes later."""

    async def main() -> None:
        database = _Database(width=2)
        tasks = database.ask(*range(6))
        for number in range(6, 10):
            await asyncio.sleep(2 * batching._OVERDUE)
            tasks += database.ask(number)
        await asyncio.sleep(2 * batching._OVERDUE)
        assert database.sent == [(0,), (1,), (2, 3, 4, 5), (6,), (7,), (8,), (9,)]
        while database.trips:
            await database.answer()
        assert await _numbers(tasks) == list(range(10))

    _run(main)


# ---- Cancellation


def test_who_is_cancelled_before_setting_out_is_left_behind() -> None:
    """The others get their answers."""

    async def main() -> None:
        database = _Database()
        tasks = database.ask(1, 2, 3, 4)
        await _settled()
        tasks[2].cancel()
        await database.answer()
        assert database.sent == [(2, 4)]
        tasks[1].cancel()
        await database.answer()
        assert [task.cancelled() for task in tasks] == [False, True, True, False]
        assert await _numbers([tasks[0], tasks[3]]) == [1, 4]

    _run(main)


def test_when_a_lone_caller_is_cancelled_those_who_wait_set_out() -> None:
    """And when all who wait are cancelled, the next one is served as if nothing had been."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        database = _Database()
        tasks = database.ask(1, 2, 3)
        now = loop.time()
        await _settled()
        tasks[0].cancel()
        await _settled()
        assert database.sent == [(2, 3)]
        late = database.ask(4, 5)
        await _settled()
        for task in late:
            task.cancel()
        await database.answer()
        while database.trips:
            assert database.sent == [()]
            await database.answer()
        last = database.ask(6)
        await _settled()
        assert database.sent == [(6,)]
        await database.answer()
        assert await _numbers([*tasks[1:], *last]) == [2, 3, 6]
        assert loop.time() == now

    _run(main)


# ---- Failures


def test_every_caller_of_a_failed_batch_gets_an_error_of_its_own() -> None:
    """One that names what it asked for: an exception that several raise collects the tracebacks of all."""

    async def main() -> None:
        database = _Database()
        tasks = database.ask(1, 2, 3, 4)
        await _settled()
        await database.answer()
        database.trips[0].fail(BackendUnavailableError("gone"))
        found = await asyncio.gather(*tasks, return_exceptions=True)
        errors = [error for error in found if isinstance(error, BackendUnavailableError)]
        assert [str(error) for error in errors] == ["2: gone", "3: gone", "4: gone"]
        assert len({id(error) for error in errors}) == 3
        assert all(error.__cause__ is error.__context__ is None for error in errors)

    _run(main)


def test_alone_tells_each_to_send_its_request_by_itself() -> None:
    """Each gets a signal of its own."""

    async def main() -> None:
        database = _Database()
        database.subject._restate = lambda error, request: type(error)()
        tasks = database.ask(1, 2, 3)
        await _settled()
        await database.answer()
        database.trips[0].fail(Alone())
        await _settled()
        signals = [task.exception() for task in tasks[1:]]
        assert all(type(signal) is Alone for signal in signals)
        assert signals[0] is not signals[1]

    _run(main)


def test_without_a_connection_those_who_waited_are_told_and_not_those_who_came_later() -> None:
    """Who came while it was waited for tries again, with a whole ``pool_timeout`` of its own."""

    async def main() -> None:
        database = _Database(connected=False)
        tasks = database.ask(1, 2, 3)
        await _settled()
        database.trips[0].fail(BackendUnavailableError("none"))
        await _settled()
        assert str(tasks[0].exception()).endswith("none")
        [trip] = database.trips
        later = database.ask(4, 5)
        await _settled()
        trip.fail(BackendUnavailableError("none"))
        await _settled()
        assert [str(task.exception()) for task in tasks[1:]] == ["2: none", "3: none"]
        [trip] = database.trips
        trip.connected.set_result(None)
        await _settled()
        assert database.sent == [(4, 5)]
        await database.answer()
        assert await _numbers(later) == [4, 5]

    _run(main)


@pytest.mark.parametrize("fails", [False, True])
def test_what_returns_leaves_the_next_to_its_own_waiting(fails: bool) -> None:
    """One batch is on its way while another waits for its connection: what becomes of the one is not the other's."""

    async def main() -> None:
        database = _Database(connected=False)
        first = database.ask(1, 2, 3)
        await _settled()
        database.trips[0].connected.set_result(None)
        await _settled()
        await database.answer()
        database.trips[0].connected.set_result(None)
        await _settled()
        assert database.sent == [(2, 3)]
        second = database.ask(4, 5)
        await asyncio.sleep(2 * batching._OVERDUE)
        assert len(database.trips) == 2
        if fails:
            database.trips[0].fail(BackendUnavailableError("gone"))
        else:
            database.trips[0].answered.set_result(None)
        await _settled()
        assert all(task.done() for task in first), "its own have been told"
        assert not any(task.done() for task in second)
        third = database.ask(6)
        await _settled()
        [trip] = database.trips
        trip.connected.set_result(None)
        await _settled()
        assert database.sent == [(4, 5, 6)]
        await database.answer()
        assert await _numbers([*second, *third]) == [4, 5, 6]
        assert [task.exception() is not None for task in first] == [False, fails, fails]

    _run(main)


def test_closing_waits_for_what_is_on_its_way() -> None:
    """Also for what sets out meanwhile, as it had been asked before."""

    async def main() -> None:
        database = _Database(most=2)
        tasks = database.ask(1, 2, 3, 4)
        await _settled()
        await database.answer()
        closing = asyncio.create_task(database.subject.aclose())
        await _settled()
        assert not closing.done()
        await database.answer()
        assert database.sent == [(4,)]
        assert not closing.done()
        await database.answer()
        await closing
        assert await _numbers(tasks) == [1, 2, 3, 4]

    _run(main)


# ---- Any order of events


_EVENTS = st.one_of(
    st.tuples(st.just("ask"), st.integers(1, 4)),
    st.tuples(
        st.sampled_from(["connect", "answer", "answer", "fail", "alone", "break", "cancel"]),
        st.integers(0, 20),
    ),
    st.tuples(st.just("turn"), st.integers(1, 3)),
)
_PASS = st.tuples(st.just("pass"), st.integers(1, 3))


class _Broken(Exception):
    """No error of the backend's: of its own, it is nobody's in particular."""


class _Callers:
    """Tasks that ask, and what must hold whatever becomes of what they ask for."""

    def __init__(self, database: _Database) -> None:
        self.database = database
        self.tasks: list[asyncio.Task[None]] = []
        self.errors: list[BaseException] = []
        self.late = False

    async def call(self, number: int) -> None:
        asked_at = self.database.clock
        answer: Any = None
        error: BaseException | None = None
        try:
            answer = await self.database.subject.ask(number)
        except (BackendError, Alone, _Broken) as caught:
            error = caught
        if error is None:
            assert answer[0] == number, "somebody else's answer"
            assert answer[1] >= asked_at, "the answer is older than the request"
        elif not isinstance(error, _Broken):
            assert all(error is not other for other in self.errors), "an error is shared"
            self.errors.append(error)
            assert str(error).startswith(f"{number}: "), "somebody else's error"

    def step(self, what: str, which: int) -> None:
        database = self.database
        database.clock += 1
        trips = database.trips
        live = [task for task in self.tasks if not task.done()]
        if what == "ask":
            start = len(self.tasks)
            self.tasks += [asyncio.create_task(self.call(number)) for number in range(start, start + which)]
        elif what == "cancel" and live:
            live[which % len(live)].cancel()
        elif trips:
            trip = trips[which % len(trips)]
            if trip.connected.done() and trip.requests is None:
                return  # it is about to go
            pending = trip.answered if trip.connected.done() else trip.connected
            if pending.done():
                return
            if what in ("connect", "answer"):
                if (what == "answer") == trip.connected.done():
                    pending.set_result(None)
            elif what == "fail":
                pending.set_exception(BackendUnavailableError("gone"))
            elif what == "alone" and len(trip.requests or ()) > 1:
                pending.set_exception(Alone("together"))
            elif what == "break":
                pending.set_exception(_Broken())

    def check(self) -> None:
        sent = [request for requests in self.database.sent for request in requests]
        assert len(sent) == len(set(sent)), "sent twice"
        if not self.late:
            assert len(self.database.trips) <= self.database.width

    async def end(self) -> None:
        """Everything is answered, and nobody needs a timer for it."""
        loop = asyncio.get_running_loop()
        now, turns = loop.time(), 0
        while not all(task.done() for task in self.tasks):
            turns += 1
            assert turns < 10_000, "somebody waits for ever, or for a timer"
            for trip in self.database.trips:
                for event in (trip.connected, trip.answered):
                    if not event.done():
                        event.set_result(None)
            await asyncio.sleep(0)
            self.check()
            assert loop.time() == now, "somebody waits for a timer"
        await _settled()
        while self.database.trips:  # what nobody waits for any more
            for trip in self.database.trips:
                for event in (trip.connected, trip.answered):
                    if not event.done():
                        event.set_result(None)
            await _settled()
        for task in self.tasks:
            assert task.cancelled() or task.exception() is None
        subject = self.database.subject
        await subject.aclose()
        assert (subject._sent, subject._preparing, list(subject._waiting)) == (0, False, [])


@given(
    width=st.integers(1, 3),
    most=st.integers(1, 4),
    connected=st.booleans(),
    alone=st.booleans(),
    events=st.lists(_EVENTS, max_size=60) | st.lists(_EVENTS | _PASS, max_size=60),
)
def test_no_order_of_events_leaves_somebody_waiting(
    width: int, most: int, connected: bool, alone: bool, events: list[tuple[str, int]]
) -> None:
    """Each gets one answer, or one error, of its own, which is no older than its request; and nobody waits for ever."""

    async def main() -> None:
        database = _Database(width=width, most=most, connected=connected, alone=alone)
        callers = _Callers(database)
        for what, which in events:
            if what == "turn":
                for _ in range(which):
                    await asyncio.sleep(0)
                    callers.check()
            elif what == "pass":
                callers.late = True
                await asyncio.sleep(which * batching._OVERDUE)
            else:
                callers.step(what, which)
            callers.check()
        await callers.end()

    _run(main)


# ---- On real rows


@asynccontextmanager
async def _opened(url: str, *, rows: int = 0, **options: Any) -> AsyncIterator[SQLBackend]:
    backend: Any = backend_for_url(url, options)
    try:
        await backend.setup()
        if rows:
            await backend.put({_key(number): sealed(f"old-{number}") for number in range(rows)})
        yield backend
    finally:
        await backend.aclose()


def _key(number: int) -> TokenKey:
    return TokenKey("github", f"u{number}")


@contextmanager
def _statements() -> Iterator[list[str]]:
    """What stores send over connections of their own; SQLite's batches count as one each."""
    sent: list[str] = []
    really, really_each = DriverConnection.run, _SQLiteConnection.run_each

    async def noted(connection: DriverConnection, statement: Executable, *parameters: Any) -> Result:
        sent.append(str(statement))
        return await really(connection, statement, *parameters)

    async def noted_each(connection: _SQLiteConnection, statement: Executable, parameters: Any) -> list[Result]:
        sent.append(str(statement))
        return await really_each(connection, statement, parameters)

    with (
        mock.patch.object(DriverConnection, "run", noted),
        mock.patch.object(_SQLiteConnection, "run_each", noted_each),
    ):
        yield sent


@main_rows
def test_each_of_many_loads_gets_its_own_record(row: Row, url: str) -> None:
    """200 at once, of 50 keys: some of them missing, each asked for more than once, by itself or among others."""

    async def main() -> None:
        async with _opened(url, rows=40) as backend:
            with _statements() as sent:
                found = await asyncio.gather(*(backend.get([_key(number % 50)]) for number in range(200)))
            for number, (record,) in enumerate(found):
                if number % 50 >= 40:
                    assert record is None
                else:
                    assert record is not None
                    assert record.key == _key(number % 50)
                    assert record.tokens == sealed(f"old-{number % 50}")
            assert len(sent) <= 40, "they do not go together"
            several = [_key(7), _key(45), _key(7), _key(0)]
            keys = [record and record.key for record in await backend.get(several)]
            assert keys == [_key(7), None, _key(7), _key(0)]

    asyncio.run(main())


@pytest.mark.parametrize(
    "row", params(names=["sqlite", "postgresql+asyncpg", "mariadb+asyncmy", "mysql9+asyncmy"], shared=True)
)
def test_several_rows_are_looked_up_by_their_keys(row: Row, url: str) -> None:
    """Also in a small table, as the database knows from its statistics: the cost does not depend on the size."""
    analyze, explain, by_key, whole = {
        "sqlite": ("ANALYZE", "EXPLAIN QUERY PLAN", "SEARCH", "SCAN "),
        "postgres": ("ANALYZE", "EXPLAIN", "Index Cond", "Seq Scan"),
        "mysql": ("ANALYZE TABLE", "EXPLAIN", "range", "ALL"),
    }[row.mark]

    async def main() -> None:
        async with _opened(url, rows=1000) as backend:
            keys = [_key(number) for number in range(60)]
            await backend.get(keys)
            statement, parameters = backend.statements.get_many(keys)
            connection = backend._source.take()
            assert connection is not None
            compiled = connection._compiler(statement)
            await connection.send(f"{analyze} {backend.table.name}", (), True)
            plan, _ = await connection.send(f"{explain} {compiled.sql}", compiled.arguments(parameters), True)
            backend._source.put_back(connection)
            words = "\n".join(str(value) for line in plan for value in tuple(line))
            assert by_key in words
            assert whole not in words

    asyncio.run(main())


@main_rows
def test_each_of_many_stores_is_one_write(row: Row, url: str) -> None:
    """Of one key by two backends, beside others': the generation grows by one with each."""

    async def main() -> None:
        async with _opened(url, rows=3) as one, _opened(url) as other:
            (before,) = await one.get([_key(0)])
            assert before is not None
            await asyncio.gather(
                *(backend.put({_key(0): sealed(f"new-{n}")}) for n in range(20) for backend in (one, other)),
                *(one.put({_key(100 + n): sealed(f"{n}")}) for n in range(60)),
            )
            (after,) = await other.get([_key(0)])
            assert after is not None
            assert after.generation == before.generation + 40
            assert after.tokens in [sealed(f"new-{n}") for n in range(20)]
            found = await one.get([_key(100 + n) for n in range(60)])
            assert [record and record.tokens for record in found] == [sealed(f"{n}") for n in range(60)]

    asyncio.run(main())


@main_rows
def test_what_was_stored_is_what_a_load_finds(row: Row, url: str) -> None:
    """However many others load and store at the same time: no load joins one that was sent before its store."""

    async def main() -> None:
        async with _opened(url, rows=20) as backend:

            async def use(number: int) -> None:
                for turn in range(5):
                    await backend.put({_key(number): sealed(f"{number}-{turn}")})
                    (record,) = await backend.get([_key(number)])
                    assert record is not None
                    assert record.tokens == sealed(f"{number}-{turn}")

            await asyncio.gather(*map(use, range(20)))

    asyncio.run(main())


@locking_rows
def test_a_row_that_somebody_holds_does_not_keep_the_others(row: Row, url: str) -> None:
    """50 stores of other rows, one of which goes along with the locked one's, end long before ``lock_timeout``."""

    async def main() -> None:
        place = Place(row, url)
        async with _opened(url, rows=51, lock_timeout=10 * _IN_TIME) as backend:
            async with place.held("u10"):
                stores = [asyncio.create_task(backend.put({_key(n): sealed("new")})) for n in range(51)]
                locked = stores.pop(10)
                async with asyncio.timeout(_IN_TIME):
                    await asyncio.gather(*stores)
                    await asyncio.gather(*(backend.get([_key(n)]) for n in range(51)))
                    await place.until_waiting()
                assert not locked.done()
            await locked
            found = await backend.get([_key(n) for n in range(51)])
            assert all(record is not None and record.tokens == sealed("new") for record in found)

    asyncio.run(main())


@locking_rows
def test_only_who_asked_for_the_held_row_is_told(row: Row, url: str) -> None:
    """Its lock is not free in time; those that went with it are stored, and know nothing of it."""

    async def main() -> None:
        place = Place(row, url)
        async with _opened(url, rows=12, lock_timeout=1) as backend:
            async with place.held("u10"):
                stores = [backend.put({_key(n): sealed("new")}) for n in range(12)]
                ends = await asyncio.gather(*stores, return_exceptions=True)
            locked = ends.pop(10)
            assert type(locked) is LockTimeoutError
            assert str(_key(10)) in str(locked)
            assert ends == [None] * 11
            (record,) = await backend.get([_key(10)])
            assert record is not None
            assert record.tokens == sealed("old-10")
            assert backend._source.in_use == 0

    asyncio.run(main())


@pytest.mark.parametrize("row", params(names=["sqlite"]))
def test_sqlite_s_one_writer_is_waited_for_together(row: Row, url: str) -> None:
    """All stores wait on one connection; loads go on; afterwards everything is stored."""

    async def main() -> None:
        place = Place(row, url)
        async with _opened(url, rows=50, lock_timeout=10 * _IN_TIME) as backend:
            async with place.held("u10"):
                stores = [asyncio.create_task(backend.put({_key(n): sealed("new")})) for n in range(50)]
                await until(lambda: backend._source.in_use > 0)
                async with asyncio.timeout(_IN_TIME):
                    await asyncio.gather(*(backend.get([_key(n)]) for n in range(50)))
                assert not any(store.done() for store in stores)
                assert backend._source.in_use == 1
            await asyncio.gather(*stores)
            found = await backend.get([_key(n) for n in range(50)])
            assert all(record is not None and record.tokens == sealed("new") for record in found)

    asyncio.run(main())


@main_rows
@pytest.mark.parametrize("write", [False, True])
def test_what_fails_for_all_is_told_to_each(row: Row, url: str, write: bool) -> None:
    """Without its table each caller gets an error of its own, which names its row."""

    async def main() -> None:
        async with _opened(url) as backend:
            await backend.drop()
            calls: list[Coroutine[Any, Any, object]] = [
                backend.put({_key(n): sealed()}) if write else backend.get([_key(n)]) for n in range(20)
            ]
            ends = await asyncio.gather(*calls, return_exceptions=True)
            assert all(type(end) is TableMissingError for end in ends)
            assert len({id(end) for end in ends}) == 20
            for number, end in enumerate(ends):
                assert str(end).startswith(f"{_key(number)}: the token table does not exist")

    asyncio.run(main())


@main_rows
def test_a_cancelled_caller_takes_nobody_along(row: Row, url: str) -> None:
    """Those who were to go with it get their answers, and the pool is whole."""

    async def main() -> None:
        async with _opened(url, rows=60) as backend:
            loads = [asyncio.create_task(backend.get([_key(n)])) for n in range(60)]
            stores = [asyncio.create_task(backend.put({_key(n): sealed("new")})) for n in range(60)]
            await asyncio.sleep(0)
            for n, task in enumerate([*loads, *stores]):
                if n % 3 == 0:
                    task.cancel()
            for n, [record] in enumerate(await asyncio.gather(*[t for n, t in enumerate(loads) if n % 3])):
                assert record is not None
                assert record.key == _key(n // 2 * 3 + n % 2 + 1)
            await asyncio.gather(*[task for n, task in enumerate(stores) if n % 3])
            await asyncio.wait([*loads, *stores])
            await until(lambda: backend._source.in_use == 0)
            found = await backend.get([_key(n) for n in range(60) if n % 3])
            assert all(record is not None and record.tokens == sealed("new") for record in found)

    asyncio.run(main())


async def _refused(_: object) -> Any:
    raise AssertionError("the provider is called for a valid token")


@asynccontextmanager
async def _store_of(url: str, keyring: Keyring) -> AsyncIterator[AuthTokenStore]:
    async with open_store(url, keyring=keyring) as store:
        await store.setup()
        for user in ("hot", "other"):
            await store.store_tokens("github", user, f"gho_{user}", None, datetime.now(UTC) + timedelta(days=1))
            assert await store.load_tokens("github", user)
        yield store


@main_rows
def test_a_crowd_of_callers_takes_few_statements(row: Row, url: str, keyring: Keyring) -> None:
    """200 at once, on one row with a valid token."""

    async def main() -> None:
        async with _store_of(url, keyring) as store:
            with _statements() as sent:
                records = await asyncio.gather(
                    *(store.load_fresh_tokens("github", "hot", refresh=_refused) for _ in range(200))
                )
            assert all(record is not None and record["access_token"] == "gho_hot" for record in records)
            assert len(sent) <= 20

    asyncio.run(main())


@main_rows
def test_a_crowd_does_not_starve_another_row(row: Row, url: str, keyring: Keyring) -> None:
    """A load of another row ends while 200 callers ask again and again for one row."""

    async def main() -> None:
        async with _store_of(url, keyring) as store:
            enough = False

            async def crowd() -> None:
                while not enough:
                    assert await store.load_fresh_tokens("github", "hot", refresh=_refused)

            tasks = [asyncio.create_task(crowd()) for _ in range(200)]
            try:
                async with asyncio.timeout(_IN_TIME):
                    for _ in range(3):
                        record = await store.load_tokens("github", "other")
                        assert record is not None
                        assert record["access_token"] == "gho_other"
            finally:
                enough = True
                await asyncio.gather(*tasks)

    asyncio.run(main())
