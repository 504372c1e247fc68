"""No order of events leaves a request without its answer."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from support.batched_requests import RequestDatabase
from support.waitless_loop import everybody_waits, run_waitless
from tokenstore import BackendError, BackendUnavailableError
from tokenstore_sql import batching
from tokenstore_sql.batching import SendAlone

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
            answer = await self.database.subject.ask(number)
        except (BackendError, SendAlone, _Broken) as caught:
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
                pending.set_exception(SendAlone("together"))
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
        await everybody_waits()
        while self.database.trips:  # what nobody waits for any more
            for trip in self.database.trips:
                for event in (trip.connected, trip.answered):
                    if not event.done():
                        event.set_result(None)
            await everybody_waits()
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
        database = RequestDatabase(width=width, most=most, connected=connected, alone=alone)
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

    run_waitless(main)
