"""Cancellations that come again and again, as anyio's cancel scopes deliver them, leave nothing running or lost."""

from __future__ import annotations

import asyncio
import functools
import gc
import random
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import anyio
import pytest

from support.matrix import Row, every_row
from support.polling import until
from tokenstore import AuthTokenStore, Keyring, open_store
from tokenstore.cancellation import finish, wait_through_cancellation

_EXPIRY = datetime.now(UTC) + timedelta(hours=1)
_CALLS = 1200
_AT_ONCE = 20
_LONGEST = 0.020  # seconds until a call is cancelled: some end before, some have not begun


def _run(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Let pytest call a coroutine function."""

    def run() -> None:
        asyncio.run(cast(Coroutine[Any, Any, None], test()))

    functools.update_wrapper(run, test)
    return run


async def _cancel_at_every_turn(task: asyncio.Task[Any]) -> None:
    """Cancel a task at every turn of the event loop until it has ended, as an anyio cancel scope does."""
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
    await _cancel_at_every_turn(caller)
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
    await _cancel_at_every_turn(caller)
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
    await _cancel_at_every_turn(caller)
    assert caller.cancelled()
    del caller
    gc.collect()
    assert problems == []


@_run
async def test_a_wait_through_cancellation_ends_at_its_timeout() -> None:
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiter = asyncio.create_task(wait_through_cancellation([never], timeout=0.01))
    await asyncio.sleep(0)
    await _cancel_at_every_turn(waiter)
    assert waiter.result() is False


@pytest.mark.parametrize("kind", ["transaction", "store", "load", "list"])
@every_row
def test_calls_in_cancel_scopes_leave_the_pool_whole(row: Row, url: str, keyring: Keyring, kind: str) -> None:
    """Clients of a web server that disconnect at any moment: no crash, no lost connection, no unretrieved error."""
    asyncio.run(_calls_in_cancel_scopes(row, url, keyring, kind))
    gc.collect()


async def _calls_in_cancel_scopes(row: Row, url: str, keyring: Keyring, kind: str) -> None:
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    chance = random.Random(kind)
    options: dict[str, Any] = {} if row.name == "memory" else {"pool_size": 5}
    async with open_store(url, keyring=keyring, **options) as store:
        await store.setup()
        for number in range(4):
            await store.store_tokens("github", f"u{number}", "a", "r", _EXPIRY)

        async def one(number: int) -> None:
            with anyio.move_on_after(chance.uniform(0, _LONGEST)):
                await _call(store, kind, f"u{number % 4}", f"a{number}")

        for start in range(0, _CALLS, _AT_ONCE):
            await asyncio.gather(*(one(number) for number in range(start, start + _AT_ONCE)))
        source = getattr(store._backend, "_source", None)
        # A connection that a cancelled caller was opening comes to the pool when it is open.
        await until(lambda: source is None or source.in_use == 0)
        # Every connection of the pool serves again.
        assert all(await asyncio.gather(*(store.load_tokens("github", f"u{number % 4}") for number in range(10))))
    gc.collect()
    assert problems == []


async def _call(store: AuthTokenStore, kind: str, user_id: str, token: str) -> None:
    match kind:
        case "transaction":
            async with store.transaction() as tx:
                await tx.load_tokens("github", user_id, for_update=True)
                await tx.store_tokens("github", user_id, token, "r", _EXPIRY)
        case "store":
            await store.store_tokens("github", user_id, token, "r", _EXPIRY)
        case "load":
            await store.load_tokens("github", user_id)
        case "list":
            async for _ in store.list_tokens():
                pass


@pytest.mark.parametrize("pairs", [100, pytest.param(1250, marks=pytest.mark.soak)])
@every_row
def test_a_cancelled_store_never_overtakes_a_later_one(row: Row, url: str, keyring: Keyring, pairs: int) -> None:
    """Once its caller has the cancellation, a store has been carried out or never will be."""

    async def main() -> int:
        stale = 0
        chance = random.Random(row.name)
        async with open_store(url, keyring=keyring) as store:
            await store.setup()

            async def one(user_id: str) -> None:
                nonlocal stale
                for number in range(pairs):
                    cancelled = asyncio.create_task(_call(store, "store", user_id, f"cancelled{number}"))
                    for _ in range(chance.randrange(12)):
                        await asyncio.sleep(0)
                    cancelled.cancel()
                    await asyncio.wait([cancelled])
                    await _call(store, "store", user_id, f"stored{number}")
                    record = await store.load_tokens("github", user_id)
                    stale += record is None or record["access_token"] != f"stored{number}"

            await asyncio.gather(*(one(f"u{number}") for number in range(8)))
        return stale

    assert asyncio.run(main()) == 0
