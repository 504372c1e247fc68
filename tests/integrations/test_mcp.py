"""The MCP SDK's own client, with tokens in the store, against the SDK's server that demands OAuth."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qsl

import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from support.mcp_client import METADATA, double, run, with_browser
from support.mcp_server import McpServer
from support.missing_libraries import import_error
from support.scripted_endpoint import Endpoint, answer
from tokenstore import AuthTokenStore, MissingDependencyError, ReauthorizationRequiredError
from tokenstore.integrations.mcp import StoreOAuthProvider

_PROCESSES = 8


@pytest.fixture
def server() -> Iterator[McpServer]:
    with McpServer() as server:
        yield server


async def _expire(store: AuthTokenStore, server: McpServer, user: str = "u1") -> None:
    """Let the access token expire, in the store and at the server."""
    async with store.transaction() as tx:
        record = await tx.load_tokens("mcp", user, for_update=True, account=server.url)
        assert record is not None
        server.oauth.access.pop(record["access_token"], None)
        expired = datetime.now(UTC) - timedelta(hours=1)
        names = ("mcp", user, record["access_token"], record["refresh_token"])
        await tx.store_tokens(*names, expired, account=server.url, extra=record["extra"])


def test_after_a_restart_nobody_logs_in_again(tmp_path: Path, server: McpServer) -> None:
    """Neither with a valid nor with an expired token."""

    async def log_in(store: AuthTokenStore) -> None:
        assert await double(with_browser(store, server.url), server) == {"result": 42}
        record = await store.load_tokens("mcp", "u1", account=server.url)
        assert record is not None
        assert record["access_token_expires_at"] is not None

    async def use(store: AuthTokenStore) -> None:
        assert await double(StoreOAuthProvider(store, "u1", server.url, METADATA), server) == {"result": 42}

    async def expire_and_use(store: AuthTokenStore) -> None:
        await _expire(store, server)
        await use(store)
        await _expire(store, server)  # the new pair can be refreshed, too
        await use(store)

    for step in (log_in, use, expire_and_use):
        run(tmp_path, step)
    assert server.oauth.counts == {"registrations": 1, "logins": 1, "refreshes": 2}
    # Each request names the resource (RFC 8707).
    assert [form["grant_type"] for form in server.forms] == ["authorization_code", "refresh_token", "refresh_token"]
    assert {form["resource"] for form in server.forms} == {server.url}


def test_eight_processes_refresh_once(tmp_path: Path, server: McpServer) -> None:
    async def log_in(store: AuthTokenStore) -> None:
        assert await double(with_browser(store, server.url), server) == {"result": 42}
        await _expire(store, server)

    run(tmp_path, log_in)
    program = f"""
import asyncio, httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.auth import OAuthClientMetadata
from tokenstore import Keyring, open_store
from tokenstore.integrations.mcp import StoreOAuthProvider
async def main():
    async with open_store({f"sqlite:///{tmp_path / 'tokens.db'}"!r}, keyring=Keyring({{"k1": bytes(32)}})) as store:
        metadata = OAuthClientMetadata(redirect_uris=["http://127.0.0.1:1/callback"])
        auth = StoreOAuthProvider(store, "u1", {server.url!r}, metadata)
        async with httpx2.AsyncClient(auth=auth, trust_env=False) as http:
            async with Client(streamable_http_client({server.url!r}, http_client=http)) as client:
                input()  # all begin together
                print((await client.call_tool("double", {{"number": 21}})).structured_content)
