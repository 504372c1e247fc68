"""Batching: in every order of events, each request gets its own answer or error."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from support.batched_requests import RequestDatabase
from support.fake_clock_loop import run_with_fake_clock, until_all_wait
from tokenstore import BackendError, BackendUnavailableError
from tokenstore_sql import batching
from tokenstore_sql.batching import SendAlone

_EVENTS = st.one_of(
    st.tuples(st.just("ask"), st.integers(1, 4)),
    st.tuples(
        st.sampled_from(["connect", "answer", "answer", "fail", "alone", "break", "cancel"]),
        st.integers(0, 20),
    ),
    st.tuples(st.just("loop step"), st.integers(1, 3)),
)
_TIME_PASSES = st.tuples(st.just("time passes"), st.integers(1, 3))


class _Broken(Exception):
    """An unexpected error, which all callers of a batch may share."""


class _Callers:
    """Tasks that make requests, and the checks of their answers and errors."""

    def __init__(self, database: RequestDatabase) -> None:
        self.database = database
        self.tasks: list[asyncio.Task[None]] = []
        self.errors: list[BaseException] = []
        self.late = False

    async def call(self, number: int) -> None:
        asked_at = self.database.clock
        answer: Any = None
        error: BaseException | None = None
        try:
            answer = await self.database.batches.ask(number)
        except (BackendError, SendAlone, _Broken) as caught:
            error = caught
        if error is None:
            assert answer[0] == number, "the answer to another caller's request"
            assert answer[1] >= asked_at, "the answer is older than the request"
        elif not isinstance(error, _Broken):
            assert all(error is not other for other in self.errors), "two callers got the same exception object"
            self.errors.append(error)
            assert str(error).startswith(f"{number}: "), "the error names another caller's request"

    def step(self, what: str, which: int) -> None:
        database = self.database
        database.clock += 1
        statements = database.statements
        live = [task for task in self.tasks if not task.done()]
        if what == "ask":
            start = len(self.tasks)
            self.tasks += [asyncio.create_task(self.call(number)) for number in range(start, start + which)]
        elif what == "cancel" and live:
            live[which % len(live)].cancel()
        elif statements:
            statement = statements[which % len(statements)]
            if statement.connected.done() and statement.requests is None:
                return  # its requests are about to be taken
            pending = statement.answered if statement.connected.done() else statement.connected
            if pending.done():
                return
            if what in ("connect", "answer"):
                if (what == "answer") == statement.connected.done():
                    pending.set_result(None)
            elif what == "fail":
                pending.set_exception(BackendUnavailableError("gone"))
            elif what == "alone" and len(statement.requests or ()) > 1:
                pending.set_exception(SendAlone("together"))
            elif what == "break":
                pending.set_exception(_Broken())

    def check(self) -> None:
        sent = [request for requests in self.database.sent for request in requests]
        assert len(sent) == len(set(sent)), "a request was sent twice"
        if not self.late:
            assert len(self.database.statements) <= self.database.width

    async def end(self) -> None:
        """Answer all statements; all callers must end, and none may need a timer."""
        loop = asyncio.get_running_loop()
        now, steps = loop.time(), 0
        while not all(task.done() for task in self.tasks):
            steps += 1
            assert steps < 10_000, "a caller waits for ever, or for a timer"
            for statement in self.database.statements:
                for event in (statement.connected, statement.answered):
                    if not event.done():
                        event.set_result(None)
            await asyncio.sleep(0)
            self.check()
            assert loop.time() == now, "a caller waits for a timer"
        await until_all_wait()
        while self.database.statements:  # statements whose callers were all cancelled
            for statement in self.database.statements:
                for event in (statement.connected, statement.answered):
                    if not event.done():
                        event.set_result(None)
            await until_all_wait()
        for task in self.tasks:
            assert task.cancelled() or task.exception() is None
        batches = self.database.batches
        await batches.aclose()
        assert (batches._sent, batches._preparing, list(batches._waiting)) == (0, False, [])


@given(
    width=st.integers(1, 3),
    most=st.integers(1, 4),
    connected=st.booleans(),
    alone=st.booleans(),
    events=st.lists(_EVENTS, max_size=60) | st.lists(_EVENTS | _TIME_PASSES, max_size=60),
)
def test_in_every_order_of_events_each_request_gets_its_answer_or_error(
    width: int, most: int, connected: bool, alone: bool, events: list[tuple[str, int]]
) -> None:
    """The answer is from a statement that was sent after the request, and no caller waits for ever."""

    async def main() -> None:
        database = RequestDatabase(width=width, most=most, connected=connected, alone=alone)
        callers = _Callers(database)
        for what, which in events:
            if what == "loop step":
                for _ in range(which):
                    await asyncio.sleep(0)
                    callers.check()
            elif what == "time passes":
                callers.late = True
                await asyncio.sleep(which * batching._OVERDUE)
            else:
                callers.step(what, which)
            callers.check()
        await callers.end()

    run_with_fake_clock(main)
