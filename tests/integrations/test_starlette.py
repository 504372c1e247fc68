"""The store in applications of Starlette and FastAPI, over HTTP and WebSocket with uvicorn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi import WebSocket as FastAPIWebSocket
from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from support.asgi_servers import serving_asgi
from support.missing_libraries import import_error
from tokenstore import AuthTokenStore, ConfigurationError, Keyring, StoreClosedError, errors, open_store
from tokenstore.integrations._web import LOGIN_ERRORS, OUTAGE_ERRORS
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.starlette import LoginURL, install, store_lifespan, token_store
from tokenstore.testing.provider import StrictRotatingProvider

_KEYRING = Keyring({"k1": bytes(32)})
_PAGE = {"Sec-Fetch-Mode": "navigate"}
_USER = "user-secret-id"
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "InsufficientScopeError": {"missing": ["write"], "granted": ["read"]},
    "RefreshError": {"code": "made_up"},
    "TokensNotStoredError": {"records": []},
    "UnknownKeyError": {"key_id": "k9"},
}


def _error(name: str) -> errors.TokenStoreError:
    """An error as the store raises it."""
    error: errors.TokenStoreError = getattr(errors, name)(f"message about {_USER}", **_ARGUMENTS.get(name, {}))
    if isinstance(error, errors.RefreshError):
        error.provider, error.user_id, error.account = "acme", _USER, "work"
    return error


async def _raise(request: Request) -> Response:
    raise _error(request.path_params["name"])


class _Talk(WebSocketEndpoint):
    """Starlette runs the handlers of such a class with another object than the class accepts with."""

    encoding = "text"

    async def on_receive(self, websocket: WebSocket, data: str) -> None:
        raise _error(data)


async def _at_once(websocket: WebSocket) -> None:
    raise _error(websocket.path_params["name"])


async def _accepted(websocket: WebSocket) -> None:
    await websocket.accept()
    raise _error(await websocket.receive_text())


async def _closed(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.close(4000)
    raise _error("TokensMissingError")


async def _gone(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.receive()
    websocket.state.seen.append("gone")
    raise _error("TokensMissingError")


_ROUTES = [
    Route("/raise/{name}", _raise, methods=["GET", "POST"]),
    WebSocketRoute("/at-once/{name}", _at_once),
    WebSocketRoute("/accepted", _accepted),
    WebSocketRoute("/talk", _Talk),
    WebSocketRoute("/closed", _closed),
    WebSocketRoute("/gone", _gone),
]


async def _never(record: Any) -> Any:
    raise AssertionError


def _memory() -> AuthTokenStore:
    return open_store("memory://", keyring=_KEYRING, refreshers={"acme": _never})


def _app(kind: type[Starlette], login_url: LoginURL | None = "/login") -> Starlette:
    app = kind(routes=[*_ROUTES], lifespan=store_lifespan(_memory))
    install(app, login_url=login_url)
    return app


@pytest.fixture(scope="module", params=[Starlette, FastAPI])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    with serving_asgi(_app(request.param)) as address:
        yield address


@contextmanager
def _client(address: str, prefix: str = "") -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{address}{prefix}", trust_env=False, timeout=20) as client:
        yield client


# -- errors become responses -----------------------------------------------------------------------


def test_a_page_redirects_to_the_login_and_an_api_answers_401(address: str) -> None:
    with _client(address) as client:
        for name in (error.__name__ for error in LOGIN_ERRORS):
            error = _error(name)
            assert isinstance(error, errors.RefreshError)
            page = client.get(f"/raise/{name}", headers=_PAGE)
            assert (page.status_code, page.headers["Location"], page.content) == (303, "/login", b"")
            assert client.head(f"/raise/{name}", headers=_PAGE).headers["Location"] == "/login"
            api, form = client.get(f"/raise/{name}"), client.post(f"/raise/{name}", headers=_PAGE)
            assert (api.status_code, api.headers["WWW-Authenticate"]) == (401, "ProviderLogin")
            detail = "The user has to log in at the provider again."
            expected = {"error": error.code, "detail": detail, "provider": "acme", "login_url": "/login"}
            assert api.json() == form.json() == expected
            for response in (page, api, form):
                assert response.headers["Cache-Control"] == "no-store"
                assert _USER not in f"{response.headers} {response.text}"


def test_an_outage_is_503_for_everybody(address: str) -> None:
    with _client(address) as client:
        for name in (error.__name__ for error in OUTAGE_ERRORS):
            for response in (client.get(f"/raise/{name}"), client.get(f"/raise/{name}", headers=_PAGE)):
                assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
                assert response.headers["Cache-Control"] == "no-store"
                assert _USER not in f"{response.headers} {response.text}"


def test_each_other_error_stays_a_500(address: str) -> None:
    """The parents of handled errors, too."""
    others = {*errors.__all__} - {error.__name__ for error in (*LOGIN_ERRORS, *OUTAGE_ERRORS)}
    with _client(address) as client:
        for name in others:
            response = client.get(f"/raise/{name}", headers={**_PAGE, "Connection": "close"})
            assert (response.status_code, response.text) == (500, "Internal Server Error")


def _page(login_url: LoginURL | None, path: str = "/raise/TokensMissingError", **headers: str) -> httpx.Response:
    with serving_asgi(_app(Starlette, login_url)) as address, _client(address) as client:
        return client.get(path, headers={**_PAGE, **headers})


def test_without_a_login_url_a_page_gets_401() -> None:
    response = _page(None)
    assert response.status_code == 401
    assert "login_url" not in response.json()
    assert _page(lambda request, error: None).json() == response.json()


def test_a_function_finds_the_login_url_by_request_and_error() -> None:
    def login_url(request: Request, error: errors.RefreshError) -> str:
        return f"/login/{error.provider}?from={request.url.path}"

    assert _page(login_url).headers["Location"] == "/login/acme?from=/raise/TokensMissingError"


def test_nothing_of_the_request_leads_a_redirect_elsewhere() -> None:
    """Neither the Host header nor a forwarded one, nor a parameter that usually names the next page."""
    path = "/raise/TokensMissingError?next=https://evil.example&login_url=//evil.example"
    response = _page("/login", path, Host="evil.example", Forwarded="host=evil.example", Referer="https://evil.example")
    assert response.headers["Location"] == "/login"
    assert "evil" not in str(response.headers)


def test_a_line_break_in_a_login_url_begins_no_header() -> None:
    path = "/raise/TokensMissingError?name=a%0D%0ASet-Cookie:b=c"
    response = _page(lambda request, error: f"/login?name={request.query_params['name']}", path)
    assert response.headers["Location"] == "/login?name=a%0D%0ASet-Cookie:b=c"
    assert "Set-Cookie" not in response.headers


# -- WebSocket -------------------------------------------------------------------------------------


@contextmanager
def _socket(address: str, path: str) -> Iterator[ClientConnection]:
    with connect(f"ws://{address}{path}", proxy=None) as socket:
        yield socket


@pytest.mark.parametrize(
    ("name", "status", "retry_after"), [("TokensMissingError", 401, None), ("BackendUnavailableError", 503, "1")]
)
def test_a_websocket_is_refused_with_the_response_of_a_request(
    address: str, name: str, status: int, retry_after: str | None
) -> None:
    with pytest.raises(InvalidStatus) as refused, _socket(address, f"/at-once/{name}"):
        pass
    response = refused.value.response
    assert (response.status_code, response.headers.get("Retry-After")) == (status, retry_after)
    assert _USER.encode() not in bytes(response.body or b"")


@pytest.mark.parametrize("path", ["/accepted", "/talk"])
@pytest.mark.parametrize(("name", "code"), [("ReauthorizationRequiredError", 3000), ("ProviderUnavailableError", 1013)])
def test_an_accepted_websocket_is_closed_with_a_code_that_says_why(
    address: str, path: str, name: str, code: int
) -> None:
    with _socket(address, path) as socket:
        socket.send(name)
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(20)
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (code, "")


def test_a_websocket_that_the_application_closed_stays_so(address: str, caplog: pytest.LogCaptureFixture) -> None:
    with _socket(address, "/closed") as socket, pytest.raises(ConnectionClosed) as closed:
        socket.recv(20)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 4000
    assert not caplog.records


def test_an_error_after_a_websocket_s_client_left_is_no_error_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[dict[str, Any]]:
        yield {"seen": seen}

    app = Starlette(routes=[*_ROUTES], lifespan=lifespan)
    install(app)
    with serving_asgi(app) as address, _socket(address, "/gone"):
        pass
    assert seen == ["gone"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def _messages(path: str) -> list[Any]:
    """What an application sends to a server without the extension for such responses."""
    sent: list[Any] = []
    received = iter([{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "TokensMissingError"}])

    async def receive() -> Any:
        return next(received)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": path, "headers": [], "query_string": b"", "subprotocols": []}
    await _app(Starlette)(scope, receive, send)
    return sent


@pytest.mark.parametrize("path", ["/at-once/TokensMissingError", "/accepted"])
def test_a_server_that_cannot_send_such_a_response_closes_the_websocket(path: str) -> None:
    *_, last = asyncio.run(_messages(path))
    assert last == {"type": "websocket.close", "code": 3000, "reason": ""}


# -- the lifespan and the dependency ---------------------------------------------------------------


Store = Annotated[AuthTokenStore, Depends(token_store)]


def _whole(lifespan: Any) -> FastAPI:
    """An application that uses its store in a request, in a WebSocket, and in two mounted applications."""
    app, fast, plain = FastAPI(lifespan=lifespan), FastAPI(), Starlette()

    async def profile(store: Store, user: str) -> dict[str, Any]:
        record = await store.load_fresh_tokens("acme", user, missing="raise")
        return {"valid": store.is_access_token_valid(record)}

    async def live(websocket: FastAPIWebSocket, store: Store) -> None:
        await websocket.accept()
        await websocket.send_json(await profile(store, "alice"))

    async def plainly(request: Request) -> Response:
        return JSONResponse(await profile(await token_store(request), request.query_params["user"]))

    for one in (app, fast):
        one.get("/profile")(profile)
        one.websocket("/live")(live)
    plain.add_route("/profile", plainly)
    applications: list[Starlette] = [app, fast, plain]
    for each in applications:
        install(each, login_url="/login")
    app.mount("/fast", fast)
    app.mount("/plain", plain)
    return app


@pytest.fixture
def provider() -> Iterator[StrictRotatingProvider]:
    with StrictRotatingProvider() as provider:
        yield provider


def _opened(provider: StrictRotatingProvider, path: Path, **options: Any) -> AuthTokenStore:
    refresher = OAuth2Refresher(provider.token_url, provider.client_id, provider.client_secret)
    return open_store(f"sqlite:///{path}/tokens.db", keyring=_KEYRING, refreshers={"acme": refresher}, **options)


async def _log_in(provider: StrictRotatingProvider, path: Path, user: str, *, expires_in: float) -> None:
    async with _opened(provider, path) as store:
        await store.setup()
        tokens = provider.new_grant(user)
        expiry = datetime.now(UTC) + timedelta(seconds=expires_in)
        hour = {"expires_in": 3600}  # the refresh margin is a part of the lifetime
        await store.store_tokens("acme", user, tokens["access_token"], tokens["refresh_token"], expiry, extra=hour)


@pytest.mark.parametrize("prefix", ["", "/fast", "/plain"])
def test_a_whole_application_serves_fresh_tokens_and_answers_failures(
    provider: StrictRotatingProvider, tmp_path: Path, prefix: str
) -> None:
    """Also a mounted one, which has no lifespan of its own. The provider refreshes, refuses, and is down in earnest."""
    for user in ("alice", "bob", "carol"):
        asyncio.run(_log_in(provider, tmp_path, user, expires_in=-60))
    app = _whole(store_lifespan(lambda: _opened(provider, tmp_path)))
    with serving_asgi(app) as address, _client(address, prefix) as client:

        def page(user: str) -> httpx.Response:
            return client.get("/profile", params={"user": user}, headers=_PAGE)

        assert page("alice").json() == {"valid": True}
        if prefix != "/plain":
            with _socket(address, f"{prefix}/live") as socket:
                assert socket.recv(20) == '{"valid":true}'
        provider.revoke_user("bob")
        assert page("bob").headers["Location"] == page("nobody").headers["Location"] == "/login"
        provider.fail_next(503, retry_after=30)
        away = page("carol")
        assert (away.status_code, away.json()["provider"]) == (503, "acme")
        assert 1 <= int(away.headers["Retry-After"]) <= 30
    assert provider.stats().refreshes == 1


def test_the_end_of_the_application_waits_for_a_refresh(provider: StrictRotatingProvider, tmp_path: Path) -> None:
    """Otherwise the provider's new refresh token would be lost, and the old one be spent."""
    asyncio.run(_log_in(provider, tmp_path, "alice", expires_in=120))
    opened = store_lifespan(lambda: _opened(provider, tmp_path, refresh_margin=1000))
    with ExitStack() as held:

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[dict[str, Any]]:
            async with opened(app) as state:
                yield state
                held.close()  # the provider answers now that the server has ended all requests

        with serving_asgi(_whole(lifespan)) as address, _client(address) as client:
            held.enter_context(provider.hold())
            assert client.get("/profile", params={"user": "alice"}).json() == {"valid": True}
            provider.wait_for_requests(1, timeout=20)

    async def load() -> Any:
        async with _opened(provider, tmp_path) as store:
            return await store.load_tokens("acme", "alice")

    assert provider.stats().refreshes == 1
    assert asyncio.run(load())["access_token_expires_at"] > datetime.now(UTC) + timedelta(seconds=1000)


