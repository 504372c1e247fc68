"""The strict provider: an authorization server behind HTTP, with faults on demand."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal, Self

from tokenstore.testing.provider.authorization_server import AuthorizationServer, bearer_challenge
from tokenstore.testing.provider.messages import HttpError, Reply, Request
from tokenstore.testing.provider.server import LoopbackServer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

__all__ = ["StrictRotatingProvider"]


class StrictRotatingProvider(AuthorizationServer):
    """A provider on ``127.0.0.1`` that rotates refresh tokens and detects their reuse.

    Use it as a context manager, or call :meth:`start` and :meth:`stop`. If it is started again, it keeps its port and
    its grants. It is thread-safe. Every setting but ``port`` and ``clock`` is an attribute that may be changed while
    the provider runs. Nothing is logged, and no ``repr`` contains a token.

    Args:
        client_id: The one client that the provider knows.
        client_secret: The client's secret, sent as HTTP Basic or in the body (RFC 6749 section 2.3.1).
        access_token_lifetime: Lifetime of an access token in seconds; a refresh ends it sooner. Default: one hour.
        refresh_token_lifetime: Lifetime of a refresh token in seconds, which the token response states as
            ``refresh_token_expires_in``. Default: None; a refresh token is valid until it is used.
        code_lifetime: Lifetime of an authorization code in seconds. Default: 60.
        redirect_uris: The client's redirect URIs, compared as strings (RFC 9700 section 2.1). Default: any URI.
        latency: Seconds from the time at which a token request takes effect (and consumes its refresh token) to the
            response. Default: 0.
        rotate: Whether a refresh issues a new refresh token. If False, the response contains none and the old one stays
            valid, as with several large providers. Default: True.
        grace: Seconds after a refresh during which the refresh token that it consumed gets the same new tokens again,
            as long as the new refresh token is unused. Otherwise a used refresh token revokes the grant. Default: 0.
        port: The port to listen on. Default: 0, any free port.
        clock: Returns the time in seconds since the epoch; used for all lifetimes. Default: ``time.time``.
    """

    def __init__(
        self,
        *,
        client_id: str = "demo-client",
        client_secret: str = "demo-secret",
        access_token_lifetime: float = 3600.0,
        refresh_token_lifetime: float | None = None,
        code_lifetime: float = 60.0,
        redirect_uris: Collection[str] = (),
        latency: float = 0.0,
        rotate: bool = True,
        grace: float = 0.0,
        port: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(
            client_id=client_id,
            client_secret=client_secret,
            access_token_lifetime=access_token_lifetime,
            refresh_token_lifetime=refresh_token_lifetime,
            code_lifetime=code_lifetime,
            redirect_uris=redirect_uris,
            rotate=rotate,
            grace=grace,
            clock=clock,
        )
        self.latency = latency
        self.outage: bool | Literal["drop"] = False
        """While True, the provider answers every request but those for ``/stats`` with 503; while ``"drop"``, it closes
        their connections instead. No such request has an effect."""
        self._faults: deque[Reply] = deque()
        self._rejections = 0
        self._drops = 0
        self._gates: list[Future[None]] = []
        self._server = LoopbackServer(self._answer, port=port, clock=clock)

    def __repr__(self) -> str:
        state = f"at 127.0.0.1:{self._server.port}" if self._server.is_running else "stopped"
        return f"<{type(self).__name__} {state}>"

    # -- lifecycle -------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, and serve requests in a background thread. Does nothing if the provider is running."""
        self._server.start()

    def stop(self) -> None:
        """Stop listening, close all connections and end every :meth:`hold`. Does nothing if it is not running."""
        if self._server.is_running:
            self._server.stop()
            with self._state:
                self._gates.clear()  # cancelled together with the requests that waited for them

    @property
    def base_url(self) -> str:
        """``http://127.0.0.1:PORT``, without a slash at the end.

        Raises:
            RuntimeError: The provider was never started, and no port was given.
        """
        if self._server.port == 0:
            raise RuntimeError("the provider has no address yet: start it with `with` or start()")
        return f"http://127.0.0.1:{self._server.port}"

    @property
    def authorize_url(self) -> str:
        """The URL of the authorization endpoint, which users' browsers are sent to."""
        return f"{self.base_url}/authorize"

    @property
    def token_url(self) -> str:
        """The URL of the token endpoint."""
        return f"{self.base_url}/token"

    @property
    def revocation_url(self) -> str:
        """The URL of the revocation endpoint."""
        return f"{self.base_url}/revoke"

    @property
    def resource_url(self) -> str:
        """The URL of the protected resource, an API that says whose access token it was called with."""
        return f"{self.base_url}/resource"

    # -- faults ----------------------------------------------------------------------------------

    def fail_next(
        self,
        status: int = 503,
        times: int = 1,
        retry_after: int | str | None = None,
        *,
        error: str = "temporarily_unavailable",
    ) -> None:
        """Answer the next ``times`` token requests with an error, without consuming their refresh tokens.

        Args:
            status: The HTTP status.
            times: The number of token requests.
            retry_after: The ``Retry-After`` header: seconds, or an HTTP date. Default: None, no such header.
            error: The OAuth error code.
        """
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        reply = HttpError(status, error, "injected fault", headers).reply
        with self._state:
            self._faults.extend([reply] * times)

    def reject_next(self, times: int = 1) -> None:
        """Answer the next ``times`` requests for ``/resource`` with 401, whatever their access token."""
        with self._state:
            self._rejections += times

    def drop_next_response(self, times: int = 1) -> None:
        """Let the next ``times`` successful refreshes take effect, but close the connection instead of responding."""
        with self._state:
            self._drops += times

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Delay the responses to token requests until the block ends; the requests take effect at once."""
        gate: Future[None] = Future()
        with self._state:
            self._gates.append(gate)
        try:
            yield
        finally:
            with self._state, suppress(ValueError):
                self._gates.remove(gate)
            with suppress(InvalidStateError):  # stop() has cancelled it
                gate.set_result(None)

    def wait_for_requests(self, n: int, timeout: float = 10.0) -> None:
        """Block until ``n`` token requests have taken effect since the provider was made (``stats().requests``).

        In a coroutine, write ``await asyncio.to_thread(provider.wait_for_requests, n)``.

        Raises:
            TimeoutError: There were fewer after ``timeout`` seconds.
        """
        with self._state:
            if not self._state.wait_for(lambda: self._counters.requests >= n, timeout):
                raise TimeoutError(f"only {self._counters.requests} of {n} token requests within {timeout} s")

    # -- in the event loop's thread --------------------------------------------------------------

    async def _answer(self, request: Request) -> Reply | None:
        """Handle the request; return the response when it is due, or None to close the connection instead."""
        with self._state:
            reply = self._decide(request)
            if (request.method, request.path) != ("POST", "/token"):
                return reply
            dropped = reply is not None and reply.status == 200 and self._drops > 0
            self._drops -= dropped
            counters = self._counters
            counters.requests += 1
            counters.in_flight += 1
            counters.max_in_flight = max(counters.max_in_flight, counters.in_flight)
            self._state.notify_all()
        try:
            await asyncio.sleep(self.latency)
            with self._state:
                gates = tuple(self._gates)
            for gate in gates:
                await asyncio.wrap_future(gate)
        finally:
            # Before the response is sent, so that a client that has it does not count as in flight.
            with self._state:
                counters.in_flight -= 1
        return None if dropped else reply

    def _decide(self, request: Request) -> Reply | None:
        """The response, after the faults that are on; None: the connection is to be closed."""
        try:
            handler = self._handler(request)
            if self.outage and request.path != "/stats":
                if self.outage == "drop":
                    return None
                raise HttpError(503, "temporarily_unavailable", "the provider is unavailable")
            if self._faults and request.path == "/token":
                return self._faults.popleft()
            if self._rejections and request.path == "/resource":
                self._rejections -= 1
                raise bearer_challenge("injected fault")
            return handler(request)
        except HttpError as error:
            return error.reply
