"""Who is told of a batch that fails, of a cancellation, and of the end."""

from __future__ import annotations

import asyncio

import pytest

from support.batched_requests import RequestDatabase, numbers
from support.waitless_loop import everybody_waits, run_waitless
from tokenstore import BackendUnavailableError
from tokenstore_sql import batching
from tokenstore_sql.batching import SendAlone

# ---- Cancellation


def test_who_is_cancelled_before_setting_out_is_left_behind() -> None:
    """The others get their answers."""

    async def main() -> None:
        database = RequestDatabase()
        tasks = database.ask(1, 2, 3, 4)
        await everybody_waits()
        tasks[2].cancel()
        await database.answer()
        assert database.sent == [(2, 4)]
        tasks[1].cancel()
        await database.answer()
        assert [task.cancelled() for task in tasks] == [False, True, True, False]
        assert await numbers([tasks[0], tasks[3]]) == [1, 4]

    run_waitless(main)


def test_when_a_lone_caller_is_cancelled_those_who_wait_set_out() -> None:
    """And when all who wait are cancelled, the next one is served as if nothing had been."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        database = RequestDatabase()
        tasks = database.ask(1, 2, 3)
        now = loop.time()
        await everybody_waits()
        tasks[0].cancel()
        await everybody_waits()
        assert database.sent == [(2, 3)]
        late = database.ask(4, 5)
        await everybody_waits()
        for task in late:
            task.cancel()
        await database.answer()
        while database.trips:
            assert database.sent == [()]
            await database.answer()
        last = database.ask(6)
        await everybody_waits()
        assert database.sent == [(6,)]
        await database.answer()
        assert await numbers([*tasks[1:], *last]) == [2, 3, 6]
        assert loop.time() == now

    run_waitless(main)


# ---- Failures


def test_every_caller_of_a_failed_batch_gets_an_error_of_its_own() -> None:
    """One that names what it asked for: an exception that several raise collects the tracebacks of all."""

    async def main() -> None:
        database = RequestDatabase()
        tasks = database.ask(1, 2, 3, 4)
        await everybody_waits()
        await database.answer()
        database.trips[0].fail(BackendUnavailableError("gone"))
        found = await asyncio.gather(*tasks, return_exceptions=True)
        errors = [error for error in found if isinstance(error, BackendUnavailableError)]
        assert [str(error) for error in errors] == ["2: gone", "3: gone", "4: gone"]
        assert len({id(error) for error in errors}) == 3
        assert all(error.__cause__ is error.__context__ is None for error in errors)

    run_waitless(main)


def test_alone_tells_each_to_send_its_request_by_itself() -> None:
    """Each gets a signal of its own."""

    async def main() -> None:
        database = RequestDatabase()
        tasks = database.ask(1, 2, 3)
        await everybody_waits()
        await database.answer()
        database.trips[0].fail(SendAlone())
        await everybody_waits()
        signals = [task.exception() for task in tasks[1:]]
        assert all(type(signal) is SendAlone for signal in signals)
        assert signals[0] is not signals[1]

    run_waitless(main)


def test_without_a_connection_those_who_waited_are_told_and_not_those_who_came_later() -> None:
    """Who came while it was waited for tries again, with a whole ``pool_timeout`` of its own."""

    async def main() -> None:
        database = RequestDatabase(connected=False)
        tasks = database.ask(1, 2, 3)
        await everybody_waits()
        database.trips[0].fail(BackendUnavailableError("none"))
        await everybody_waits()
        assert str(tasks[0].exception()).endswith("none")
        [trip] = database.trips
        later = database.ask(4, 5)
        await everybody_waits()
        trip.fail(BackendUnavailableError("none"))
        await everybody_waits()
        assert [str(task.exception()) for task in tasks[1:]] == ["2: none", "3: none"]
        [trip] = database.trips
        trip.connected.set_result(None)
        await everybody_waits()
        assert database.sent == [(4, 5)]
        await database.answer()
        assert await numbers(later) == [4, 5]

    run_waitless(main)


@pytest.mark.parametrize("fails", [False, True])
def test_what_returns_leaves_the_next_to_its_own_waiting(fails: bool) -> None:
    """One batch is on its way while another waits for its connection: what becomes of the one is not the other's."""

    async def main() -> None:
        database = RequestDatabase(connected=False)
        first = database.ask(1, 2, 3)
        await everybody_waits()
        database.trips[0].connected.set_result(None)
        await everybody_waits()
        await database.answer()
        database.trips[0].connected.set_result(None)
        await everybody_waits()
        assert database.sent == [(2, 3)]
        second = database.ask(4, 5)
        await asyncio.sleep(2 * batching._OVERDUE)
        assert len(database.trips) == 2
        if fails:
            database.trips[0].fail(BackendUnavailableError("gone"))
        else:
            database.trips[0].answered.set_result(None)
        await everybody_waits()
        assert all(task.done() for task in first), "its own have been told"
        assert not any(task.done() for task in second)
        third = database.ask(6)
        await everybody_waits()
        [trip] = database.trips
        trip.connected.set_result(None)
        await everybody_waits()
        assert database.sent == [(4, 5, 6)]
        await database.answer()
        assert await numbers([*second, *third]) == [4, 5, 6]
        assert [task.exception() is not None for task in first] == [False, fails, fails]

    run_waitless(main)


def test_closing_waits_for_what_is_on_its_way() -> None:
    """Also for what sets out meanwhile, as it had been asked before."""

    async def main() -> None:
        database = RequestDatabase(most=2)
        tasks = database.ask(1, 2, 3, 4)
        await everybody_waits()
        await database.answer()
        closing = asyncio.create_task(database.subject.aclose())
        await everybody_waits()
        assert not closing.done()
        await database.answer()
        assert database.sent == [(4,)]
        assert not closing.done()
        await database.answer()
        await closing
        assert await numbers(tasks) == [1, 2, 3, 4]

    run_waitless(main)
