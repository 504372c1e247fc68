"""How the token gets into a request of httpx or httpx2, and how a refused request is sent again.

The two libraries have the same interface, and each one refuses the other's ``Auth``. So the flow is here, and each of
:mod:`tokenstore.integrations.httpx` and :mod:`tokenstore.integrations.httpx2` makes a class of it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, ClassVar, NamedTuple

from tokenstore.integrations._bearer import BearerAuth
from tokenstore.integrations._exchange import NONCE, PROOF, BearerToken, Refusal
from tokenstore.store import AuthTokenStore
from tokenstore.sync import AuthTokenStore as SyncAuthTokenStore

__all__ = ["HttpxFlow"]


class _Load(NamedTuple):
    """A step of the flow: load the token, after a 401 in place of the refused one."""

    refused: BearerToken | None = None


class HttpxFlow(BearerAuth[AuthTokenStore | SyncAuthTokenStore]):
    """The methods of an ``Auth`` of httpx or httpx2. A client calls one of the flows for each request of its user.

    The client follows redirects inside of the flow, and removes the header where the origin changes.
    """

    bytes_type: ClassVar[type]
    """The library's ``ByteStream``."""
    stream_type: ClassVar[type]
    """The library's ``SyncByteStream``."""

    # While a token is loaded, no local variable of these two frames has a request, whose headers contain the token: an
    # error of the store goes through these frames.

    def sync_auth_flow(self, request: Any) -> Generator[Any, Any, None]:
        """The flow for a ``Client``, which calls this method."""
        steps: Any = self._steps(request, _trace)
        answer: Any = None
        del request
        while (step := _resumed(steps, answer)) is not None:
            answer = None
            answer = self._tokens.load_blocking(step.refused) if isinstance(step, _Load) else (yield step)

    async def async_auth_flow(self, request: Any) -> AsyncGenerator[Any, Any]:
        """The flow for an ``AsyncClient``, which calls this method."""
        steps: Any = self._steps(request, _async_trace)
        answer: Any = None
        del request
        while (step := _resumed(steps, answer)) is not None:
            answer = None
            answer = await self._tokens.load(step.refused) if isinstance(step, _Load) else (yield step)

    def _steps(self, request: Any, make_trace: Callable[[Any, Any], Any]) -> Generator[Any, Any, None]:
        """Yield requests to send, for their responses, and loads to do, for their tokens."""
        url = request.url
        if not self._tokens.go_to(url.scheme, url.raw_host.decode("ascii"), url.port):
            yield request
            return
        exchange = self._tokens.exchange((yield _Load()))
        body, rewind = request.stream, self._rewinder(request.stream)
        users_trace = request.extensions.get("trace")
        while True:
            request.headers.update(exchange.headers(request.method, str(request.url)))
            if PROOF in request.headers:
                request.extensions = {**request.extensions, "trace": make_trace(request, users_trace)}
            response = yield request
            # After a redirect, this is the last request. Sending the first one again would repeat what it has done.
            redirected = response.request is not request
            request = response.request
            if not exchange.has_sent(request.headers.get("Authorization")):
                return  # it was redirected to another origin, without the header
            refusal = exchange.refusal(
                str(request.url),
                response.status_code,
                *map(response.headers.get_list, ("WWW-Authenticate", NONCE)),
                proven=not redirected,
            )
            if refusal is None:
                return
            if refusal is Refusal.TOKEN and not exchange.renew((yield _Load(exchange.token))):
                return
            if request.stream is not body:
                body, rewind = request.stream, self._rewinder(request.stream)
            if rewind is None:
                return
            rewind()

    def _rewinder(self, stream: Any) -> Callable[[], object] | None:
        """What makes a body whole again after it was sent. None: it cannot be sent again.

        The libraries would send the rest of a file, or nothing, in the place of a body that was read before.
        """
        if isinstance(stream, self.bytes_type):
            return _nothing
        if (fields := getattr(stream, "fields", None)) is not None:  # multipart/form-data, which rewinds its files
            parts = [getattr(field, "file", None) for field in fields]
            return _nothing if all(not hasattr(part, "read") or _position(part) is not None for part in parts) else None
        file: Any = getattr(stream, "_stream", None)
        if isinstance(stream, self.stream_type) and hasattr(file, "read"):
            position = _position(file)
            return None if position is None else lambda: file.seek(position)
        return None


def _resumed(steps: Generator[Any, Any, None], answer: Any) -> Any:
    """Start the flow (with None), or give it the answer to its last step. Returns the next step, None at the end."""
    try:
        return steps.send(answer)
    except StopIteration:
        return None


def _forget_proof(event: str, request: Any) -> None:
    """Remove the proof from a request that is on its way, so that the client copies it into no redirected request.

    There it would be used a second time, for another URL, and perhaps at another origin.
    """
    if event.endswith("send_request_headers.complete"):
        request.headers.pop(PROOF, None)


def _trace(request: Any, users_own: Any) -> Callable[[str, Any], None]:
    """A request's extension ``trace``, which a ``Client`` calls with the events of sending."""

    def trace(event: str, info: Any) -> None:
        _forget_proof(event, request)
        if users_own is not None:
            users_own(event, info)

    return trace


def _async_trace(request: Any, users_own: Any) -> Callable[[str, Any], Coroutine[Any, Any, None]]:
    """The same for an ``AsyncClient``."""

    async def trace(event: str, info: Any) -> None:
        _forget_proof(event, request)
        if users_own is not None:
            await users_own(event, info)

    return trace


def _nothing() -> None:
    pass


def _position(file: Any) -> int | None:
    """The position of a file that can be rewound, or None."""
    try:
        position = file.tell()
        return position if isinstance(position, int) and file.seekable() else None
    except (AttributeError, OSError, ValueError):
        return None
