"""The MCP SDK's own client, with tokens in the store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.auth import AuthorizationCodeResult, OAuthClientMetadata
from pydantic import AnyUrl

from support.mcp_server import McpServer
from tokenstore import AuthTokenStore, Keyring, open_store
from tokenstore.integrations.mcp import StoreOAuthProvider

__all__ = ["METADATA", "Browser", "double", "run", "with_browser"]

_CALLBACK = "http://127.0.0.1:1/callback"
METADATA = OAuthClientMetadata(redirect_uris=[AnyUrl(_CALLBACK)], client_name="tests")


class Browser:
    """Follows the redirects of the login until they lead back to the application, as the user's browser does."""

    def __init__(self) -> None:
        self._answer: dict[str, list[str]] = {}

    async def redirect(self, url: str) -> None:
        async with httpx2.AsyncClient(trust_env=False) as http:
            while not url.startswith(_CALLBACK):
                url = (await http.get(url)).headers["Location"]
        self._answer = parse_qs(urlsplit(url).query)

    async def callback(self) -> AuthorizationCodeResult:
        return AuthorizationCodeResult(**{name: values[0] for name, values in self._answer.items()})


def with_browser(store: AuthTokenStore, url: str, user: str = "u1") -> StoreOAuthProvider:
    """A provider whose user logs in as soon as it is asked to."""
    browser = Browser()
    return StoreOAuthProvider(store, user, url, METADATA, browser.redirect, browser.callback)


async def double(auth: httpx2.Auth, server: McpServer) -> Any:
    """Call the server's tool in a session of its own."""
    async with (
        httpx2.AsyncClient(auth=auth, trust_env=False) as http,
        Client(streamable_http_client(server.url, http_client=http)) as client,
    ):
        result = await client.call_tool("double", {"number": 21})
        return result.structured_content


def run(
    folder: Path, test: Callable[[AuthTokenStore], Coroutine[None, None, None]], *, force_min_age: float = 0
) -> None:
    """Run a test with the store in the folder, whose tables are made."""

    async def run() -> None:
        keyring = Keyring({"k1": bytes(32)})
        target = f"sqlite:///{folder / 'tokens.db'}"
        async with open_store(target, keyring=keyring, force_min_age=force_min_age) as store:
            await store.setup()
            await test(store)

    asyncio.run(run())
