"""Refresh callables: what they may return, raise and keep, and how long they may take."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import pytest

from support.error_text import told
from support.polling import until
from support.refresh_world import World, assert_untouched, on_memory, until_joined
from support.refreshers import NEW, NEW_PAIR, OLD, Gone, Script, pair
from support.store_calls import fresh, many
from tokenstore import (
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshableRecord,
    RefreshError,
    RefreshTimeoutError,
    StoreClosedError,
    TokenRecord,
)

HOUR = 3600.0


@on_memory
async def test_a_refresh_callable_can_be_a_plain_function(world: World) -> None:
    """It returns the response itself instead of an awaitable."""
    store = await world.store(refreshers={"github": lambda record: NEW})
    await world.expired(store)
    assert pair(await fresh(store)) == NEW_PAIR
    assert (await world.stored())["extra"] == {"scope": "read write", "expires_in": 3600}


@on_memory
async def test_a_plain_function_runs_in_a_thread_and_does_not_block_the_event_loop(world: World) -> None:
    """It blocks until a task of the event loop lets it go on, and sees the caller's context variables."""
    goes_on = threading.Event()
    caller: ContextVar[str] = ContextVar("caller")
    caller.set("the caller")
    seen: list[str] = []

    def blocks(record: RefreshableRecord) -> Mapping[str, Any]:
        asyncio_loop.call_soon_threadsafe(goes_on.set)
        assert goes_on.wait(10)
        seen.append(caller.get())
        return NEW

    asyncio_loop = asyncio.get_running_loop()
    store = await world.store(refreshers={"github": blocks})
    await world.expired(store)
    assert pair(await fresh(store)) == NEW_PAIR
    assert seen == ["the caller"]


@on_memory
async def test_a_plain_function_may_return_an_awaitable(world: World) -> None:
    """A lambda around a coroutine function does."""
    script = Script()
    store = await world.store(
        refreshers={
            "github": lambda record: script(record)  # noqa: PLW0108 - it is what is tested
        }
    )
    await world.expired(store)
    assert pair(await fresh(store)) == NEW_PAIR


