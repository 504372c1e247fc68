"""A real MCP server that demands OAuth: the SDK's server with a strict authorization server, in a thread."""

from __future__ import annotations

import secrets
import socket
import time
from collections import Counter
from typing import Any, Self
from urllib.parse import parse_qsl

from mcp.server.auth.provider import (
    AccessToken,
    AuthorizationCode,
    AuthorizationParams,
    OAuthAuthorizationServerProvider,
    RefreshToken,
    TokenError,
    construct_redirect_uri,
)
from mcp.server.auth.settings import AuthSettings, ClientRegistrationOptions
from mcp.server.mcpserver import MCPServer
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from pydantic import AnyHttpUrl

from support.asgi_servers import serving_asgi

__all__ = ["McpServer"]


class _Strict(OAuthAuthorizationServerProvider[AuthorizationCode, RefreshToken, AccessToken]):
    """Logs in whoever comes. Each refresh token works once; a used one ends the grant with all its tokens.

    Attributes:
        lifetime: Of an access token, in seconds.
        rejections: How many of the next requests are refused, whatever their access token.
        counts: What was done how often.
    """

    def __init__(self) -> None:
        self.lifetime = 3600
        self.rejections = 0
        self.counts: Counter[str] = Counter()
        self.clients: dict[str, OAuthClientInformationFull] = {}
        self.codes: dict[str, AuthorizationCode] = {}
        self.refresh: dict[str, tuple[str, RefreshToken]] = {}
        self.access: dict[str, tuple[str, AccessToken]] = {}
        self.used: dict[str, str] = {}
        self.ended: set[str] = set()

    async def get_client(self, client_id: str) -> OAuthClientInformationFull | None:
        return self.clients.get(client_id)

    async def register_client(self, client_info: OAuthClientInformationFull) -> None:
        self.counts["registrations"] += 1
        self.clients[client_info.client_id] = client_info

    async def authorize(self, client: OAuthClientInformationFull, params: AuthorizationParams) -> str:
        self.counts["logins"] += 1
        code = AuthorizationCode(
            code=secrets.token_urlsafe(32),
            scopes=params.scopes or [],
            expires_at=time.time() + 60,
            client_id=client.client_id,
            code_challenge=params.code_challenge,
            redirect_uri=params.redirect_uri,
            redirect_uri_provided_explicitly=params.redirect_uri_provided_explicitly,
            resource=params.resource,
        )
        self.codes[code.code] = code
        return construct_redirect_uri(str(params.redirect_uri), code=code.code, state=params.state)

    async def load_authorization_code(
        self, client: OAuthClientInformationFull, authorization_code: str
    ) -> AuthorizationCode | None:
        return self.codes.get(authorization_code)

    async def exchange_authorization_code(
        self, client: OAuthClientInformationFull, authorization_code: AuthorizationCode
    ) -> OAuthToken:
        del self.codes[authorization_code.code]
        return self._issue(secrets.token_hex(8), client, authorization_code.resource)

    async def load_refresh_token(self, client: OAuthClientInformationFull, refresh_token: str) -> RefreshToken | None:
        if grant := self.used.get(refresh_token):
            self.counts["reuses"] += 1
            self.ended.add(grant)
        grant, found = self.refresh.get(refresh_token, ("", None))
        return None if grant in self.ended else found

    async def exchange_refresh_token(
        self, client: OAuthClientInformationFull, refresh_token: RefreshToken, scopes: list[str]
    ) -> OAuthToken:
        if refresh_token.token not in self.refresh:
            raise TokenError("invalid_grant")
        self.counts["refreshes"] += 1
        grant, _ = self.refresh.pop(refresh_token.token)
        self.used[refresh_token.token] = grant
        return self._issue(grant, client, refresh_token.resource)

    async def load_access_token(self, token: str) -> AccessToken | None:
        if self.rejections:
            self.rejections -= 1
            return None
        grant, found = self.access.get(token, ("", None))
        return None if grant in self.ended else found

    async def revoke_token(self, token: AccessToken | RefreshToken) -> None:
        grant, _ = self.access.get(token.token) or self.refresh.get(token.token) or ("", None)
        self.ended.add(grant)

    def _issue(self, grant: str, client: OAuthClientInformationFull, resource: str | None) -> OAuthToken:
        names: dict[str, Any] = {"client_id": client.client_id, "scopes": [], "resource": resource}
        access, refresh = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
        self.access[access] = grant, AccessToken(token=access, expires_at=int(time.time()) + self.lifetime, **names)
        self.refresh[refresh] = grant, RefreshToken(token=refresh, **names)
        return OAuthToken(access_token=access, refresh_token=refresh, expires_in=self.lifetime)


class McpServer:
    """Serves one tool, ``double``. Use it as a context manager.

    Attributes:
        url: The MCP endpoint.
        oauth: The authorization server.
        forms: The token requests.
    """

    def __init__(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.url = f"{origin}/mcp"
        self.oauth = _Strict()
        self.forms: list[dict[str, str]] = []
        settings = AuthSettings(
            issuer_url=AnyHttpUrl(origin),
            resource_server_url=AnyHttpUrl(self.url),
            client_registration_options=ClientRegistrationOptions(enabled=True),
            validate_token_resource=True,
        )
        server = MCPServer("test", auth_server_provider=self.oauth, auth=settings)

        @server.tool()
        async def double(number: int) -> int:
            """Double a number."""
            return 2 * number

        self._app = server.streamable_http_app()
        self._serving = serving_asgi(self._noting_forms, listener)

    async def _noting_forms(self, scope: Any, receive: Any, send: Any) -> None:
        """The application in front of the server's; it notes the form of each token request."""

        async def noted() -> Any:
            message = await receive()
            if scope["type"] == "http" and scope["path"] == "/token" and message.get("body"):
                self.forms.append(dict(parse_qsl(message["body"].decode())))
            return message

        await self._app(scope, noted, send)

    def __enter__(self) -> Self:
        self._serving.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._serving.__exit__(None, None, None)
