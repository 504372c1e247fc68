"""A Litestar application that answers for a user with a fresh token: ``uvicorn litestar_app:app`` in this folder.

The environment has TOKENSTORE_URL and TOKENSTORE_KEYS, and the provider's TOKEN_URL, CLIENT_ID and CLIENT_SECRET.
"""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from litestar import Litestar, Request, Response, get
from litestar.di import Provide
from litestar.response import Redirect

from tokenstore import (
    AuthTokenStore,
    BackendUnavailableError,
    ConflictError,
    InsufficientScopeError,
    LockTimeoutError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
    RefreshTimeoutError,
    TokensMissingError,
    TokensNotStoredError,
    TokenStoreError,
    open_store,
)
from tokenstore.integrations.oauth2 import OAuth2Refresher

refreshers = {"github": OAuth2Refresher(os.environ["TOKEN_URL"], os.environ["CLIENT_ID"], os.environ["CLIENT_SECRET"])}


@asynccontextmanager
async def open_and_close(app: Litestar) -> AsyncIterator[None]:
    """Open the store when the server starts. Its end waits for refreshes in progress."""
    async with open_store(os.environ["TOKENSTORE_URL"], refreshers=refreshers) as store:
        app.state.store = store
        yield


async def token_store(request: Request[Any, Any, Any]) -> AuthTokenStore:
    """The dependency ``store`` of the handlers."""
    store: AuthTokenStore = request.app.state.store
    return store


def log_in(request: Request[Any, Any, Any], error: RefreshError) -> Response[Any]:
    """Send a browser to the login, and tell another client that the user has to go there."""
    if request.method == "GET" and "text/html" in request.headers.get("Accept", ""):
        return Redirect("/login", status_code=303)
    headers = {"WWW-Authenticate": "ProviderLogin", "Cache-Control": "no-store"}
    return Response({"error": error.code, "login_url": "/login"}, status_code=401, headers=headers)


def try_later(request: Request[Any, Any, Any], error: TokenStoreError) -> Response[Any]:
    """Tell a client when to repeat the request."""
    request.logger.warning("%s", error)
    seconds = math.ceil(getattr(error, "retry_after", None) or 1.0)
    headers = {"Retry-After": str(seconds), "Cache-Control": "no-store"}
    return Response({"error": "temporarily_unavailable"}, status_code=503, headers=headers)


login_errors = [InsufficientScopeError, ReauthorizationRequiredError, TokensMissingError]
outage_errors = [
    BackendUnavailableError,
    ConflictError,
    LockTimeoutError,
    ProviderRefusedError,
    ProviderUnavailableError,
    RefreshTimeoutError,
    TokensNotStoredError,
]


@get("/repositories/{user_id:str}")
async def repositories(user_id: str, store: AuthTokenStore) -> dict[str, int]:
    """Here a request of the provider's API would follow."""
    record = await store.load_fresh_tokens("github", user_id, missing="raise")
    return {"generation": record["generation"]}


app = Litestar(
    [repositories],
    lifespan=[open_and_close],
    dependencies={"store": Provide(token_store)},
    exception_handlers={**dict.fromkeys(login_errors, log_in), **dict.fromkeys(outage_errors, try_later)},
)
