"""`finish` and `wait_through_cancellation`: an action ends before its caller's cancellation is raised."""

from __future__ import annotations

import asyncio
import functools
import gc
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, cast

from tokenstore.cancellation import finish, wait_through_cancellation


def _run(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Let pytest call a coroutine function."""

    def run() -> None:
        asyncio.run(cast(Coroutine[Any, Any, None], test()))

    functools.update_wrapper(run, test)
    return run


async def _cancel_at_every_step(task: asyncio.Task[Any]) -> None:
    """Cancel a task at every step of the event loop until it has ended, as an anyio cancel scope does."""
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)


@_run
async def test_finish_ends_the_action_before_it_raises_however_often_it_is_cancelled() -> None:
    ended = asyncio.Event()
    release = asyncio.Event()

    async def action() -> None:
        await release.wait()
        ended.set()

    caller = asyncio.create_task(finish(action()))
    await asyncio.sleep(0)  # the caller starts the action
    await asyncio.sleep(0)
    for _ in range(10):
        caller.cancel()
        await asyncio.sleep(0)
        assert not caller.done()
    release.set()
    await _cancel_at_every_step(caller)
    assert caller.cancelled()
    assert ended.is_set()


@_run
async def test_finish_cancels_an_action_that_outlasts_the_grace_and_waits_for_its_end() -> None:
    ended = asyncio.Event()

    async def action() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.set()

    caller = asyncio.create_task(finish(action(), grace=0.01))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await _cancel_at_every_step(caller)
    assert caller.cancelled()
    assert ended.is_set()


@_run
async def test_an_error_of_an_action_whose_caller_was_cancelled_is_not_reported_as_never_retrieved() -> None:
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    release = asyncio.Event()

    async def action() -> None:
        await release.wait()
        raise ValueError

    caller = asyncio.create_task(finish(action()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.sleep(0)
    release.set()
    await _cancel_at_every_step(caller)
    assert caller.cancelled()
    del caller
    gc.collect()
    assert problems == []


@_run
async def test_a_wait_through_cancellation_ends_at_its_timeout() -> None:
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiter = asyncio.create_task(wait_through_cancellation([never], timeout=0.01))
    await asyncio.sleep(0)
    await _cancel_at_every_step(waiter)
    assert waiter.result() is False
