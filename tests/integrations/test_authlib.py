"""Authlib's own clients with the store's tokens, at a strict provider."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from authlib.integrations.httpx_client import AsyncOAuth2Client

from support.missing_libraries import import_error
from support.oauth2_calls import ID, SECRET
from support.sync_stores import ended_loop_thread
from tokenstore import (
    AuthTokenStore,
    Keyring,
    MissingDependencyError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    TokensMissingError,
    open_store,
    sync,
)
from tokenstore.integrations.authlib import AsyncStoreOAuth2Client, StoreOAuth2Client, authlib_refresher
from tokenstore.testing.provider import StrictRotatingProvider

_CLIENTS = 10
_EXPIRED = datetime.now(UTC) - timedelta(hours=1)
_ROW = ("acme", "u1")


def _resource(provider: StrictRotatingProvider) -> str:
    return provider.token_url.replace("/token", "/resource")


def _client(**options: Any) -> AsyncOAuth2Client:
    return AsyncOAuth2Client(ID, SECRET, token_endpoint_auth_method="client_secret_post", **options)


def _settings(path: Path, provider: StrictRotatingProvider) -> dict[str, Any]:
    return {
        "target": f"sqlite:///{path / 'tokens.db'}",
        "keyring": Keyring({"k1": bytes(32)}),
        "refreshers": {"acme": authlib_refresher(provider.token_url, _client)},
    }


def _run(
    path: Path, provider: StrictRotatingProvider, test: Callable[[AuthTokenStore], Coroutine[None, None, None]]
) -> None:
    async def run() -> None:
        async with open_store(**_settings(path, provider)) as store:
            await store.setup()
            await store.store_tokens(*_ROW, "expired", provider.new_grant("u1")["refresh_token"], _EXPIRED)
            await test(store)

    asyncio.run(run())


def test_many_clients_refresh_once(tmp_path: Path, provider: StrictRotatingProvider) -> None:
    async def test(store: AuthTokenStore) -> None:
        async def get() -> int:
            async with AsyncStoreOAuth2Client(store, *_ROW, client_id=ID) as client:
                response = await client.get(_resource(provider))
                async with client.stream("GET", _resource(provider)) as streamed:
                    assert (await streamed.aread()) == response.content
                    assert streamed.status_code == response.status_code
                return int(response.status_code)

        assert await asyncio.gather(*(get() for _ in range(_CLIENTS))) == [200] * _CLIENTS

    _run(tmp_path, provider, test)
    stats = provider.stats()
    assert (stats.refreshes, stats.requests, stats.reuses) == (1, 1, 0)


def test_many_clients_without_await_refresh_once(tmp_path: Path, provider: StrictRotatingProvider) -> None:
    with ended_loop_thread(), sync.open_store(**_settings(tmp_path, provider)) as store:
        store.setup()
        store.store_tokens(*_ROW, "expired", provider.new_grant("u1")["refresh_token"], _EXPIRED)

        def get(_: int) -> int:
            with StoreOAuth2Client(store, *_ROW, client_id=ID) as client:
                response = client.get(_resource(provider))
                with client.stream("GET", _resource(provider)) as streamed:
                    assert streamed.read() == response.content
                return int(response.status_code)

        with ThreadPoolExecutor(_CLIENTS) as threads:
            assert list(threads.map(get, range(_CLIENTS))) == [200] * _CLIENTS
    stats = provider.stats()
    assert (stats.refreshes, stats.requests, stats.reuses) == (1, 1, 0)


def test_each_request_has_the_newest_token_of_its_account(tmp_path: Path, provider: StrictRotatingProvider) -> None:
    """One client is used before and after a login."""

    async def test(store: AuthTokenStore) -> None:
        async with AsyncStoreOAuth2Client(store, *_ROW, account="work") as client:
            with pytest.raises(TokensMissingError):
                await client.get(_resource(provider))
            await store.store_tokens(*_ROW, provider.new_grant("u2")["access_token"], None, None, account="work")
            assert (await client.get(_resource(provider))).json()["user"] == "u2"
            await store.store_tokens(*_ROW, provider.new_grant("u3")["access_token"], None, None, account="work")
            assert (await client.get(_resource(provider))).json()["user"] == "u3"
            assert (await client.request("GET", _resource(provider), withhold_token=True)).status_code == 401

    _run(tmp_path, provider, test)


def test_the_client_s_own_requests_need_no_tokens(tmp_path: Path, provider: StrictRotatingProvider) -> None:
    async def test(store: AuthTokenStore) -> None:
        options = {"client_id": ID, "client_secret": SECRET, "token_endpoint_auth_method": "client_secret_post"}
        async with AsyncStoreOAuth2Client(store, "acme", "nobody", **options) as client:
            token = await client.fetch_token(provider.token_url, grant_type="client_credentials")
            await store.store_token_response("acme", "nobody", token)
            assert (await client.get(_resource(provider))).status_code == 200

    _run(tmp_path, provider, test)


def test_compliance_hooks_are_used(tmp_path: Path, provider: StrictRotatingProvider) -> None:
    """Authlib's remedy for providers that deviate."""

    def make_client() -> AsyncOAuth2Client:
        client = _client()
        client.register_compliance_hook("refresh_token_request", lambda url, headers, body: (url, headers, body[1:]))
        return client

    async def test(store: AuthTokenStore) -> None:
        refresher = authlib_refresher(provider.token_url, make_client)
        with pytest.raises(ProviderRefusedError):
            await store.load_fresh_tokens(*_ROW, refresh=refresher)

    _run(tmp_path, provider, test)


def test_authlib_s_errors_are_understood(tmp_path: Path, provider: StrictRotatingProvider) -> None:
    async def test(store: AuthTokenStore) -> None:
        async def error_of(refresh_token: str, expected: type[Exception]) -> Exception:
            await store.store_tokens(*_ROW, "expired", refresh_token, _EXPIRED)
            async with AsyncStoreOAuth2Client(store, *_ROW) as client:
                with pytest.raises(expected) as raised:
                    await client.get(_resource(provider))
            return raised.value

        error = await error_of("never-issued", ReauthorizationRequiredError)
        assert "never-issued" not in str(error)
        assert error.__cause__ is None or "never-issued" not in str(error.__cause__)
        good = provider.new_grant("u1")["refresh_token"]
        provider.stop()
        await error_of(good, ProviderUnavailableError)

    _run(tmp_path, provider, test)


@pytest.mark.parametrize("missing", ["authlib", "httpx2"])
def test_a_missing_library_is_named(missing: str) -> None:
    error = import_error("tokenstore.integrations.authlib", missing)
    assert error.startswith(MissingDependencyError.__name__)
    assert 'pip install "tokenstore[authlib]"' in error
