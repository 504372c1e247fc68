"""The Flask extension, under Werkzeug's server with threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response, jsonify, request, url_for
from werkzeug.serving import make_server

from support.django_project import KEYS
from support.missing_libraries import import_error
from support.sync_stores import ended_loop_thread
from support.web_errors import LOGINS, OTHERS, OUTAGES, named, of_row
from support.web_rows import BROWSER, EXPIRED, Rows, get_all
from tokenstore import ConfigurationError, Keyring, RefreshError, TokensMissingError, UnsupportedOperationError
from tokenstore.integrations.flask import TokenStore
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.refresh.attempt import Refresh
from tokenstore.testing.provider import StrictRotatingProvider

_REFRESHERS: dict[str, Refresh] = {"github": lambda record: {"access_token": "new", "expires_in": 60}}
LoginURL = str | Callable[[RefreshError], str | None] | None


@pytest.fixture(autouse=True)
def _end() -> Iterator[None]:
    with ended_loop_thread():
        yield


def _app(tokens: TokenStore, **config: Any) -> Flask:
    app = Flask(__name__)
    app.testing = True
    app.config.update({"TOKENSTORE_URL": "memory://", "TOKENSTORE_KEYS": KEYS, **config})
    tokens.init_app(app)

    @app.get("/plain/<user>")
    def plain(user: str) -> Response:
        return jsonify(tokens.store.load_fresh_tokens("github", user, missing="raise")["generation"])

    @app.get("/awaiting/<user>")
    async def awaiting(user: str) -> Response:
        record = await tokens.async_store.load_fresh_tokens("github", user, missing="raise")
        return jsonify(record["generation"])

    @app.get("/connect/<provider>")
    def connect(provider: str) -> str:
        return provider

    return app


@contextmanager
def _serving(app: Flask) -> Iterator[str]:
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.sqlite
def test_both_kinds_of_views_refresh_once(tmp_path: Path, keyring: Keyring) -> None:
    """Each request to an ``async def`` view has an event loop, and a store, of its own."""
    url = f"sqlite:///{tmp_path}/store.db"
    with StrictRotatingProvider(latency=0.3) as provider:
        refresher = OAuth2Refresher(provider.token_url, provider.client_id, provider.client_secret)
        app = _app(TokenStore(refreshers={"github": refresher}), TOKENSTORE_URL=url)
        rows = Rows(url, keyring, provider)
        rows.log_in("user", EXPIRED)
        with _serving(app) as server:
            generations = get_all([f"{server}/{view}/user" for view in ("plain", "awaiting")] * 4)
    assert len(set(generations)) == 1
    assert rows.has_new_tokens("user")
    assert (provider.stats().refreshes, provider.stats().reuses) == (1, 0)


def _raising(error: Exception, login_url: LoginURL = None) -> Any:
    """A client of an application whose view raises the error."""
    app = _app(TokenStore(login_url=login_url))

    @app.get("/raise")
    def view() -> str:
        raise copy(error)  # one that lasts would keep the frames of the request

    return app.test_client()


@pytest.mark.parametrize("view", ["plain", "awaiting"])
def test_a_user_without_tokens_is_sent_to_the_login(view: str) -> None:
    client = _app(TokenStore(refreshers=_REFRESHERS, login_url="/connect/{provider}")).test_client()
    browser, other = client.get(f"/{view}/nobody", headers=BROWSER), client.get(f"/{view}/nobody")
    assert (browser.status_code, browser.headers["Location"], browser.data) == (303, "/connect/github", b"")
    assert (other.status_code, other.get_json()["login_url"]) == (401, "/connect/github")


@pytest.mark.parametrize("error", LOGINS, ids=named)
def test_an_error_that_needs_the_user_is_a_redirect_for_a_browser_and_401_for_others(error: Exception) -> None:
    client = _raising(error, "/connect")
    browser, other = client.get("/raise", headers=BROWSER), client.get("/raise")
    assert (browser.status_code, browser.headers["Location"]) == (303, "/connect")
    assert (other.status_code, other.headers["WWW-Authenticate"]) == (401, "ProviderLogin")
    assert browser.headers["Cache-Control"] == other.headers["Cache-Control"] == "no-store"
    assert other.get_json()["provider"] == "github"
    assert b"some-user" not in other.data


@pytest.mark.parametrize(("error", "seconds"), OUTAGES, ids=named)
def test_an_error_that_ends_without_the_user_is_503(error: Exception, seconds: str) -> None:
    response = _raising(error).get("/raise", headers=BROWSER)
    assert (response.status_code, response.headers["Retry-After"]) == (503, seconds)
    assert b"some text" not in response.data


@pytest.mark.parametrize("error", OTHERS, ids=named)
def test_other_errors_are_left_to_the_application(error: Exception) -> None:
    with pytest.raises(type(error), match="some text"):
        _raising(error).get("/raise")


@pytest.mark.parametrize(
    ("login_url", "place"),
    [
        ("https://id.example.com/?p={provider}", "https://id.example.com/?p=git%20hub%2F"),
        (lambda error: url_for("connect", provider="x", next=request.path), "/connect/x?next=/raise"),
        (lambda error: "/anmelden/für alle", "/anmelden/f%C3%BCr%20alle"),
        (lambda error: None, None),
        (None, None),
    ],
)
def test_the_login_url(login_url: LoginURL, place: str | None) -> None:
    """A provider's name is quoted."""
    error = of_row(TokensMissingError("some text"), provider="git hub/")
    response = _raising(error, login_url).get("/raise", headers=BROWSER)
    assert (response.status_code, response.headers.get("Location")) == (401 if place is None else 303, place)


