"""Real FastMCP servers that demand OAuth, with the strict provider as their authorization server."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx2
from fastmcp import FastMCP
from fastmcp.server.auth import AccessToken, AuthProvider, OAuthProxy, RemoteAuthProvider, TokenVerifier
from pydantic import AnyHttpUrl

from support.asgi_servers import serving_asgi
from tokenstore import AuthTokenStore
from tokenstore.integrations.key_value import StoreKeyValue
from tokenstore.testing.provider import StrictRotatingProvider

__all__ = ["proxy_server", "resource_server"]


class _Verifier(TokenVerifier):
    """Asks the provider whose access token it is."""

    def __init__(self, provider: StrictRotatingProvider) -> None:
        super().__init__()
        self._provider = provider

    async def verify_token(self, token: str) -> AccessToken | None:
        async with httpx2.AsyncClient(trust_env=False, verify=False) as http:  # without TLS, which takes time to set up
            response = await http.get(self._provider.resource_url, headers={"Authorization": f"Bearer {token}"})
        if response.status_code != 200:
            return None
        return AccessToken(token=token, client_id=self._provider.client_id, scopes=[], subject=response.json()["user"])


@contextmanager
def resource_server(provider: StrictRotatingProvider) -> Iterator[str]:
    """A server that takes the provider's access tokens. Gives the URL of its MCP endpoint."""

    def auth(origin: str) -> AuthProvider:
        issuers = [AnyHttpUrl(provider.base_url)]
        return RemoteAuthProvider(_Verifier(provider), authorization_servers=issuers, base_url=origin)

    with _served(auth) as url:
        yield url


@contextmanager
def proxy_server(provider: StrictRotatingProvider, store: AuthTokenStore, port: int = 0) -> Iterator[str]:
    """A server whose OAuth proxy logs users in at the provider, and keeps its state in the store, which it closes.

    Gives the URL of its MCP endpoint.
    """

    def auth(origin: str) -> AuthProvider:
        return OAuthProxy(
            upstream_authorization_endpoint=provider.authorize_url,
            upstream_token_endpoint=provider.token_url,
            upstream_client_id=provider.client_id,
            upstream_client_secret=provider.client_secret,
            token_verifier=_Verifier(provider),
            base_url=origin,
            client_storage=StoreKeyValue(store),
            require_authorization_consent=False,
        )

    @asynccontextmanager
    async def lifespan(server: FastMCP[Any]) -> AsyncIterator[dict[str, Any]]:
        async with store:
            yield {}

    with _served(auth, port, lifespan=lifespan) as url:
        yield url


@contextmanager
def _served(auth: Callable[[str], AuthProvider], port: int = 0, **options: Any) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", port))
    origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server: FastMCP[Any] = FastMCP("test", auth=auth(origin), **options)

    @server.tool
    async def double(number: int) -> int:
        """Double a number."""
        return 2 * number

    with serving_asgi(server.http_app(), listener):
        yield f"{origin}/mcp"
