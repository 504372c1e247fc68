"""The store in an application of Starlette or FastAPI; needs the extra ``starlette``.

::

    app = FastAPI(lifespan=store_lifespan(lambda: open_store(url, refreshers=refreshers)))
    install(app, login_url="/login")

    @app.get("/repositories")
    async def repositories(store: Annotated[AuthTokenStore, Depends(token_store)]) -> Repositories:
        record = await store.load_fresh_tokens("github", user_id, missing="raise")
        ...
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, TypeAlias, cast

from tokenstore.errors import ConfigurationError, MissingDependencyError, RefreshError, TokenStoreError
from tokenstore.integrations._web import (
    LOGIN_ERRORS,
    OUTAGE_ERRORS,
    Answer,
    login_answer,
    outage_answer,
    shows_a_page,
)
from tokenstore.store import AuthTokenStore

try:
    from starlette.applications import Starlette
    from starlette.requests import HTTPConnection, Request
    from starlette.responses import JSONResponse, RedirectResponse, Response
    from starlette.types import Receive, Scope, Send
    from starlette.websockets import WebSocket, WebSocketClose, WebSocketState
except ImportError:
    raise MissingDependencyError(
        'tokenstore.integrations.starlette needs Starlette: pip install "tokenstore[starlette]"'
    ) from None

__all__ = ["LoginURL", "install", "store_lifespan", "token_store"]

LoginURL: TypeAlias = str | Callable[[Request, RefreshError], str | None]
"""Where a user logs in at the provider: a URL, or a function that returns one for a request and its error."""

# The name of the store in the lifespan's state, which the requests of mounted applications have, too.
_STATE: Final = "token_store"

# Registered at IANA for WebSocket: Unauthorized, and Try Again Later.
_UNAUTHORIZED: Final = 3000
_TRY_AGAIN_LATER: Final = 1013


def store_lifespan(
    factory: Callable[[], AuthTokenStore], *, setup: bool = False
) -> Callable[[Any], AbstractAsyncContextManager[dict[str, Any]]]:
    """A lifespan that opens a store when the application starts, and closes it when the application ends.

    It is the application's ``lifespan``, or a part of it, which has to yield what this one yields::

        opened = store_lifespan(lambda: open_store(url))

        @asynccontextmanager
        async def lifespan(app):
            async with httpx.AsyncClient() as http, opened(app) as state:
                yield {**state, "http": http}

    Closing the store waits for refreshes that are under way, so close afterwards what a refresher uses.

    Args:
        factory: Opens the store, as :func:`tokenstore.open_store` does. It is called each time the application starts,
            because a store cannot be opened again.
        setup: Whether to create the store's tables if they are missing. Default: False; see ``docs/schema.md``.

    Returns:
        A function that takes the application, which it does not use, and returns an async context manager. The context
        is the lifespan's state, with the store under ``token_store``.
    """

    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[dict[str, Any]]:
        async with factory() as store:
            if setup:
                await store.setup()
            yield {_STATE: store}

    return lifespan


async def token_store(connection: HTTPConnection) -> AuthTokenStore:
    """The application's store: a dependency for FastAPI, ``Annotated[AuthTokenStore, Depends(token_store)]``.

    It is a coroutine function because FastAPI calls plain ones in a thread.

    Args:
        connection: A request or a WebSocket, also of a mounted application.

    Raises:
        ConfigurationError: The application has no store: its lifespan did not run, or does not yield one.
    """
    store = getattr(connection.state, _STATE, None)
    if not isinstance(store, AuthTokenStore):
        raise ConfigurationError(
            "the application's state has no store: pass lifespan=store_lifespan(…) to the application that the server "
            "runs, or let its lifespan yield what store_lifespan(…) yields; a test client has to run the lifespan, too"
        )
    return store


def install(app: Starlette, *, login_url: LoginURL | None = None) -> None:
    """Let an application answer the store's errors that mean something to its clients.

    - **The user has to log in** (``ReauthorizationRequiredError``, ``TokensMissingError``, ``InsufficientScopeError``):
      303 to ``login_url`` if a browser shows the response as a page; 401 with a JSON object otherwise.
    - **The provider or the database cannot serve now** (``ProviderUnavailableError``, ``ProviderRefusedError``,
      ``RefreshTimeoutError``, ``TokensNotStoredError``, ``BackendUnavailableError``, ``LockTimeoutError``,
      ``ConflictError``): 503 with ``Retry-After`` and a JSON object. The error is logged by ``tokenstore.web``.
    - **Each other error** stays the application's: 500 by default.

    No response names the user or may be cached. A WebSocket that has not been accepted is refused with the same 401 or
    503; an accepted one is closed with the code 3000 (Unauthorized) or 1013 (Try Again Later).

    A mounted application has error handlers of its own: call this for it, too. Starlette calls no such handler for
    errors of middleware.

    Args:
        app: The application. Later handlers for the same errors replace these.
        login_url: Where the user logs in at the provider, as the browser is to see it: a mounted application does not
            put its own path in front. A function gets the request and the error, and returns the URL, or None. Nothing
            of the request becomes a part of the URL by itself; what a function takes from it, it has to check and to
            quote. Default: None; the response is 401 for every client.
    """

    async def login(connection: Request | WebSocket, error: RefreshError) -> Response | _Refusal | None:
        if isinstance(connection, WebSocket):
            return _refused(connection, login_answer(error, None, redirect=False), _UNAUTHORIZED)
        url = login_url(connection, error) if callable(login_url) else login_url
        return _response(login_answer(error, url, redirect=shows_a_page(connection.method, connection.headers.get)))

    async def outage(connection: Request | WebSocket, error: TokenStoreError) -> Response | _Refusal | None:
        answer = outage_answer(error)
        if isinstance(connection, WebSocket):
            return _refused(connection, answer, _TRY_AGAIN_LATER)
        return _response(answer)

    # Starlette's annotation of a handler has `Exception`; it calls one with the errors that the handler was added for.
    add = cast("Callable[[Any, Any], None]", app.add_exception_handler)
    for login_error in LOGIN_ERRORS:
        add(login_error, login)
    for outage_error in OUTAGE_ERRORS:
        add(outage_error, outage)


class _Refusal:
    """Ends a WebSocket, whatever its state: an application of ASGI, which Starlette calls in place of a response."""

    def __init__(self, answer: Answer, code: int) -> None:
        self._answer = answer
        self._code = code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "websocket.http.response" in scope.get("extensions", {}):
            try:
                await _response(self._answer)(scope, receive, send)
            except RuntimeError:
                pass  # it has been accepted: the server takes no HTTP response any more
            else:
                return
        # Before the WebSocket is accepted, this is a response with the status 403.
        await WebSocketClose(self._code)(scope, receive, send)


def _refused(websocket: WebSocket, answer: Answer, code: int) -> _Refusal | None:
    """What ends a WebSocket; None if it has ended."""
    ended = {WebSocketState.DISCONNECTED, WebSocketState.RESPONSE}
    return None if ended & {websocket.client_state, websocket.application_state} else _Refusal(answer, code)


def _response(answer: Answer) -> Response:
    if (location := answer.headers.get("Location")) is not None:
        others = {name: value for name, value in answer.headers.items() if name != "Location"}
        return RedirectResponse(location, answer.status, others)  # quotes what is not allowed in a header
    return JSONResponse(answer.body, answer.status, answer.headers)
