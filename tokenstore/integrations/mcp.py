"""Tokens for the client of the Model Context Protocol's Python SDK; needs the extra ``mcp``.

::

    auth = StoreOAuthProvider(store, "user-123", "https://mcp.example.com/mcp", client_metadata, redirect, callback)
    async with httpx2.AsyncClient(auth=auth) as http:
        async with streamable_http_client("https://mcp.example.com/mcp", http_client=http) as streams:
            ...
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urljoin

from tokenstore.errors import MissingDependencyError, ReauthorizationRequiredError
from tokenstore.integrations._exchange import refuses_token
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.records import RefreshableRecord, TokenRecord
from tokenstore.store import AuthTokenStore
from tokenstore.tracebacks import clears_locals

try:
    import httpx2
    from mcp.client.auth import OAuthClientProvider
    from mcp.shared.auth import AuthorizationCodeResult, OAuthClientInformationFull, OAuthClientMetadata, OAuthToken
except ImportError:
    raise MissingDependencyError(
        'tokenstore.integrations.mcp needs the MCP SDK: pip install "tokenstore[mcp]"'
    ) from None

__all__ = ["StoreOAuthProvider"]

_CLIENTS: Final = "mcp-clients"
_SETTINGS: Final = "mcp"
"""The field of a row's metadata that has what a refresh needs."""


class StoreOAuthProvider(OAuthClientProvider):
    """The SDK's OAuth provider for one user at one MCP server, with tokens in the store.

    The SDK's own provider refreshes without a lock that other processes know, and a refresh token that two of them use
    is lost. Here the store refreshes, once for all tasks, processes and machines. Tokens, their expiry and the client's
    registration survive a restart, so that no user has to log in again.

    Discovery, registration and login stay the SDK's: they begin when the server answers 401 to a request without a
    token, as in a user's first login, or after the authorization server has refused the refresh token. After a 401 to a
    token of the store, that token is refreshed first, once for all callers with the same refused token, and the request
    is sent once more; a login follows only if the server refuses the new token, too.

    - **The tokens** are a row: the provider is ``"mcp"``, the account is the server's URL. A login keeps the fields
      that the application has in the row's metadata.
    - **The registration** (RFC 7591) is a value in the namespace ``mcp-clients``, shared by all users of the store: it
      has the issuer, which the SDK compares, and ends when its secret expires. A row also keeps the client with which
      its tokens were issued, because no other client can refresh them.
    - **A refresh** names the same resource (RFC 8707) as the login did.

    Args:
        store: The store.
        user_id: The user's id.
        server_url: The MCP server's URL, at most 255 bytes.
        client_metadata: What the application registers; see the SDK.
        redirect_handler: Sends the user to a URL. Default: no login is possible, as in a worker. A request then raises
            :class:`tokenstore.ReauthorizationRequiredError` if the user has to log in again.
        callback_handler: Waits for the user's return, and gives the code.
        provider: The provider's name in the store.
        **options: Further arguments of the SDK's ``OAuthClientProvider``.
    """

    def __init__(
        self,
        store: AuthTokenStore,
        user_id: str,
        server_url: str,
        client_metadata: OAuthClientMetadata,
        redirect_handler: Callable[[str], Awaitable[None]] | None = None,
        callback_handler: Callable[[], Awaitable[AuthorizationCodeResult]] | None = None,
        *,
        provider: str = "mcp",
        **options: Any,
    ) -> None:
        self._store = store
        self._row = provider, user_id
        self._generation = 0  # of the row whose token the SDK has
        super().__init__(server_url, client_metadata, _Storage(self), redirect_handler, callback_handler, **options)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._row!r} at {self.context.server_url}>"

    async def _auth_flow(self, request: httpx2.Request) -> AsyncGenerator[httpx2.Request, httpx2.Response]:
        """The SDK's flow, in which a refused token is refreshed before a login begins."""
        async with aclosing(super()._auth_flow(request)) as flow:
            response = yield await anext(flow)  # the request: the SDK has no refresh token to use before it
            if self._has_refused_token(request, response):
                # An error of the refresh goes through this frame, whose variables must not contain the token.
                del request.headers["Authorization"]
                if await self._replace_token():
                    if not isinstance(request.stream, httpx2.ByteStream):
                        return  # the body was read, and would be sent empty: the caller gets the 401
                    self._add_auth_header(request)
                    response = yield request
            with suppress(StopAsyncIteration):
                while True:
                    if response.status_code == 401:
                        request.headers.pop("Authorization", None)  # as above, for an error of the login
                    step = await flow.asend(response)
                    if step is not request and self.context.redirect_handler is None:
                        raise self._login_required()
                    response = yield step

    def _login_required(self) -> ReauthorizationRequiredError:
        provider, user_id = self._row
        return ReauthorizationRequiredError(
            f"{provider!r}, user {user_id!r}: {self.context.server_url} demands a login, which needs a"
            " redirect_handler and a callback_handler",
            code="login_required",
        )

    def _has_refused_token(self, request: httpx2.Request, response: httpx2.Response) -> bool:
        return (
            self.context.current_tokens is not None  # else the request was sent without a token
            and response.request is request  # and not another one to which the client was redirected
            and response.status_code == 401
            and refuses_token(response.headers.get_list("WWW-Authenticate"))
        )

    async def _initialize(self) -> None:
        """Load what a request needs. The SDK calls this under its lock, where nothing is loaded yet."""
        await self._load_into_context()
        if self.context.client_info is None:
            self.context.client_info = await self._load_client()
        # `_initialized` stays False, so the next request loads its token anew.

    async def _replace_token(self) -> bool:
        """After a 401: refresh the token, or load the one that replaced it. Returns whether there is another one."""
        refused = self._generation
        await self._load_into_context(refused)
        return self.context.current_tokens is not None and self._generation != refused

    async def _load_into_context(self, refused: int | None = None) -> None:
        context = self.context
        record = await self._load_record(refused)
        if record is None:
            context.clear_tokens()  # with their expiry
            return
        self._generation = record["generation"]
        context.current_tokens = _as_token(record)
        context.update_token_expiry(context.current_tokens)

    async def _load(self) -> OAuthToken | None:
        record = await self._load_record()
        return None if record is None else _as_token(record)

    async def _load_record(self, refused: int | None = None) -> TokenRecord | None:
        try:
            return await self._store.load_fresh_tokens(
                *self._row,
                account=self.context.server_url,
                refresh=_refresh,
                force=refused is not None,
                generation=refused,
            )
        except ReauthorizationRequiredError:
            if self.context.redirect_handler is None:
                raise
            return None  # the SDK's login answers the 401

    @clears_locals
    async def _save(self, tokens: OAuthToken) -> None:
        """Store a login's tokens, with all that a refresh needs in another process."""
        context = self.context
        metadata = context.oauth_metadata
        settings = {
            "token_endpoint": urljoin(context.get_authorization_base_url(context.server_url), "/token")
            if metadata is None
            else str(metadata.token_endpoint),
            "client": None if context.client_info is None else _as_json(context.client_info),
            "resource": context.get_resource_url()
            if context.should_include_resource_param(context.protocol_version)
            else None,
        }
        account, fields = context.server_url, {_SETTINGS: settings}
        # Before the tokens: beside the client of an earlier login, new tokens could not be refreshed. If this process
        # ends in between, the old ones cannot be; but then the login is lost, and the user has to log in anyway.
        kept = await self._store.update_metadata(*self._row, fields, account=account)
        await self._store.store_token_response(
            *self._row, _as_json(tokens), account=account, metadata=fields if kept is None else None
        )

    async def _load_client(self) -> OAuthClientInformationFull | None:
        kept = await self._store.get_value(_CLIENTS, self.context.server_url)
        return None if kept is None else OAuthClientInformationFull.model_validate(kept)

    @clears_locals
    async def _save_client(self, client_info: OAuthClientInformationFull) -> None:
        expires_at = client_info.client_secret_expires_at  # 0: never (RFC 7591 section 3.2.1)
        ttl = max(expires_at - time.time(), 1.0) if expires_at else None
        await self._store.put_value(_CLIENTS, self.context.server_url, _as_json(client_info), ttl=ttl)


