"""Arguments with which no adapter of an HTTP client can be made, and errors of requests, which show no token."""

from __future__ import annotations

import asyncio
import builtins
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import httpx2
import pytest
import requests

from support.error_text import assert_silent
from support.frame_walk import Walk
from support.http_callers import CALLERS, Call
from support.http_world import World
from support.oauth2_calls import GOOD, ID, SECRET, record
from support.scripted_endpoint import Endpoint, answer
from support.sync_stores import ended_loop_thread
from tokenstore import (
    ConfigurationError,
    InvalidInputError,
    Keyring,
    MissingDependencyError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    TokensMissingError,
    UnsupportedOperationError,
    open_store,
)
from tokenstore.integrations.aiohttp import StoreAuth as AiohttpAuth
from tokenstore.integrations.httpx import StoreAuth as HttpxAuth
from tokenstore.integrations.httpx2 import StoreAuth as Httpx2Auth
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.requests import StoreAuth as RequestsAuth
from tokenstore.sync import open_store as open_sync_store


@pytest.fixture(autouse=True)
def _loop_thread() -> Iterator[None]:
    with ended_loop_thread():
        yield


ADAPTERS: list[Any] = [HttpxAuth, Httpx2Auth, RequestsAuth, AiohttpAuth]
every_client = pytest.mark.parametrize("world", CALLERS, indirect=True)
every_adapter = pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.__module__)


@pytest.mark.parametrize(
    ("origins", "why"),
    [
        ("https://api.example.com", "collection"),
        ([], "at least one"),
        (None, "collection"),
        ([7], "without"),
        (["https://api.example.com/"], "without"),
        (["https://api.example.com/v1"], "without"),
        (["https://api.example.com?x"], "without"),
        (["https://api.example.com#x"], "without"),
        (["https://s3cr3t@api.example.com"], "without"),
        (["https://user:s3cr3t@api.example.com"], "without"),
        (["https://api.example.com:0"], "without"),
        (["https://api.example.com:65536"], "without"),
        (["https://api.example.com:"], "without"),
        (["https://api.example.com\n"], "without"),
        (["https://bücher.example"], "ASCII"),
        (["https://*"], "without"),
        (["https://"], "without"),
        (["api.example.com"], "without"),
        (["ftp://localhost"], "without"),
        (["https://api.example.com", "http://api.example.com"], "https"),
        (["http://10.0.0.1:8080"], "https"),
        (["http://127.0.0.1.example.com:8080"], "https"),
        (["http://localhost"], "beside it"),
        (["http://127.0.0.1:80", "https://127.0.0.1:8443"], "beside it"),
    ],
)
@every_adapter
def test_an_origin_is_checked_when_the_adapter_is_made(
    adapter: Callable[..., object], origins: Any, why: str, keyring: Keyring
) -> None:
    """The error does not contain the origin, which may contain a password."""
    with pytest.raises(ConfigurationError, match=why) as caught:
        adapter(open_store("memory://", keyring=keyring), "github", "u1", origins=origins)
    assert_silent(caught.value, "s3cr3t")


@every_adapter
def test_the_origins_have_to_be_named(adapter: Any, keyring: Keyring) -> None:
    with pytest.raises(TypeError, match="origins"):
        adapter(open_store("memory://", keyring=keyring), "github", "u1")


@every_adapter
def test_other_arguments_are_checked_when_the_adapter_is_made(adapter: Any, keyring: Keyring) -> None:
    store, origins = open_store("memory://", keyring=keyring), ["https://api.example.com"]
    for arguments, why in (
        ((object(), "github", "u1"), "store must be"),
        ((store, "github", "u1", "account"), "unknown arguments: force"),
    ):
        with pytest.raises(ConfigurationError, match=why):
            adapter(*arguments[:3], origins=origins, **({"force": True} if len(arguments) > 3 else {}))
    with pytest.raises(InvalidInputError, match="user_id"):
        adapter(store, "github", "", origins=origins)