asyncio.run(main())
"""
    # Each process connects first, which already needs a token.
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(_PROCESSES)
    ]
    printed = [process.communicate("\n", timeout=120)[0] for process in running]
    assert printed == ["{'result': 42}\n"] * _PROCESSES
    assert server.oauth.counts == {"registrations": 1, "logins": 1, "refreshes": 1}


def test_tasks_of_many_users_share_the_registration(tmp_path: Path, server: McpServer) -> None:
    users = [f"u{number}" for number in range(4)]

    async def test(store: AuthTokenStore) -> None:
        for user in users:
            assert await double(with_browser(store, server.url, user), server) == {"result": 42}
            await _expire(store, server, user)
        auths = [StoreOAuthProvider(store, user, server.url, METADATA) for user in users * 3]
        assert await asyncio.gather(*(double(auth, server) for auth in auths)) == [{"result": 42}] * len(auths)

    run(tmp_path, test)
    assert server.oauth.counts == {"registrations": 1, "logins": 4, "refreshes": 4}


def test_each_request_of_a_long_session_has_a_fresh_token(tmp_path: Path, server: McpServer) -> None:
    async def test(store: AuthTokenStore) -> None:
        async with (
            httpx2.AsyncClient(auth=with_browser(store, server.url), trust_env=False) as http,
            Client(streamable_http_client(server.url, http_client=http)) as client,
        ):
            for number in range(3):
                result = await client.call_tool("double", {"number": number})
                assert result.structured_content == {"result": 2 * number}
                await _expire(store, server)

    run(tmp_path, test)
    assert server.oauth.counts["logins"] == 1
    assert server.oauth.counts["reuses"] == 0
    assert server.oauth.counts["refreshes"] >= 2


def test_a_dead_grant_means_a_new_login_or_an_error(tmp_path: Path, server: McpServer) -> None:
    async def test(store: AuthTokenStore) -> None:
        assert await double(with_browser(store, server.url), server) == {"result": 42}
        await _expire(store, server)
        server.oauth.refresh.clear()
        with pytest.RaisesGroup(
            pytest.RaisesExc(ReauthorizationRequiredError), allow_unwrapped=True, flatten_subgroups=True
        ):
            await double(StoreOAuthProvider(store, "u1", server.url, METADATA), server)
        assert await double(with_browser(store, server.url), server) == {"result": 42}

    run(tmp_path, test)
    assert server.oauth.counts == {"registrations": 1, "logins": 2}


def test_a_registration_ends_when_its_secret_expires(tmp_path: Path, server: McpServer) -> None:
    """A row keeps the client that got its tokens."""

    async def test(store: AuthTokenStore) -> None:
        auth = with_browser(store, server.url)
        assert await double(auth, server) == {"result": 42}
        client = auth.context.client_info
        assert client is not None
        client.client_secret_expires_at = int(datetime.now(UTC).timestamp()) + 3600
        await auth.context.storage.set_client_info(client)
        [entry] = [entry async for entry in store.list_values(namespace="mcp-clients")]
        assert entry["expires_at"] is not None
        assert abs(entry["expires_at"] - datetime.now(UTC) - timedelta(hours=1)) < timedelta(minutes=1)
        await store.delete_values("mcp-clients")
        await _expire(store, server)
        assert await double(StoreOAuthProvider(store, "u1", server.url, METADATA), server) == {"result": 42}
        assert await double(with_browser(store, server.url, "u2"), server) == {"result": 42}

    run(tmp_path, test)
    assert server.oauth.counts == {"registrations": 2, "logins": 2, "refreshes": 1}


@pytest.mark.parametrize(
    ("method", "secret", "header", "fields"),
    [
        ("client_secret_basic", "hush", "Basic YzE6aHVzaA==", {}),
        ("client_secret_post", "hush", None, {"client_id": "c1", "client_secret": "hush"}),
        ("none", None, None, {"client_id": "c1"}),
        pytest.param(None, "hush", None, {"client_id": "c1"}, id="a secret without a method"),
        pytest.param("client_secret_post", None, None, {"client_id": "c1"}, id="a method without its secret"),
        pytest.param("private_key_jwt", None, None, {"client_id": "c1"}, id="a method of another grant"),
    ],
)
def test_a_refresh_authenticates_the_client_as_the_sdk_does(
    method: str | None,
    secret: str | None,
    header: str | None,
    fields: dict[str, str],
    tmp_path: Path,
    endpoint: Endpoint,
) -> None:
    client = {"client_id": "c1", "client_secret": secret, "token_endpoint_auth_method": method}
    settings = {"token_endpoint": endpoint.url, "resource": "https://mcp.example.com/mcp", "client": client}
    endpoint.script(answer({"access_token": "new", "token_type": "Bearer", "expires_in": 3600}))

    async def test(store: AuthTokenStore) -> None:
        url, expired = "https://mcp.example.com/mcp", datetime.now(UTC) - timedelta(hours=1)
        await store.store_tokens("mcp", "u1", "old", "r1", expired, account=url, metadata={"mcp": settings})
        auth = StoreOAuthProvider(store, "u1", url, METADATA)
        tokens = await auth.context.storage.get_tokens()
        assert tokens is not None
        assert (tokens.access_token, tokens.refresh_token) == ("new", None)

    run(tmp_path, test)
    [request] = endpoint.received
    form = dict(parse_qsl(request.body))
    assert form == {"grant_type": "refresh_token", "refresh_token": "r1", "resource": settings["resource"], **fields}
    assert request.headers.get("authorization") == header


def test_neither_the_secret_nor_a_token_is_in_the_database_or_in_a_repr(tmp_path: Path, server: McpServer) -> None:
    secret = ""

    async def test(store: AuthTokenStore) -> None:
        nonlocal secret
        auth = with_browser(store, server.url)
        await double(auth, server)
        assert auth.context.client_info is not None
        secret = auth.context.client_info.client_secret or ""
        record = await store.load_tokens("mcp", "u1", account=server.url)
        assert record is not None
        for hidden in (secret, record["access_token"], record["refresh_token"] or ""):
            assert hidden not in repr(auth)
            assert hidden.encode() not in (tmp_path / "tokens.db").read_bytes()

    run(tmp_path, test)
    assert secret


def test_without_the_sdk_the_error_says_what_to_install() -> None:
    error = import_error("tokenstore.integrations.mcp", "mcp")
    assert error.startswith(MissingDependencyError.__name__)
    assert 'pip install "tokenstore[mcp]"' in error