@on_memory
@pytest.mark.parametrize("end", ["answers", "raises"])
async def test_a_plain_function_that_exceeds_refresh_timeout_stays_a_call_in_flight(
    world: World, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Threads cannot be stopped: there are never more than ``provider_concurrency``. The late response is lost."""
    goes_on = threading.Event()
    calls: list[str] = []

    def hangs(record: RefreshableRecord) -> Mapping[str, Any]:
        calls.append(record["user_id"])
        assert goes_on.wait(10)
        if end == "raises":
            raise Gone(record["refresh_token"])
        return NEW

    store = await world.store(refreshers={"github": hangs}, refresh_timeout=0.05, provider_concurrency=1)
    await world.expired(store)
    await world.expired(store, "u2")
    with pytest.raises(ProviderUnavailableError, match="timeout"):
        await fresh(store)
    with pytest.raises(RefreshTimeoutError, match="1 calls of the provider are in flight"):
        await fresh(store, "u2")
    assert calls == ["u1"]
    goes_on.set()
    gate = store._engine._settings.gates.of("github")
    await until(lambda: gate.in_flight == 0)
    events = [event for entry in caplog.records if (event := vars(entry).get("tokenstore_event")) == "late_response"]
    assert events == (["late_response"] if end == "answers" else [])
    await assert_untouched(world, "timeout")
    assert OLD[1] not in caplog.text


@on_memory
async def test_without_a_refresh_token_in_the_response_the_old_one_is_kept(world: World) -> None:
    """A provider that does not rotate refresh tokens sends none (RFC 6749 section 6)."""
    world.provider.rotate = False
    store = await world.store()
    old = await world.log_in(store)
    for _ in range(2):
        record = await fresh(store, force=True)
        assert record["refresh_token"] == old["refresh_token"]
        assert record["access_token"] != old["access_token"]
    assert world.provider.stats().refreshes == 2


@on_memory
@pytest.mark.parametrize(
    "answer",
    [None, [], "at", {}, {"access_token": ""}, {"access_token": None}, {"access_token": b"at"}, {"error": "x"}],
)
async def test_an_answer_that_is_not_a_token_response_changes_no_tokens(world: World, answer: Any) -> None:
    """It is treated as an outage; the row keeps its tokens and has no lease."""
    store = await world.store(refreshers={"github": lambda record: answer})
    await world.expired(store)
    with pytest.raises(ProviderUnavailableError) as caught:
        await fresh(store)
    assert caught.value.code == "invalid_response"
    await assert_untouched(world, "invalid_response")


@on_memory
@pytest.mark.parametrize(
    ("raised", "expected", "code"),
    [
        (ReauthorizationRequiredError("x"), ReauthorizationRequiredError, "invalid_grant"),
        (
            ReauthorizationRequiredError("x", code="bad_refresh_token"),
            ReauthorizationRequiredError,
            "bad_refresh_token",
        ),
        (ProviderUnavailableError("x"), ProviderUnavailableError, "temporarily_unavailable"),
        (ProviderUnavailableError("x", code="é" * 99), ProviderUnavailableError, "unreadable_code"),
        (ProviderUnavailableError("x", code=None), ProviderUnavailableError, "unreadable_code"),  # type: ignore[arg-type]
        (ProviderRefusedError("x"), ProviderRefusedError, "invalid_client"),
        (ProviderRefusedError("x", code="app_suspended"), ProviderRefusedError, "app_suspended"),
        (TimeoutError("x"), ProviderUnavailableError, "timeout"),
        (Gone("x"), ProviderUnavailableError, "refresh_failed"),
        (KeyError("refresh_token"), ProviderUnavailableError, "refresh_failed"),
        (StoreClosedError("another store's"), ProviderUnavailableError, "refresh_failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)
async def test_an_exception_of_a_callable_becomes_one_of_three_errors(
    world: World, raised: Exception, expected: type[RefreshError], code: str
) -> None:
    """The error names the row and the exception's type; each caller gets its own error object, without a cause."""
    script = Script(raised)
    store = await world.store(refreshers={"github": script})
    await world.expired(store)
    errors = await many(3, store)
    assert {type(error) for error in errors} == {expected}
    assert len({id(error) for error in errors}) == 3
    for error in errors:
        assert (error.code, error.provider, error.user_id) == (code, "github", "u1")
        assert error.__cause__ is error.__context__ is None
        assert f"{type(raised).__name__} at support.refreshers:" in str(error)
        assert "'u1'" in str(error)
    assert script.calls == 1
    await assert_untouched(world, f"refused/{code}" if expected is ProviderRefusedError else code)


def _chained(token: str) -> Exception:
    try:
        try:
            raise ValueError(f"body: {token}")
        except ValueError as error:
            raise Gone("no") from error
    except Gone as error:
        return error


def _hidden(token: str) -> Exception:
    try:
        try:
            raise ValueError(f"body: {token}")
        except ValueError:
            raise ProviderUnavailableError("no") from None
    except ProviderUnavailableError as error:
        return error


def _noted(token: str) -> Exception:
    error = Gone("no")
    error.add_note(token)
    return error


LEAKS: dict[str, Callable[[str], BaseException]] = {
    "its text": lambda token: Gone(f"refresh_token={token} was refused"),
    "its arguments": lambda token: Gone("no", {"refresh_token": token}),
    "its cause": _chained,
    "its hidden context": _hidden,
    "its note": _noted,
    "a group": lambda token: ExceptionGroup("several", [Gone(token)]),
    "Reauthorization": lambda token: ReauthorizationRequiredError(f"{token} is used"),
    "Unavailable": lambda token: ProviderUnavailableError(f"no answer for {token}"),
    "Refused": lambda token: ProviderRefusedError(f"no client of {token}", code="app_suspended"),
    "a code": lambda token: ProviderRefusedError("no", code=token),
    "a timeout": lambda token: TimeoutError(f"no answer for {token}"),
}


@on_memory
@pytest.mark.parametrize("leak", LEAKS)
async def test_an_exception_that_contains_a_token_is_not_chained(
    world: World, leak: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the error nor a log line contains the token, nor do errors of later callers; the error's class stays."""
    caplog.set_level(logging.DEBUG)
    told_of: list[BaseException] = []
    for token in OLD:
        raised = LEAKS[leak](token)
        one = await world.store(refreshers={"github": Script(raised)}, on_reauthorization_required=told_of.append)
        two = await world.store(refreshers={"github": Script()})
        await world.expired(one)
        errors = await many(2, one) + await many(1, two)
        assert len({type(error) for error in errors[:2]}) == 1
        if isinstance(raised, RefreshError):
            assert isinstance(errors[0], type(raised))
        for error in errors + told_of:
            assert isinstance(error, RefreshError)
            assert token not in told(error)
    assert not any(token in str(vars(record)) for record in caplog.records for token in OLD)


@on_memory
async def test_a_call_that_hangs_is_cancelled_after_refresh_timeout(world: World) -> None:
    """Other callers do not have to wait until the lease expires."""
    script = Script()
    script.hold()
    store = await world.store(refreshers={"github": script}, refresh_timeout=0.05)
    await world.expired(store)
    errors = await many(3, store)
    assert {(type(error), error.code) for error in errors} == {(ProviderUnavailableError, "timeout")}
    await assert_untouched(world, "timeout")
    script.answer.set()
    world.ahead += 10
    assert pair(await fresh(store)) == NEW_PAIR


@on_memory
@pytest.mark.parametrize("end", ["answers", "fails"])
async def test_the_tokens_of_a_call_that_ignores_its_cancellation_are_stored(world: World, end: str) -> None:
    """They may be the only copy of a valid pair."""

    async def stubborn(record: TokenRecord) -> Mapping[str, Any]:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if end == "fails":
            raise Gone
        return NEW

    store = await world.store(refreshers={"github": stubborn}, refresh_timeout=0.05)
    await world.expired(store)
    if end == "answers":
        assert pair(await fresh(store)) == pair(await world.stored()) == NEW_PAIR
    else:
        with pytest.raises(ProviderUnavailableError, match="refresh_failed"):
            await fresh(store)
        await assert_untouched(world, "refresh_failed")


@on_memory
async def test_a_call_whose_own_task_was_cancelled_has_failed(world: World) -> None:
    """The callable waits for a task that the application cancels; this is a failure, not the closing of the store."""

    async def tricked(record: TokenRecord) -> Mapping[str, Any]:
        task = asyncio.create_task(asyncio.sleep(HOUR))
        asyncio.get_running_loop().call_soon(task.cancel)
        await task
        raise AssertionError

    store = await world.store(refreshers={"github": tricked})
    await world.expired(store)
    for error in await many(3, store):
        assert isinstance(error, ProviderUnavailableError), repr(error)
        assert error.code == "refresh_failed"
    await assert_untouched(world, "refresh_failed")


class Outcome(BaseException):
    """Not an ``Exception``, like the error that pytest.fail raises."""


@on_memory
async def test_no_exception_leaves_callers_waiting(world: World) -> None:
    """Callers also get an error that is not an ``Exception``, and the row has no lease afterwards."""
    store = await world.store(refreshers={"github": Script(Outcome("must not be called"))})
    await world.expired(store)
    async with asyncio.timeout(5):
        for error in await asyncio.gather(fresh(store), fresh(store), return_exceptions=True):
            assert isinstance(error, Outcome)
    row = await world.sealed()
    assert row is not None
    assert row.lease_holder is None


@on_memory
async def test_a_callable_may_keep_and_change_its_record(world: World) -> None:
    """The record is a copy; changing it does not change what is stored."""

    async def careless(record: TokenRecord) -> Mapping[str, Any]:
        record["extra"]["scope"] = object()
        record["refresh_token"] = "mine"
        record.clear()
        return {"access_token": "new-access"}

    store = await world.store(refreshers={"github": careless})
    await world.expired(store)
    assert pair(await fresh(store)) == pair(await world.stored()) == ("new-access", OLD[1])
    assert (await world.stored())["extra"] == {"scope": "read", "expires_in": 3600}


@on_memory
async def test_joining_callers_share_the_first_caller_s_callable(world: World) -> None:
    """A callable that is passed has priority over ``refreshers``; joining callers get the first refresh's tokens."""
    first, second, third = Script(), Script(), Script()
    first.hold()
    store = await world.store(refreshers={"github": third})
    await world.expired(store)
    calls = [asyncio.create_task(fresh(store, refresh=script)) for script in (first, second, None)]
    await until_joined(store, 2)
    first.answer.set()
    assert {pair(record) for record in await asyncio.gather(*calls)} == {NEW_PAIR}
    assert [script.calls for script in (first, second, third)] == [1, 0, 0]