def test_an_application_may_handle_an_error_itself() -> None:
    app = _app(TokenStore(refreshers=_REFRESHERS, login_url="/connect"))
    app.register_error_handler(TokensMissingError, lambda error: ("own", 418))
    response = app.test_client().get("/plain/nobody")
    assert (response.status_code, response.text) == (418, "own")


def test_each_application_has_a_store_of_its_own() -> None:
    tokens = TokenStore()
    stores = []
    for namespace in ("one", "two"):
        app = _app(tokens, TOKENSTORE_NAMESPACE=namespace)
        with app.app_context():
            tokens.store.put_value("a", "b", namespace)
            stores.append(tokens.store)
    assert [store.get_value("a", "b") for store in stores] == ["one", "two"]


def test_refreshers_and_other_options_may_be_in_the_configuration() -> None:
    options = {"refresh_timeout": 3.0}
    app = Flask(__name__)
    app.config.update(TOKENSTORE_URL="memory://", TOKENSTORE_KEYS=KEYS, TOKENSTORE_OPTIONS=options)
    app.config["TOKENSTORE_REFRESHERS"] = _REFRESHERS
    tokens = TokenStore(app)
    with app.app_context():
        assert tokens.store.aio._refreshers is _REFRESHERS
        assert tokens.store.aio._timeout == 3.0


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"TOKENSTORE_URL": None}, r'app\.config\["TOKENSTORE_URL"\] is not set'),
        ({"TOKENSTORE_KEYS": "x"}, r'entry 1 of app\.config\["TOKENSTORE_KEYS"\]'),
        ({"TOKENSTORE_OPTIONS": {"colour": 1}}, "unknown: colour"),
    ],
)
def test_a_wrong_configuration_is_an_error_of_init_app(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        _app(TokenStore(), **config)


def test_an_application_is_initialised_once_and_before_use() -> None:
    tokens = TokenStore()
    with pytest.raises(ConfigurationError, match="before"):
        tokens.init_app(_app(tokens))
    with Flask(__name__).app_context(), pytest.raises(ConfigurationError, match="call init_app"):
        _ = tokens.store


def test_each_kind_of_view_is_told_of_the_other_store() -> None:
    tokens = TokenStore()
    app = _app(tokens)

    async def view() -> None:
        with pytest.raises(UnsupportedOperationError, match="event loop"):
            tokens.store.get_value("a", "b")

    with app.app_context():
        asyncio.run(view())
        with pytest.raises(UnsupportedOperationError, match="no event loop is running"):
            _ = tokens.async_store


def test_without_flask_the_error_names_the_extra() -> None:
    printed = import_error("tokenstore.integrations.flask", "flask")
    assert printed.startswith("MissingDependencyError")
    assert "tokenstore[flask]" in printed
