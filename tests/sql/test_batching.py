"""Batching: which requests share a statement, which answer each request gets, and that no request waits for ever."""

from __future__ import annotations

import asyncio

import pytest

from support.batched_requests import RequestDatabase, numbers
from support.fake_clock_loop import run_with_fake_clock, until_all_wait
from tokenstore_sql import batching


@pytest.mark.parametrize("alone", [False, True])
def test_a_single_request_is_sent_at_once_in_its_caller_s_task(alone: bool) -> None:
    """It is sent without a step of the event loop, and with ``send_one`` if that is overridden."""

    async def main() -> None:
        database = RequestDatabase(width=2, alone=alone)
        call = database.batches.ask(1)
        task = asyncio.current_task()
        _ = call.send(None)  # runs the coroutine until it first suspends
        assert database.sent == [(1,)]
        assert database.statements[0].sender is task
        assert database.lone == [1] * alone
        call.close()
        first, second = database.ask(2, 3)
        await until_all_wait()
        assert database.sent == [(2,), (3,)]
        assert [statement.sender for statement in database.statements] == [first, second]
        await database.answer()
        await database.answer()
        assert await numbers([first, second]) == [2, 3]

    run_with_fake_clock(main)


def test_requests_made_while_all_statements_are_busy_share_the_next_statement() -> None:
    """They are sent in the order in which they were made, and each gets its own answer."""

    async def main() -> None:
        database = RequestDatabase(width=2)
        tasks = database.ask(1, 2, 3, 4, 5, 6)
        await until_all_wait()
        assert database.sent == [(1,), (2,)]
        await database.answer(1)
        assert database.sent == [(1,), (3, 4, 5, 6)]
        tasks += database.ask(7)
        await until_all_wait()
        assert database.sent == [(1,), (3, 4, 5, 6)]
        await database.answer(1)
        assert database.sent == [(1,), (7,)]
        await database.answer()
        await database.answer()
        assert await numbers(tasks) == [1, 2, 3, 4, 5, 6, 7]

    run_with_fake_clock(main)


def test_waiting_requests_are_divided_among_the_free_statements() -> None:
    """So the database executes one statement while the results of another are processed; few requests stay together."""

    async def main() -> None:
        database = RequestDatabase(width=2)
        tasks = database.ask(*range(12))
        await until_all_wait()
        assert database.sent == [(0,), (1,)]
        for statement in database.statements:
            statement.answered.set_result(None)
        await until_all_wait()
        assert database.sent == [(2, 3, 4, 5, 6), (7, 8, 9, 10, 11)]
        tasks += database.ask(*range(12, 12 + batching._SPLIT_ABOVE))
        for statement in database.statements:
            statement.answered.set_result(None)
        await until_all_wait()
        assert database.sent == [tuple(range(12, 12 + batching._SPLIT_ABOVE))]
        await database.answer()
        assert await numbers(tasks) == list(range(len(tasks)))

    run_with_fake_clock(main)


def test_after_a_shared_statement_the_next_request_waits_one_step_of_the_event_loop() -> None:
    """More requests are likely to come in that step. After a statement with a single request there is no wait."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        database = RequestDatabase()
        tasks = database.ask(1, 2, 3)
        await until_all_wait()
        await database.answer()
        await database.answer()
        now = loop.time()
        tasks += database.ask(4, 5)
        await until_all_wait()
        assert database.sent == [(4, 5)]
        await database.answer()
        tasks += database.ask(6)
        await until_all_wait()
        await database.answer()
        tasks += database.ask(7)
        await asyncio.sleep(0)
        assert database.sent == [(7,)]
        assert database.statements[0].sender is tasks[-1]
        assert loop.time() == now
        await database.answer()
        assert await numbers(tasks) == [1, 2, 3, 4, 5, 6, 7]

    run_with_fake_clock(main)


def test_a_request_never_shares_a_statement_that_was_already_sent() -> None:
    """Otherwise a caller that has stored a row and then loads it could get the older row."""

    async def main() -> None:
        database = RequestDatabase()
        tasks = database.ask(1, 2)
        await until_all_wait()
        await database.answer()
        assert database.sent == [(2,)]
        database.clock = 1
        same = database.ask(2)  # the same request is sent again
        await until_all_wait()
        assert database.sent == [(2,)]
        await database.answer()
        await database.answer()
        assert await asyncio.gather(*tasks, *same) == [(1, 0), (2, 0), (2, 1)]

    run_with_fake_clock(main)


def test_a_request_joins_a_batch_that_waits_for_a_connection() -> None:
    """That batch is not sent yet, and only one batch at a time waits for a connection."""

    async def main() -> None:
        database = RequestDatabase(width=2, connected=False)
        tasks = database.ask(1, 2, 3)
        await until_all_wait()
        database.statements[0].connected.set_result(None)
        await until_all_wait()
        await database.answer()
        tasks += database.ask(4, 5)
        await asyncio.sleep(3 * batching._OVERDUE)
        assert len(database.statements) == 2
        database.statements[1].connected.set_result(None)
        await until_all_wait()
        assert database.sent == [(3, 4, 5)]
        database.statements[0].connected.set_result(None)
        await until_all_wait()
        for _ in range(2):
            await database.answer()
        assert await numbers(tasks) == [1, 2, 3, 4, 5]

    run_with_fake_clock(main)


def test_a_statement_has_no_more_requests_than_allowed() -> None:
    """The other requests are sent as soon as a statement is answered."""

    async def main() -> None:
        database = RequestDatabase(most=3)
        tasks = database.ask(*range(9))
        await until_all_wait()
        seen = []
        while database.statements:
            seen += database.sent
            await database.answer()
        assert seen == [(0,), (1, 2, 3), (4, 5, 6), (7, 8)]
        assert await numbers(tasks) == list(range(9))

    run_with_fake_clock(main)


def test_an_overdue_single_statement_does_not_delay_other_requests() -> None:
    """After ``_OVERDUE`` seconds the waiting requests are sent in another statement, and so are later ones."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        database = RequestDatabase()
        stuck = database.ask(1)
        await until_all_wait()
        for round_ in (10, 20, 30):
            tasks = database.ask(round_, round_ + 1)
            started = loop.time()
            await until_all_wait()
            assert database.sent == [(1,)]
            await asyncio.sleep(1.01 * batching._OVERDUE)
            assert loop.time() == pytest.approx(started + 1.01 * batching._OVERDUE)
            assert database.sent == [(1,), (round_, round_ + 1)]
            await database.answer(1)
            assert await numbers(tasks) == [round_, round_ + 1]
        await database.answer()
        assert await numbers(stuck) == [1]

    run_with_fake_clock(main)


def test_overdue_batches_do_not_delay_later_requests() -> None:
    """However many statements are overdue, a later request gets another one."""

    async def main() -> None:
        database = RequestDatabase(width=2)
        tasks = database.ask(*range(6))
        for number in range(6, 10):
            await asyncio.sleep(2 * batching._OVERDUE)
            tasks += database.ask(number)
        await asyncio.sleep(2 * batching._OVERDUE)
        assert database.sent == [(0,), (1,), (2, 3, 4, 5), (6,), (7,), (8,), (9,)]
        while database.statements:
            await database.answer()
        assert await numbers(tasks) == list(range(10))

    run_with_fake_clock(main)
