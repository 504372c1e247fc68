"""The MCP SDK's client with tokens in the store: a refused token is refreshed before the user has to log in."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import pytest

from support.mcp_client import METADATA, double, run, with_browser
from support.mcp_server import McpServer
from tokenstore import AuthTokenStore, ProviderUnavailableError, ReauthorizationRequiredError, TokenStoreError
from tokenstore.integrations import mcp
from tokenstore.integrations.mcp import StoreOAuthProvider


@pytest.fixture
def server() -> Iterator[McpServer]:
    with McpServer() as server:
        yield server


def _raises(error: type[TokenStoreError], code: str) -> pytest.RaisesGroup[TokenStoreError]:
    """The error, which the SDK may wrap."""
    found = pytest.RaisesExc(error, check=lambda raised: getattr(raised, "code", None) == code)
    return pytest.RaisesGroup(found, allow_unwrapped=True, flatten_subgroups=True)


def _requests_of(error: BaseException) -> Iterator[httpx2.Request]:
    """The requests in the variables of the provider's frames, which an error keeps alive."""
    for inner in getattr(error, "exceptions", ()):
        yield from _requests_of(inner)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == mcp.__file__:
            yield from (value for value in frame.f_locals.values() if isinstance(value, httpx2.Request))


async def _log_in(store: AuthTokenStore, server: McpServer) -> None:
    assert await double(with_browser(store, server.url), server) == {"result": 42}


def test_clients_with_the_same_refused_token_refresh_once(tmp_path: Path, server: McpServer) -> None:
    """The server has forgotten a token that is valid in the store. Nobody logs in."""

    async def test(store: AuthTokenStore) -> None:
        await _log_in(store, server)
        server.oauth.access.clear()
        auths = [
            with_browser(store, server.url),
            *(StoreOAuthProvider(store, "u1", server.url, METADATA) for _ in "123"),
        ]
        assert await asyncio.gather(*(double(auth, server) for auth in auths)) == [{"result": 42}] * 4

    run(tmp_path, test)
    assert server.oauth.counts == {"registrations": 1, "logins": 1, "refreshes": 1}


def test_a_login_begins_if_the_new_token_is_refused_too(tmp_path: Path, server: McpServer) -> None:
    async def test(store: AuthTokenStore) -> None:
        await _log_in(store, server)
        server.oauth.rejections = 2
        await _log_in(store, server)

    run(tmp_path, test)
    assert server.oauth.counts == {"registrations": 1, "logins": 2, "refreshes": 1}


def test_a_new_token_that_is_refused_is_not_refreshed(tmp_path: Path, server: McpServer) -> None:
    """A server that refuses every token costs a login, and not a refresh for each request as well."""

    async def test(store: AuthTokenStore) -> None:
        await _log_in(store, server)
        server.oauth.rejections = 1
        await _log_in(store, server)

    run(tmp_path, test, force_min_age=60)
    assert server.oauth.counts == {"registrations": 1, "logins": 2}


def test_a_dead_grant_means_a_login_after_a_refused_token(tmp_path: Path, server: McpServer) -> None:
    async def test(store: AuthTokenStore) -> None:
        await _log_in(store, server)
        server.oauth.access.clear()
        server.oauth.refresh.clear()
        with _raises(ReauthorizationRequiredError, "invalid_grant"):
            await double(StoreOAuthProvider(store, "u1", server.url, METADATA), server)
        await _log_in(store, server)

    run(tmp_path, test)
    assert server.oauth.counts == {"registrations": 1, "logins": 2}


def test_no_login_begins_while_the_token_endpoint_is_away(tmp_path: Path, server: McpServer) -> None:
    async def test(store: AuthTokenStore) -> None:
        await _log_in(store, server)
        record = await store.load_tokens("mcp", "u1", account=server.url)
        assert record is not None
        away = {**record["metadata"]["mcp"], "token_endpoint": "http://127.0.0.1:1/token"}
        await store.update_metadata("mcp", "u1", {"mcp": away}, account=server.url)
        server.oauth.access.clear()
        with _raises(ProviderUnavailableError, "network_error") as caught:
            await double(with_browser(store, server.url), server)
        requests = list(_requests_of(caught.value))
        assert requests
        assert [request for request in requests if "Authorization" in request.headers] == []

    run(tmp_path, test)
    assert server.oauth.counts == {"registrations": 1, "logins": 1}


def test_without_handlers_the_error_says_that_the_user_has_to_log_in(tmp_path: Path, server: McpServer) -> None:
    """Before the first login, and if the server refuses each token. A worker registers no client."""

    async def test(store: AuthTokenStore) -> None:
        worker = StoreOAuthProvider(store, "u1", server.url, METADATA)
        with _raises(ReauthorizationRequiredError, "login_required"):
            await double(worker, server)
        assert not server.oauth.counts
        await _log_in(store, server)
        server.oauth.rejections = 2
        with _raises(ReauthorizationRequiredError, "login_required"):
            await double(worker, server)
        assert await double(worker, server) == {"result": 42}

    run(tmp_path, test)
    assert server.oauth.counts == {"registrations": 1, "logins": 1, "refreshes": 1}


def test_a_body_that_was_read_is_not_sent_again(tmp_path: Path, server: McpServer) -> None:
    """The caller gets the 401, and the next request has the new token."""

    async def body() -> AsyncIterator[bytes]:
        yield b"{}"

    async def test(store: AuthTokenStore) -> None:
        await _log_in(store, server)
        server.oauth.access.clear()
        async with httpx2.AsyncClient(auth=with_browser(store, server.url), trust_env=False) as http:
            assert (await http.post(server.url, content=body())).status_code == 401
            assert (await http.post(server.url, content=body())).status_code not in (401, 403)

    run(tmp_path, test)
    assert server.oauth.counts == {"registrations": 1, "logins": 1, "refreshes": 1}


def test_a_login_keeps_the_application_s_metadata(tmp_path: Path, server: McpServer) -> None:
    async def test(store: AuthTokenStore) -> None:
        await _log_in(store, server)
        await store.update_metadata("mcp", "u1", {"team": "T1"}, account=server.url)
        server.oauth.rejections = 2
        await _log_in(store, server)
        record = await store.load_tokens("mcp", "u1", account=server.url)
        assert record is not None
        assert record["metadata"]["team"] == "T1"
        assert record["metadata"]["mcp"]["token_endpoint"]
        server.oauth.access.clear()
        await _log_in(store, server)  # the new tokens can be refreshed

    run(tmp_path, test)
    assert server.oauth.counts == {"registrations": 1, "logins": 2, "refreshes": 2}
