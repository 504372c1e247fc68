"""What a refresher raises is never chained to an error of callers; `on_error` gets it."""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import logging
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import CodeType
from typing import Any
from urllib.parse import quote, quote_plus

import httpx
import pytest

from support.error_text import told
from support.refresh_world import World, assert_untouched, on_memory, settled
from support.refreshers import NEW, NEW_PAIR, OLD, Gone, Revoker, Script, pair
from support.store_calls import fresh
from tokenstore import (
    ProviderCallFailure,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
    TokenRecord,
    TokenStoreError,
    UnsupportedOperationError,
)

CLIENT_SECRET = "the/client+secret"
SECRETS = (*OLD, *NEW_PAIR, CLIENT_SECRET)
ENCODINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "in a URL": lambda text: quote(text, safe=""),
    "in a form": quote_plus,
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64url": lambda text: base64.urlsafe_b64encode(text.encode()).decode(),
    "JSON": json.dumps,
    "repr": lambda text: repr(text.encode()),
    "hexadecimal": lambda text: text.encode().hex(),
    "backwards": lambda text: text[::-1],
}


def _texts(error: BaseException) -> str:
    """What an error says, and what each exception behind it says, with attributes that `told` does not follow."""
    chain, texts = [error], []
    for link in chain:
        chain += [one for one in (link.__cause__, link.__context__) if one is not None and one not in chain]
        request = getattr(link, "request", None)
        texts += [told(link), repr(getattr(request, "content", b""))]
    return "\n".join(texts)


def _carried(text: str) -> list[Exception]:
    """Exceptions that carry a text in one way or another."""
    grouped = ExceptionGroup("several", [Gone(text)])
    noted = Gone("no")
    noted.add_note(text)
    request = httpx.Request("POST", "https://provider.example/token", content=f"refresh_token={text}")
    hidden = httpx.ConnectError("no connection", request=request)
    attribute = Gone("no")
    attribute.response = {"body": text}  # type: ignore[attr-defined]
    return [
        Gone(text),
        grouped,
        noted,
        hidden,
        attribute,
        ReauthorizationRequiredError(text),
        ProviderUnavailableError(text),
        UnsupportedOperationError(text),
        TimeoutError(text),
        KeyError(text),
    ]