class _Storage:
    """The SDK's ``TokenStorage``. The SDK gets no refresh token, so that it never refreshes by itself."""

    def __init__(self, provider: StoreOAuthProvider) -> None:
        self.get_tokens = provider._load
        self.set_tokens = provider._save
        self.get_client_info = provider._load_client
        self.set_client_info = provider._save_client


async def _refresh(record: RefreshableRecord) -> dict[str, Any]:
    """Refresh with the client, at the endpoint and for the resource of the login."""
    settings = record["metadata"].get(_SETTINGS) or {}
    client = settings.get("client")
    if client is None:
        raise ReauthorizationRequiredError("the row does not say which client got its tokens", code="client_unknown")
    # As the SDK does, which knows no other method than these with a secret.
    method, secret = client.get("token_endpoint_auth_method"), client.get("client_secret")
    if secret is None or method not in ("client_secret_basic", "client_secret_post"):
        method, secret = "none", None
    resource = settings.get("resource")
    refresher = OAuth2Refresher(
        settings["token_endpoint"],
        client["client_id"],
        secret,
        auth_method=method,
        extra_parameters={} if resource is None else {"resource": resource},
    )
    return await refresher(record)


def _as_token(record: TokenRecord) -> OAuthToken:
    expiry = record["access_token_expires_at"]
    return OAuthToken(
        access_token=record["access_token"],
        expires_in=None if expiry is None else max(int((expiry - datetime.now(UTC)).total_seconds()), 0),
        scope=record["extra"].get("scope"),
    )


def _as_json(model: Any) -> dict[str, Any]:
    fields: dict[str, Any] = model.model_dump(mode="json", exclude_none=True)
    return fields
