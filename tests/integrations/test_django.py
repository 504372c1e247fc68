"""The Django app in one process: its stores, its middleware, its lifespan and its command."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.test import AsyncClient, Client

from support.django_here import raised, token_store
from support.web_errors import LOGINS, OTHERS, OUTAGES, named, of_row
from support.web_rows import BROWSER
from tokenstore import (
    AuthTokenStore,
    ReauthorizationRequiredError,
    StoreClosedError,
    TokensMissingError,
    TokensNotStoredError,
    UnsupportedOperationError,
)
from tokenstore.integrations.django import get_async_store, get_store, with_lifespan
from tokenstore.integrations.django.management.commands.tokenstore import Command

# -- the stores ------------------------------------------------------------------------------------


def test_all_threads_get_one_store_until_the_setting_changes() -> None:
    """A test that overrides the setting gets another store, and the one before is closed."""
    with token_store():
        with ThreadPoolExecutor(4) as threads:
            [store] = set(threads.map(lambda _: get_store(), range(8)))
        store.put_value("a", "b", 1)
        with token_store():
            assert get_store() is not store
            assert get_store().get_value("a", "b") is None
        with pytest.raises(StoreClosedError):
            store.get_value("a", "b")


def test_a_store_that_its_user_has_closed_is_replaced() -> None:
    with token_store():
        with get_store() as store:
            store.put_value("a", "b", 1)
        assert get_store() is not store
        assert get_store().get_value("a", "b") is None


def test_each_event_loop_gets_a_store_and_closes_it() -> None:
    async def view() -> AuthTokenStore:
        store = get_async_store()
        assert get_async_store() is store
        await store.put_value("a", "b", 1)
        return store

    with token_store():
        first, second = asyncio.run(view()), asyncio.run(view())
    assert first is not second
    assert (first._closed, second._closed) == (True, True)


def test_an_async_test_that_overrides_the_setting_gets_another_store() -> None:
    """The store before is still that of its user, and is closed with the event loop."""

    async def main() -> list[AuthTokenStore]:
        before = get_async_store()
        get_store()
        with token_store():
            within = get_async_store()
            assert within is not before
            await before.put_value("a", "b", 1)
        return [before, within]

    with token_store():
        stores = asyncio.run(main())
    assert [store._closed for store in stores] == [True, True]


def test_each_kind_of_view_is_told_of_the_other_store() -> None:
    async def view() -> None:
        with pytest.raises(UnsupportedOperationError, match="event loop"):
            get_store().get_value("a", "b")

    with token_store():
        asyncio.run(view())
        with pytest.raises(UnsupportedOperationError, match="no event loop is running"):
            get_async_store()


# -- the middleware --------------------------------------------------------------------------------


def _get(view: str, error: Exception, headers: dict[str, str] | None = None) -> Any:
    raised[:] = [error]
    if view == "plain":
        return Client().get("/plain", headers=headers or {})
    return asyncio.run(_get_async(headers or {}))


async def _get_async(headers: dict[str, str]) -> Any:
    return await AsyncClient().get("/awaiting", headers=headers)


@pytest.mark.parametrize("view", ["plain", "awaiting"])
@pytest.mark.parametrize("error", LOGINS, ids=named)
def test_an_error_that_needs_the_user_is_a_redirect_for_a_browser_and_401_for_others(
    view: str, error: Exception
) -> None:
    with token_store(LOGIN_URL="connect"):
        browser, client = _get(view, error, BROWSER), _get(view, error)
    assert (browser.status_code, browser["Location"], browser.content) == (303, "/connect/github/", b"")
    assert browser["Cache-Control"] == client["Cache-Control"] == "no-store"
    assert (client.status_code, client["WWW-Authenticate"]) == (401, "ProviderLogin")
    assert client.json()["provider"] == "github"
    assert "some-user" not in client.content.decode()


@pytest.mark.parametrize("view", ["plain", "awaiting"])
@pytest.mark.parametrize(("error", "seconds"), OUTAGES, ids=named)
def test_an_error_that_ends_without_the_user_is_503(view: str, error: Exception, seconds: str) -> None:
    with token_store():
        response = _get(view, error, BROWSER)
    assert (response.status_code, response["Retry-After"]) == (503, seconds)
    assert "some text" not in response.content.decode()


@pytest.mark.parametrize("view", ["plain", "awaiting"])
@pytest.mark.parametrize("error", OTHERS, ids=named)
def test_other_errors_are_left_to_django(view: str, error: Exception) -> None:
    with token_store(), pytest.raises(type(error), match="some text"):
        _get(view, error)


@pytest.mark.parametrize(
    ("login_url", "place"),
    [
        ("/connect", "/connect"),
        ("/connect/{provider}/", "/connect/git%20hub%2F/"),
        ("https://id.example.com/?p={provider}", "https://id.example.com/?p=git%20hub%2F"),
        (lambda request, error: f"/login{request.path}/{error.account}", "/login/plain/some-account"),
        (lambda request, error: "/anmelden/für alle", "/anmelden/f%C3%BCr%20alle"),
        (lambda request, error: None, None),
        (None, None),
    ],
)
def test_the_login_url(login_url: str | Callable[..., str | None] | None, place: str | None) -> None:
    """A provider's name is quoted."""
    error = of_row(TokensMissingError("some text"), provider="git hub/")
    with token_store(LOGIN_URL=login_url):
        response = _get("plain", error, BROWSER)
    assert (response.status_code, response.get("Location")) == (401 if place is None else 303, place)