@contextmanager
def _noted() -> Iterator[tuple[list[AuthTokenStore], Callable[[], AuthTokenStore]]]:
    """A function that opens stores, and the stores that it has opened. At the end, all are closed."""
    stores: list[AuthTokenStore] = []

    def factory() -> AuthTokenStore:
        stores.append(_memory())
        return stores[-1]

    yield stores, factory
    for store in stores:
        with pytest.raises(StoreClosedError):
            asyncio.run(store.setup())


def test_a_store_is_opened_anew_when_the_application_starts_again() -> None:
    with _noted() as (stores, factory):
        app = _whole(store_lifespan(factory, setup=True))
        assert not stores
        for number in (1, 2):
            with serving_asgi(app) as address, _client(address) as client:
                assert client.get("/profile?user=alice").status_code == 401
                assert len(stores) == number


def test_an_application_s_own_lifespan_has_the_store() -> None:
    """Its state reaches requests beside the store, and it ends before the store is closed."""
    opened, seen = store_lifespan(_memory, setup=True), []

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[dict[str, Any]]:
        async with opened(app) as state:
            yield {**state, "greeting": "hello"}
            seen.append(await state["token_store"].load_tokens("acme", "alice"))

    async def greet(request: Request) -> Response:
        await token_store(request)
        return JSONResponse(request.state.greeting)

    app = Starlette(routes=[Route("/", greet)], lifespan=lifespan)
    with serving_asgi(app) as address, _client(address) as client:
        assert client.get("/").json() == "hello"
    assert seen == [None]


