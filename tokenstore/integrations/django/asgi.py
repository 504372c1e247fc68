"""The lifespan protocol of ASGI, which Django does not know: the stores are closed when the server ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tokenstore.errors import TokenStoreError
from tokenstore.integrations.django.stores import close_stores

__all__ = ["with_lifespan"]

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_Application = Callable[[Any, Any, Any], Awaitable[None]]


def with_lifespan(application: _Application) -> _Application:
    """Close the stores when an ASGI server ends: in ``asgi.py``, ``with_lifespan(get_asgi_application())``.

    Closing waits for refreshes in progress. uvicorn ends its process on SIGTERM without the end of the event loop and
    without ``atexit``, so without this a token that is refreshed in the background then would be lost.

    Args:
        application: The application. It gets no events of the lifespan itself.

    Returns:
        The application with a lifespan.
    """

    async def serve(scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "lifespan":
            await application(scope, receive, send)
            return
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        problem = None
        try:
            await close_stores()
        except TokenStoreError as error:
            problem = str(error)
        if problem is None:
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await send({"type": "lifespan.shutdown.failed", "message": problem})

    return serve