@pytest.mark.parametrize(
    ("origin", "url", "goes"),
    [
        ("https://api.example.com", "https://API.example.com:443/x", True),
        ("https://API.Example.com:443", "https://api.example.com/x", True),
        ("https://api.example.com", "https://api.example.com:8443/x", False),
        ("https://api.example.com", "http://api.example.com/x", False),
        ("https://api.example.com", "http://api.example.com:443/x", False),
        ("https://api.example.com", "https://api.example.com.evil.example/x", False),
        ("https://api.example.com", "https://api.example.com@evil.example/x", False),
        ("https://api.example.com", "https://evil.example/https://api.example.com", False),
        ("https://xn--bcher-kva.example", "https://bücher.example/x", True),
        ("http://[::1]:8080", "http://[0:0::1]:8080/x", True),
        ("http://127.0.0.1:8080", "http://localhost:8080/x", False),
    ],
)
def test_which_urls_get_the_token(origin: str, url: str, goes: bool, keyring: Keyring) -> None:
    """By the parser of each library. A URL that it refuses is not sent."""
    authorized: dict[str, bool] = {}
    with open_sync_store("memory://", keyring=keyring) as store:
        store.setup()
        store.store_tokens("github", "u1", "the-token", None, None)
        for library, adapter in (("httpx", HttpxAuth), ("httpx2", Httpx2Auth)):
            module = importlib.import_module(library)
            try:
                request = module.Request("GET", url)
            except module.InvalidURL:
                continue
            flow = adapter(store, "github", "u1", origins=[origin]).sync_auth_flow(request)
            authorized[library] = next(flow).headers.get("Authorization") == "Bearer the-token"
            flow.close()
        auth = RequestsAuth(store, "github", "u1", origins=[origin])
        prepared = requests.Request("GET", url, auth=auth).prepare()
        authorized["requests"] = prepared.headers.get("Authorization") == "Bearer the-token"

    async def with_aiohttp() -> bool:
        sent: list[str | None] = []

        async def stop(request: aiohttp.ClientRequest, _: object) -> aiohttp.ClientResponse:
            sent.append(request.headers.get("Authorization"))
            raise aiohttp.ClientError

        async with open_store("memory://", keyring=keyring) as store, aiohttp.ClientSession() as session:
            await store.setup()
            await store.store_tokens("github", "u1", "the-token", None, None)
            auth = AiohttpAuth(store, "github", "u1", origins=[origin])
            with pytest.raises(aiohttp.ClientError):
                await session.get(url, middlewares=(auth, stop))
        return sent == ["Bearer the-token"]

    authorized["aiohttp"] = asyncio.run(with_aiohttp())
    if "evil" not in url:
        assert len(authorized) == 4
    assert set(authorized.values()) == {goes}, authorized


@every_client
def test_a_user_without_a_row_gets_the_store_s_error(world: World) -> None:
    """No request is sent."""
    with pytest.raises(TokensMissingError):
        world.send(user="carol")
    assert not world.api.received


@every_client
def test_options_reach_the_store(world: World) -> None:
    world.caller.on_store(lambda store: store.store_tokens("github", "alice", "work-token", None, None, account="work"))
    world.api.answers["/ok"] = 200, {}, b""
    world.send("/ok", options={"account": "work"})
    assert world.api.tokens() == ["Bearer work-token"]
    world.send(options={"min_ttl": 7200})  # half of the lifetime counts
    assert world.provider.stats().refreshes == 0
    with pytest.raises(InvalidInputError, match="min_ttl"):
        world.send(options={"min_ttl": -1})


def test_a_refused_token_without_a_refresher_is_a_configuration_error(endpoint: Endpoint, keyring: Keyring) -> None:
    """As for a personal access token that was revoked."""
    endpoint.script(answer(b"", 401))
    origin = f"http://{endpoint.address}"
    with open_sync_store("memory://", keyring=keyring) as store, requests.Session() as session:
        store.setup()
        store.store_tokens("github", "u1", "personal", None, None)
        with pytest.raises(ConfigurationError, match="refresh"):
            session.get(f"{origin}/", auth=RequestsAuth(store, "github", "u1", origins=[origin]), timeout=10)


@every_client
@pytest.mark.parametrize("token", ["two words-secret", "trailing-secret "])
def test_a_token_with_a_space_is_refused_without_showing_it(world: World, token: str) -> None:
    """The errors of the HTTP libraries would contain the token."""
    world.caller.on_store(lambda store: store.store_tokens("github", "alice", token, None, None))
    with pytest.raises(UnsupportedOperationError, match="space") as caught:
        world.send()
    Walk([token]).through(caught.value, "a token with a space")
    assert not world.api.received


@every_client
def test_no_error_and_no_repr_shows_a_token(world: World) -> None:
    """Neither do the local variables of tokenstore's frames in the traceback."""
    walk = Walk([*world.secrets, SECRET])
    call = world.call()
    auth = world.caller.auth(call)
    world.revoke_grant("bob")
    with pytest.raises(ReauthorizationRequiredError) as dead:
        world.send(user="bob")
    walk.through(dead.value, "a revoked grant after a 401")
    world.refuse_access_token()
    world.provider.fail_next(503, times=5)
    with pytest.raises(ProviderUnavailableError) as outage:
        world.send()
    walk.through(outage.value, "an outage after a 401")
    for text in (repr(auth), str(vars(auth))):
        assert "alice" in text
        assert world.api.origin in text
        assert not any(secret in text for secret in world.secrets)


