"""Batching: failed batches, cancelled callers and closing."""

from __future__ import annotations

import asyncio

import pytest

from support.batched_requests import RequestDatabase, numbers
from support.fake_clock_loop import run_with_fake_clock, until_all_wait
from tokenstore import BackendUnavailableError
from tokenstore_sql import batching
from tokenstore_sql.batching import SendAlone

# ---- Cancellation


def test_a_request_cancelled_before_it_is_sent_is_not_sent() -> None:
    """The other requests get their answers."""

    async def main() -> None:
        database = RequestDatabase()
        tasks = database.ask(1, 2, 3, 4)
        await until_all_wait()
        tasks[2].cancel()
        await database.answer()
        assert database.sent == [(2, 4)]
        tasks[1].cancel()
        await database.answer()
        assert [task.cancelled() for task in tasks] == [False, True, True, False]
        assert await numbers([tasks[0], tasks[3]]) == [1, 4]

    run_with_fake_clock(main)


def test_waiting_requests_are_sent_when_the_caller_of_a_single_request_is_cancelled() -> None:
    """After all waiting callers are cancelled, the next request is served normally."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        database = RequestDatabase()
        tasks = database.ask(1, 2, 3)
        now = loop.time()
        await until_all_wait()
        tasks[0].cancel()
        await until_all_wait()
        assert database.sent == [(2, 3)]
        late = database.ask(4, 5)
        await until_all_wait()
        for task in late:
            task.cancel()
        await database.answer()
        while database.statements:
            assert database.sent == [()]
            await database.answer()
        last = database.ask(6)
        await until_all_wait()
        assert database.sent == [(6,)]
        await database.answer()
        assert await numbers([*tasks[1:], *last]) == [2, 3, 6]
        assert loop.time() == now

    run_with_fake_clock(main)


# ---- Failures


def test_each_caller_of_a_failed_batch_gets_its_own_error() -> None:
    """The error names the caller's request. A shared exception would collect the tracebacks of all callers."""

    async def main() -> None:
        database = RequestDatabase()
        tasks = database.ask(1, 2, 3, 4)
        await until_all_wait()
        await database.answer()
        database.statements[0].fail(BackendUnavailableError("gone"))
        found = await asyncio.gather(*tasks, return_exceptions=True)
        errors = [error for error in found if isinstance(error, BackendUnavailableError)]
        assert [str(error) for error in errors] == ["2: gone", "3: gone", "4: gone"]
        assert len({id(error) for error in errors}) == 3
        assert all(error.__cause__ is error.__context__ is None for error in errors)

    run_with_fake_clock(main)


def test_send_alone_is_raised_in_each_caller_of_the_batch() -> None:
    """Each caller gets its own SendAlone and then sends its request by itself."""

    async def main() -> None:
        database = RequestDatabase()
        tasks = database.ask(1, 2, 3)
        await until_all_wait()
        await database.answer()
        database.statements[0].fail(SendAlone())
        await until_all_wait()
        signals = [task.exception() for task in tasks[1:]]
        assert all(type(signal) is SendAlone for signal in signals)
        assert signals[0] is not signals[1]

    run_with_fake_clock(main)


def test_a_failed_wait_for_a_connection_fails_only_the_requests_that_waited_from_its_beginning() -> None:
    """A request made during the wait tries again, with its own full ``pool_timeout``."""

    async def main() -> None:
        database = RequestDatabase(connected=False)
        tasks = database.ask(1, 2, 3)
        await until_all_wait()
        database.statements[0].fail(BackendUnavailableError("none"))
        await until_all_wait()
        assert str(tasks[0].exception()).endswith("none")
        [statement] = database.statements
        later = database.ask(4, 5)
        await until_all_wait()
        statement.fail(BackendUnavailableError("none"))
        await until_all_wait()
        assert [str(task.exception()) for task in tasks[1:]] == ["2: none", "3: none"]
        [statement] = database.statements
        statement.connected.set_result(None)
        await until_all_wait()
        assert database.sent == [(4, 5)]
        await database.answer()
        assert await numbers(later) == [4, 5]

    run_with_fake_clock(main)


@pytest.mark.parametrize("fails", [False, True])
def test_the_end_of_one_batch_does_not_affect_a_batch_that_waits_for_a_connection(fails: bool) -> None:
    """Whether the sent batch succeeds or fails, the waiting batch keeps waiting for its own connection."""

    async def main() -> None:
        database = RequestDatabase(connected=False)
        first = database.ask(1, 2, 3)
        await until_all_wait()
        database.statements[0].connected.set_result(None)
        await until_all_wait()
        await database.answer()
        database.statements[0].connected.set_result(None)
        await until_all_wait()
        assert database.sent == [(2, 3)]
        second = database.ask(4, 5)
        await asyncio.sleep(2 * batching._OVERDUE)
        assert len(database.statements) == 2
        if fails:
            database.statements[0].fail(BackendUnavailableError("gone"))
        else:
            database.statements[0].answered.set_result(None)
        await until_all_wait()
        assert all(task.done() for task in first), "callers of the finished batch still wait"
        assert not any(task.done() for task in second)
        third = database.ask(6)
        await until_all_wait()
        [statement] = database.statements
        statement.connected.set_result(None)
        await until_all_wait()
        assert database.sent == [(4, 5, 6)]
        await database.answer()
        assert await numbers([*second, *third]) == [4, 5, 6]
        assert [task.exception() is not None for task in first] == [False, fails, fails]

    run_with_fake_clock(main)


def test_closing_waits_for_all_requests_made_before_it() -> None:
    """It waits for statements that were sent, and for requests that are sent later but were made before."""

    async def main() -> None:
        database = RequestDatabase(most=2)
        tasks = database.ask(1, 2, 3, 4)
        await until_all_wait()
        await database.answer()
        closing = asyncio.create_task(database.batches.aclose())
        await until_all_wait()
        assert not closing.done()
        await database.answer()
        assert database.sent == [(4,)]
        assert not closing.done()
        await database.answer()
        await closing
        assert await numbers(tasks) == [1, 2, 3, 4]

    run_with_fake_clock(main)