def test_a_store_that_cannot_be_opened_ends_the_start() -> None:
    app = _whole(store_lifespan(lambda: open_store("unknown://", keyring=_KEYRING)))
    with pytest.raises(RuntimeError, match="did not start"), serving_asgi(app):
        pass


def test_a_store_is_closed_if_the_rest_of_the_start_fails() -> None:
    with _noted() as (stores, factory):

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[dict[str, Any]]:
            async with store_lifespan(factory)(app) as state:
                if stores:
                    raise LookupError
                yield state

        with pytest.raises(RuntimeError, match="did not start"), serving_asgi(Starlette(lifespan=lifespan)):
            pass
        assert len(stores) == 1


def test_without_the_lifespan_s_state_an_error_says_what_is_missing() -> None:
    request = Request({"type": "http", "headers": []})
    with pytest.raises(ConfigurationError, match=r"lifespan=store_lifespan\(…\)"):
        asyncio.run(token_store(request))


def test_the_dependency_adds_no_parameter_to_the_description_of_a_route() -> None:
    [parameter] = _whole(None).openapi()["paths"]["/profile"]["get"]["parameters"]
    assert parameter["name"] == "user"


def test_a_test_of_an_application_replaces_the_store() -> None:
    app, store = _whole(store_lifespan(_memory)), _memory()
    app.dependency_overrides[token_store] = lambda: store
    asyncio.run(store.store_tokens("acme", "alice", "at", None, None))
    with serving_asgi(app) as address, _client(address) as client:
        assert client.get("/profile?user=alice").json() == {"valid": True}


def test_a_missing_library_is_named_with_its_extra() -> None:
    printed = import_error("tokenstore.integrations.starlette", "starlette")
    assert printed.startswith("MissingDependencyError")
    assert 'pip install "tokenstore[starlette]"' in printed