@every_client
def test_an_error_of_the_http_client_has_no_token_in_our_frames(world: World) -> None:
    """The API is not there."""
    nowhere = "http://127.0.0.1:9"
    with pytest.raises(
        (httpx2.HTTPError, aiohttp.ClientError, requests.RequestException, OSError, Exception)
    ) as caught:
        world.caller.send(Call(f"{nowhere}/who", origins=[nowhere]))
    assert "Connect" in type(caught.value).__name__
    Walk(world.secrets).through(caught.value, "no server", frames_alone=True)


@pytest.mark.parametrize("world", ["aiohttp"], indirect=True)
def test_an_error_of_aiohttp_does_not_show_the_token(world: World) -> None:
    """Its ``repr`` contains the request's headers."""
    world.api.answers["/broken"] = 500, {}, b""
    reply = world.send("/broken")
    with pytest.raises(aiohttp.ClientResponseError) as caught:
        reply.native.raise_for_status()
    assert world.api.tokens() == [f"Bearer {world.secrets[0]}"]
    assert_silent(caught.value, *world.secrets)


@every_adapter
def test_the_store_of_the_other_kind_is_refused_by_a_request(adapter: Any, keyring: Keyring) -> None:
    origins = ["https://api.example.com"]
    with open_sync_store("memory://", keyring=keyring) as store:
        auth = adapter(store, "github", "u1", origins=origins)
        with pytest.raises(UnsupportedOperationError, match=r"use tokenstore\.open_store"):
            asyncio.run(_asynchronous(auth))
    if adapter is not AiohttpAuth:
        auth = adapter(open_store("memory://", keyring=keyring), "github", "u1", origins=origins)
        with pytest.raises(UnsupportedOperationError, match=r"use tokenstore\.sync\.open_store"):
            _synchronous(auth)


async def _asynchronous(auth: Any) -> None:
    if isinstance(auth, RequestsAuth):
        raise UnsupportedOperationError("use tokenstore.open_store")  # there is no async Requests
    if isinstance(auth, AiohttpAuth):
        async with aiohttp.ClientSession() as session:
            await session.get("https://api.example.com/", middlewares=(auth,))
    else:
        library = importlib.import_module(type(auth).__module__.rpartition(".")[2])
        async with library.AsyncClient() as client:
            await client.get("https://api.example.com/", auth=auth)


def _synchronous(auth: Any) -> None:
    if isinstance(auth, RequestsAuth):
        requests.get("https://api.example.com/", auth=auth, timeout=5)
    else:
        library = importlib.import_module(type(auth).__module__.rpartition(".")[2])
        library.get("https://api.example.com/", auth=auth)


@pytest.mark.parametrize("library", ["httpx", "httpx2", "aiohttp", "requests"])
def test_without_its_extra_a_module_says_what_to_install(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == library:
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, f"tokenstore.integrations.{library}")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=rf'pip install "tokenstore\[{library}\]"'):
        importlib.import_module(f"tokenstore.integrations.{library}")


def test_a_refresher_takes_a_client_of_httpx2(endpoint: Endpoint) -> None:
    """It gets the response, and an outage, as with httpx; the client is not closed."""
    endpoint.script(answer(GOOD, Connection="keep-alive"))

    async def main() -> None:
        async with httpx2.AsyncClient(trust_env=False, auth=("somebody", "else")) as client:
            refresher = OAuth2Refresher(endpoint.url, ID, http_client=client)
            assert await refresher(record()) == GOOD
            assert not client.is_closed
            endpoint.script(endpoint.hang)
            with pytest.raises(ProviderUnavailableError, match="answer") as caught:
                await OAuth2Refresher(endpoint.url, ID, http_client=client, timeout=0.3)(record())
            assert caught.value.code == "timeout"
            elsewhere = OAuth2Refresher("http://127.0.0.1:9/token", ID, http_client=client)
            with pytest.raises(ProviderUnavailableError, match="cannot be reached") as caught:
                await elsewhere(record())
            assert caught.value.code == "network_error"

    asyncio.run(main())
    assert not [request for request in endpoint.received if "authorization" in request.headers]


def test_a_refresher_refuses_another_http_client() -> None:
    """When it is made, and not at the first refresh."""
    for client in (requests.Session(), httpx2.Client(), object()):
        with pytest.raises(ConfigurationError, match="AsyncClient of httpx or httpx2"):
            OAuth2Refresher("https://example.com/token", ID, http_client=client)  # type: ignore[arg-type]
