"""An MCP server that takes the access tokens of the strict provider, and has the provider's token endpoint."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import uvicorn
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import MCPServer
from pydantic import AnyHttpUrl
from starlette.requests import Request
from starlette.responses import Response

from tokenstore.testing.provider import StrictRotatingProvider

__all__ = ["mcp_server"]


@contextmanager
def mcp_server(provider: StrictRotatingProvider) -> Iterator[str]:
    """Serve MCP in a thread, with the tool ``answer``. Gives the URL of the MCP endpoint.

    The token endpoint is where the MCP SDK looks for it if it has discovered no other one: ``/token`` of the same
    origin. It passes requests on to the provider.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    origin = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def http_client() -> httpx2.AsyncClient:
        return httpx2.AsyncClient(trust_env=False, verify=False, timeout=60)  # without TLS, which takes time to set up

    class Verifier:
        """Asks the provider whether an access token is valid."""

        async def verify_token(self, token: str) -> AccessToken | None:
            async with http_client() as http:
                response = await http.get(provider.resource_url, headers={"Authorization": f"Bearer {token}"})
            return AccessToken(token=token, client_id=provider.client_id, scopes=[]) if response.is_success else None

    settings = AuthSettings(
        issuer_url=AnyHttpUrl(origin),
        resource_server_url=AnyHttpUrl(f"{origin}/mcp"),
        validate_token_resource=False,  # the provider's tokens are for no resource in particular
    )
    server = MCPServer("benchmark", token_verifier=Verifier(), auth=settings)

    @server.tool()
    async def answer() -> str:
        """Answer."""
        return "answer"

    async def token(request: Request) -> Response:
        kept = {name: request.headers[name] for name in ("Authorization", "Content-Type") if name in request.headers}
        async with http_client() as http:
            response = await http.post(provider.token_url, content=await request.body(), headers=kept)
        return Response(response.content, response.status_code, media_type="application/json")

    server.custom_route("/token", methods=["POST"])(token)
    app = server.streamable_http_app(stateless_http=True, json_response=True)
    config = uvicorn.Config(app, log_level="critical", lifespan="on", ws="none")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, args=([listener],))
    thread.start()
    try:
        yield f"{origin}/mcp"
    finally:
        running.should_exit = True
        thread.join()
        listener.close()
