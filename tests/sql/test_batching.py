"""Requests that go together: who goes with whom, what each gets, and that nobody waits for ever."""

from __future__ import annotations

import asyncio

import pytest

from support.batched_requests import RequestDatabase, numbers
from support.waitless_loop import everybody_waits, run_waitless
from tokenstore_sql import batching


@pytest.mark.parametrize("alone", [False, True])
def test_a_lone_request_goes_at_once_in_its_callers_task(alone: bool) -> None:
    """Without a turn of the loop, and by the shorter way, where there is one."""

    async def main() -> None:
        database = RequestDatabase(width=2, alone=alone)
        call = database.subject.ask(1)
        task = asyncio.current_task()
        _ = call.send(None)  # as far as it gets by itself
        assert database.sent == [(1,)]
        assert database.trips[0].sender is task
        assert database.lone == [1] * alone
        call.close()
        first, second = database.ask(2, 3)
        await everybody_waits()
        assert database.sent == [(2,), (3,)]
        assert [trip.sender for trip in database.trips] == [first, second]
        await database.answer()
        await database.answer()
        assert await numbers([first, second]) == [2, 3]

    run_waitless(main)


def test_those_who_come_while_all_are_on_their_way_go_together_when_one_returns() -> None:
    """In the order in which they came, each with its own answer."""

    async def main() -> None:
        database = RequestDatabase(width=2)
        tasks = database.ask(1, 2, 3, 4, 5, 6)
        await everybody_waits()
        assert database.sent == [(1,), (2,)]
        await database.answer(1)
        assert database.sent == [(1,), (3, 4, 5, 6)]
        tasks += database.ask(7)
        await everybody_waits()
        assert database.sent == [(1,), (3, 4, 5, 6)]
        await database.answer(1)
        assert database.sent == [(1,), (7,)]
        await database.answer()
        await database.answer()
        assert await numbers(tasks) == [1, 2, 3, 4, 5, 6, 7]

    run_waitless(main)


def test_what_waits_is_shared_among_the_statements_that_may_go() -> None:
    """So that the database works on one while the other's answers are dealt with; a few are not worth sharing."""

    async def main() -> None:
        database = RequestDatabase(width=2)
        tasks = database.ask(*range(12))
        await everybody_waits()
        assert database.sent == [(0,), (1,)]
        for trip in database.trips:
            trip.answered.set_result(None)
        await everybody_waits()
        assert database.sent == [(2, 3, 4, 5, 6), (7, 8, 9, 10, 11)]
        tasks += database.ask(*range(12, 12 + batching._SPLIT_ABOVE))
        for trip in database.trips:
            trip.answered.set_result(None)
        await everybody_waits()
        assert database.sent == [tuple(range(12, 12 + batching._SPLIT_ABOVE))]
        await database.answer()
        assert await numbers(tasks) == list(range(len(tasks)))

    run_waitless(main)


def test_after_company_the_next_waits_for_a_turn_of_the_loop() -> None:
    """Others are likely to come in it; no time passes. Once somebody has gone by himself, nobody waits."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        database = RequestDatabase()
        tasks = database.ask(1, 2, 3)
        await everybody_waits()
        await database.answer()
        await database.answer()
        now = loop.time()
        tasks += database.ask(4, 5)
        await everybody_waits()
        assert database.sent == [(4, 5)]
        await database.answer()
        tasks += database.ask(6)
        await everybody_waits()
        await database.answer()
        tasks += database.ask(7)
        await asyncio.sleep(0)
        assert database.sent == [(7,)]
        assert database.trips[0].sender is tasks[-1]
        assert loop.time() == now
        await database.answer()
        assert await numbers(tasks) == [1, 2, 3, 4, 5, 6, 7]

    run_waitless(main)


def test_a_request_never_joins_what_has_been_sent() -> None:
    """The answer is taken after the request, so that who has stored something and then loads it finds it."""

    async def main() -> None:
        database = RequestDatabase()
        tasks = database.ask(1, 2)
        await everybody_waits()
        await database.answer()
        assert database.sent == [(2,)]
        database.clock = 1
        same = database.ask(2)  # what is asked is the same: it is asked again all the same
        await everybody_waits()
        assert database.sent == [(2,)]
        await database.answer()
        await database.answer()
        assert await asyncio.gather(*tasks, *same) == [(1, 0), (2, 0), (2, 1)]

    run_waitless(main)


def test_a_request_joins_what_still_waits_for_its_connection() -> None:
    """Until that is there, nothing has been sent, and one such statement is enough for all."""

    async def main() -> None:
        database = RequestDatabase(width=2, connected=False)
        tasks = database.ask(1, 2, 3)
        await everybody_waits()
        database.trips[0].connected.set_result(None)
        await everybody_waits()
        await database.answer()
        tasks += database.ask(4, 5)
        await asyncio.sleep(3 * batching._OVERDUE)
        assert len(database.trips) == 2
        database.trips[1].connected.set_result(None)
        await everybody_waits()
        assert database.sent == [(3, 4, 5)]
        database.trips[0].connected.set_result(None)
        await everybody_waits()
        for _ in range(2):
            await database.answer()
        assert await numbers(tasks) == [1, 2, 3, 4, 5]

    run_waitless(main)


def test_no_more_go_together_than_allowed() -> None:
    """The others go next, as soon as something has returned."""

    async def main() -> None:
        database = RequestDatabase(most=3)
        tasks = database.ask(*range(9))
        await everybody_waits()
        seen = []
        while database.trips:
            seen += database.sent
            await database.answer()
        assert seen == [(0,), (1, 2, 3), (4, 5, 6), (7, 8)]
        assert await numbers(tasks) == list(range(9))

    run_waitless(main)


def test_what_is_stuck_does_not_keep_others_waiting() -> None:
    """Beyond ``_OVERDUE`` they set out beside it, together; and so do those who come after them."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        database = RequestDatabase()
        stuck = database.ask(1)
        await everybody_waits()
        for round_ in (10, 20, 30):
            tasks = database.ask(round_, round_ + 1)
            started = loop.time()
            await everybody_waits()
            assert database.sent == [(1,)]
            await asyncio.sleep(1.01 * batching._OVERDUE)
            assert loop.time() == pytest.approx(started + 1.01 * batching._OVERDUE)
            assert database.sent == [(1,), (round_, round_ + 1)]
            await database.answer(1)
            assert await numbers(tasks) == [round_, round_ + 1]
        await database.answer()
        assert await numbers(stuck) == [1]

    run_waitless(main)


def test_a_batch_that_is_stuck_does_not_keep_others_waiting() -> None:
    """However many are stuck, there is another beside them for who comes later."""

    async def main() -> None:
        database = RequestDatabase(width=2)
        tasks = database.ask(*range(6))
        for number in range(6, 10):
            await asyncio.sleep(2 * batching._OVERDUE)
            tasks += database.ask(number)
        await asyncio.sleep(2 * batching._OVERDUE)
        assert database.sent == [(0,), (1,), (2, 3, 4, 5), (6,), (7,), (8,), (9,)]
        while database.trips:
            await database.answer()
        assert await numbers(tasks) == list(range(10))

    run_waitless(main)
