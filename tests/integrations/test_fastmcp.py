"""FastMCP's client with tokens in the store, and its OAuth proxy with its state in the store's values."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from fastmcp import Client

from support.fastmcp_server import proxy_server, resource_server
from support.mcp_client import METADATA, run, with_browser
from tokenstore import AuthTokenStore, Keyring, open_store
from tokenstore.integrations.httpx2 import StoreAuth
from tokenstore.integrations.key_value import StoreKeyValue
from tokenstore.integrations.mcp import StoreOAuthProvider
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.testing.provider import StrictRotatingProvider

_PAST = timedelta(hours=-1)


@pytest.fixture
def provider() -> Iterator[StrictRotatingProvider]:
    with StrictRotatingProvider() as provider:
        yield provider


def _open(folder: Path, provider: StrictRotatingProvider) -> AuthTokenStore:
    refresher = OAuth2Refresher(provider.token_url, provider.client_id, provider.client_secret)
    keyring = Keyring({"k1": bytes(32)})
    url = f"sqlite:///{folder / 'tokens.db'}"
    return open_store(url, keyring=keyring, refreshers={"acme": refresher}, force_min_age=0)


async def _double(url: str, auth: httpx2.Auth) -> Any:
    async with Client(url, auth=auth) as client:
        return (await client.call_tool("double", {"number": 21})).data


def test_clients_with_the_httpx2_auth_refresh_once(tmp_path: Path, provider: StrictRotatingProvider) -> None:
    """Four stores, as in four processes, two clients each. First the token has expired, then the server refuses it."""

    async def test(url: str) -> None:
        async with AsyncExitStack() as stack:
            stores = [await stack.enter_async_context(_open(tmp_path, provider)) for _ in range(4)]
            await stores[0].setup()
            issued = provider.new_grant("alice")
            pair = issued["access_token"], issued["refresh_token"]
            await stores[0].store_tokens("acme", "u1", *pair, datetime.now(UTC) + _PAST)
            auths = [StoreAuth(store, "acme", "u1", origins=[url.removesuffix("/mcp")]) for store in stores * 2]
            for refreshes in (1, 2):
                assert await asyncio.gather(*(_double(url, auth) for auth in auths)) == [42] * len(auths)
                assert (provider.stats().refreshes, provider.stats().revoked_grants) == (refreshes, 0)
                provider.expire_access_tokens("alice")

    with resource_server(provider) as url:
        asyncio.run(test(url))


def test_clients_with_the_oauth_provider_log_in_once_and_refresh_once(
    tmp_path: Path, provider: StrictRotatingProvider
) -> None:
    """The login goes through the server's proxy to the provider, and so does the refresh."""

    async def test(store: AuthTokenStore) -> None:
        await store.setup()
        assert await _double(url, with_browser(store, url)) == 42
        record = await store.load_tokens("mcp", "u1", account=url)
        assert record is not None
        pair = record["access_token"], record["refresh_token"]
        await store.store_tokens("mcp", "u1", *pair, datetime.now(UTC) + _PAST, account=url)
        auths = [StoreOAuthProvider(store, "u1", url, METADATA) for _ in range(4)]
        assert await asyncio.gather(*(_double(url, auth) for auth in auths)) == [42] * len(auths)

    with proxy_server(provider, _open(tmp_path, provider)) as url:
        run(tmp_path, test)
    assert (provider.stats().refreshes, provider.stats().revoked_grants) == (1, 0)


def test_the_proxy_s_state_survives_a_restart_and_is_sealed(tmp_path: Path, provider: StrictRotatingProvider) -> None:
    """After it, a client without handlers works: the proxy knows its registration, its tokens and the provider's."""
    used: list[str] = []
    secrets: list[str] = []

    async def log_in(store: AuthTokenStore) -> None:
        assert await _double(url, with_browser(store, url)) == 42

    async def use(store: AuthTokenStore) -> None:
        assert await _double(url, StoreOAuthProvider(store, "u1", url, METADATA)) == 42
        values = StoreKeyValue(store)
        async for entry in store.list_values():
            collection = entry["namespace"].removeprefix("key-value/")
            used.append(collection)
            if collection == "mcp-upstream-tokens":
                kept = await values.get(entry["name"], collection=collection)
                assert kept is not None
                secrets.extend([kept["access_token"], kept["refresh_token"]])

    asyncio.run(_set_up(tmp_path, provider))
    with proxy_server(provider, _open(tmp_path, provider)) as url:
        run(tmp_path, log_in)
    with proxy_server(provider, _open(tmp_path, provider), urlsplit(url).port or 0) as again:
        assert again == url
        run(tmp_path, use)
        stored = b"".join(path.read_bytes() for path in tmp_path.glob("tokens.db*"))
    assert {"mcp-oauth-proxy-clients", "mcp-upstream-tokens", "mcp-jti-mappings", "mcp-refresh-tokens"} <= {*used}
    assert b"mcp-upstream-tokens" in stored
    assert len(secrets) == 2
    assert [secret for secret in secrets if secret.encode() in stored] == []


async def _set_up(folder: Path, provider: StrictRotatingProvider) -> None:
    async with _open(folder, provider) as store:
        await store.setup()