@pytest.mark.parametrize("login_url", ["connect", "/connect/{provider}/"])
def test_an_error_without_a_provider_has_no_login_url_for_it(login_url: str) -> None:
    """As of a refresher that a view calls itself."""
    with token_store(LOGIN_URL=login_url):
        assert _get("plain", ReauthorizationRequiredError("some text"), BROWSER).status_code == 401


# -- the lifespan ----------------------------------------------------------------------------------


async def _end_of_lifespan(in_between: Callable[[], object] = lambda: None) -> list[Any]:
    """The messages of an application whose server starts and ends."""
    events = iter(["lifespan.startup", "lifespan.shutdown"])
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        event = next(events)
        if event == "lifespan.shutdown":
            in_between()
        return {"type": event}

    async def send(message: Any) -> None:
        sent.append(message)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        sent.append(scope["type"])

    serve = with_lifespan(application)
    await serve({"type": "http"}, receive, send)
    await serve({"type": "lifespan"}, receive, send)
    return sent


def test_the_end_of_a_server_closes_both_stores() -> None:
    used: list[Any] = []

    async def main() -> list[Any]:
        used.append(get_async_store())
        await asyncio.to_thread(lambda: used.append(get_store()))
        await asyncio.to_thread(lambda: used[1].put_value("a", "b", 1))
        sent = await _end_of_lifespan()
        assert (used[0]._closed, used[1]._is_closed) == (True, True)
        return sent

    with token_store():
        sent = asyncio.run(main())
    assert sent == ["http", {"type": "lifespan.startup.complete"}, {"type": "lifespan.shutdown.complete"}]


def test_tokens_that_cannot_be_stored_fail_the_end_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async def aclose(self: AuthTokenStore) -> None:
        raise TokensNotStoredError("some text", records=[])

    async def main() -> list[Any]:
        get_async_store()
        monkeypatch.setattr(AuthTokenStore, "aclose", aclose)
        return await _end_of_lifespan()

    with token_store():
        *_, last = asyncio.run(main())
    assert last == {"type": "lifespan.shutdown.failed", "message": "some text"}


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.sqlite
def test_the_command_uses_the_store_of_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment variables of the command line do not replace the setting; an option does."""
    monkeypatch.setenv("TOKENSTORE_URL", "sqlite:///nosuch/other.db")
    monkeypatch.setenv("TOKENSTORE_NAMESPACE", "other")
    with token_store(URL=f"sqlite:///{tmp_path}/store.db", NAMESPACE="own"):
        call_command("tokenstore", "init", stdout=io.StringIO())
        get_store().store_tokens("github", "user", "a", "r", None)
        output = io.StringIO()
        call_command("tokenstore", "list", "--json", stdout=output)
        row = json.loads(output.getvalue())
        assert (row["user_id"], row["needs_reseal"]) == ("user", False)
        call_command("tokenstore", "show", "github", "user", stdout=io.StringIO())
        errors = io.StringIO()
        with pytest.raises(CommandError) as failed:
            call_command("tokenstore", "show", "github", "nobody", stderr=errors)
        assert failed.value.returncode == 1
        assert "no tokens" in errors.getvalue()
        with pytest.raises(CommandError) as failed:
            call_command("tokenstore", "show", "github", "user", "--namespace", "another", stderr=errors)
        assert failed.value.returncode == 4


def test_the_command_refuses_a_store_in_memory(capsys: pytest.CaptureFixture[str]) -> None:
    with token_store(), pytest.raises(SystemExit) as end:
        Command().run_from_argv(["manage.py", "tokenstore", "list"])
    assert end.value.code == 2
    assert "memory:// does not outlive this command" in capsys.readouterr().err


def test_keygen_and_help_need_no_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        Command().run_from_argv(["manage.py", "tokenstore", "--settings=x", "keygen", "k2", "--pythonpath", "y"])
    assert end.value.code == 0
    Command().print_help("manage.py", "tokenstore")
    printed = capsys.readouterr().out
    assert printed.startswith("k2:")
    assert "Usage: manage.py tokenstore" in printed