@on_memory
@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_no_secret_of_a_refreshers_exception_reaches_a_caller(
    world: World, encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither of the old pair, nor of the new one, nor of the client, however it is encoded; nor by a log line."""
    caplog.set_level(logging.DEBUG)
    hidden = [ENCODINGS[encoding](secret) for secret in SECRETS]
    for raised in _carried(" ".join(hidden)):
        store = await world.store(refreshers={"github": Script(raised)})
        await world.expired(store)
        revoker = Revoker(raised)
        for call in (fresh(store), store.revoke_tokens("github", "u1", refresher=revoker)):
            with pytest.raises(TokenStoreError) as caught:
                await call
            assert caught.value is not raised
            assert caught.value.__cause__ is None
            assert caught.value.__context__ is None
            text = _texts(caught.value)
            assert not [secret for secret in hidden if secret in text]
    assert not [secret for secret in hidden if any(secret in str(vars(record)) for record in caplog.records)]


def a_bug(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"access_token": record["acess_token"]}  # the misspelt name is the bug


async def a_bug_below(record: Mapping[str, Any]) -> Mapping[str, Any]:
    json.loads(record["refresh_token"])
    raise AssertionError


class Buggy:
    async def __call__(self, record: TokenRecord) -> Mapping[str, Any]:
        return a_bug(record)

    async def revoke(self, record: TokenRecord) -> None:
        a_bug(record)


def _line(function: Any, text: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(number for number, line in enumerate(lines) if text in line)


HERE = __name__
BUG = f"KeyError at {HERE}:{_line(a_bug, 'acess_token')}"


@on_memory
async def test_a_bug_in_a_refresher_is_found_by_its_error(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The error and the log name the exception's type, where it was raised, and the refresher's own last line."""
    caplog.set_level(logging.INFO, logger="tokenstore.refresh")
    below = f", from {HERE}:{_line(a_bug_below, 'json.loads')}"
    expected = {
        a_bug: BUG,
        Buggy(): BUG,
        partial(a_bug): BUG,
        a_bug_below: "json.decoder.JSONDecodeError at json.decoder:",
    }
    for refresher, place in expected.items():
        caplog.clear()
        store = await world.store(refreshers={"github": refresher})
        await world.expired(store)
        with pytest.raises(ProviderUnavailableError) as caught:
            await fresh(store)
        assert caught.value.code == "refresh_failed"
        await settled(store)
        [record] = caplog.records
        for text in (str(caught.value), record.getMessage(), vars(record)["tokenstore_raised"]):
            assert place in text
            assert (below in text) is (refresher is a_bug_below)
        await assert_untouched(world, "refresh_failed")
    store = await world.store()
    with pytest.raises(ProviderUnavailableError) as caught:
        await store.revoke_tokens("github", "u1", refresher=Buggy())
    assert BUG in str(caught.value)
    assert caught.value.code == "revocation_failed"


@on_memory
async def test_names_made_by_code_are_not_quoted(world: World) -> None:
    """A type's or a module's name may be any text, and so may be a token."""
    made = type(f"No {OLD[1]}", (Exception,), {"__module__": f"app of {NEW_PAIR[1]}"})
    namespace: dict[str, Any] = {"__name__": f"a module of {OLD[0]}", "made": made}
    exec("def refresh(record):\n    raise made('x')", namespace)
    assert isinstance(namespace["refresh"].__code__, CodeType)
    store = await world.store(refreshers={"github": namespace["refresh"]})
    await world.expired(store)
    with pytest.raises(ProviderUnavailableError, match=r"the refresher raised \? at \?:2") as caught:
        await fresh(store)
    assert not [secret for secret in SECRETS if secret in told(caught.value)]


@on_memory
async def test_the_librarys_own_words_stay(world: World) -> None:
    """They contain no secret, and say what is wrong with a token response, for example."""
    store = await world.store(refreshers={"github": lambda record: {"access_token": 7}})
    await world.expired(store)
    with pytest.raises(ProviderUnavailableError, match="access_token must be a str, not int"):
        await fresh(store)


# -- on_error --------------------------------------------------------------------------------------


@on_memory
async def test_on_error_gets_each_exception_itself(world: World) -> None:
    """Once, however many callers get an error; also a token response that cannot be used, and a refused revocation."""
    failures: list[ProviderCallFailure] = []
    raised = Gone(OLD[1])
    store = await world.store(refreshers={"github": Script(raised)}, on_error=failures.append)
    await world.expired(store)
    errors = await asyncio.gather(fresh(store), fresh(store), return_exceptions=True)
    assert [type(error) for error in errors] == [ProviderUnavailableError] * 2
    with pytest.raises(ProviderUnavailableError):
        await store.revoke_tokens("github", "u1", refresher=Revoker(raised))
    await settled(store)
    assert [(one.provider, one.user_id, one.operation) for one in failures] == [
        ("github", "u1", "refresh"),
        ("github", "u1", "revoke"),
    ]
    assert all(one.error is raised for one in failures)
    assert "Script.__call__" in _functions(raised)
    assert OLD[1] not in repr(failures)


@on_memory
async def test_on_error_may_fail_or_hang(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Callers get their errors at once, and the other callbacks are called."""
    hang = asyncio.Event()

    async def hanging(failure: ProviderCallFailure) -> None:
        await hang.wait()

    async def cancelled(failure: ProviderCallFailure) -> None:
        task = asyncio.create_task(hang.wait())
        task.cancel()
        await task

    def raising(failure: ProviderCallFailure) -> None:
        raise Gone(OLD[0]) from failure.error

    callbacks: list[Callable[[ProviderCallFailure], Awaitable[None] | None]] = [hanging, cancelled, raising]
    for callback in callbacks:
        caplog.clear()
        told_of: list[BaseException] = []
        store = await world.store(
            refreshers={"github": Script(ReauthorizationRequiredError("x"))},
            refresh_timeout=0.2,
            on_error=callback,
            on_reauthorization_required=told_of.append,
        )
        await world.expired(store)
        with pytest.raises(ReauthorizationRequiredError):
            await fresh(store)
        with pytest.raises(RefreshError) as caught:
            await store.revoke_tokens("github", "u1", refresher=Revoker(Gone(OLD[1])))
        assert caught.value.__context__ is None
        await settled(store)
        assert len(told_of) == 1
        problems = [record for record in caplog.records if vars(record).get("tokenstore_event") == "on_error"]
        assert len(problems) == 2
        assert not [secret for secret in SECRETS if any(secret in str(vars(record)) for record in caplog.records)]


@on_memory
async def test_on_error_is_not_called_for_a_refresh_that_works(world: World) -> None:
    failures: list[ProviderCallFailure] = []
    store = await world.store(refreshers={"github": Script(NEW)}, on_error=failures.append)
    await world.expired(store)
    assert pair(await fresh(store)) == NEW_PAIR
    await settled(store)
    assert failures == []


def _functions(error: BaseException) -> str:
    names = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return " ".join(code.co_qualname if sys.version_info >= (3, 11) else code.co_name for code in names)
