"""A strict OAuth 2.0 token endpoint on the loopback interface, for tests and demos.

:class:`StrictRotatingProvider` serves HTTP from a background thread and treats refresh tokens as the strictest
providers do (RFC 6749 section 6, RFC 9700 section 4.14): each refresh token works once, and a request with a used one
revokes its whole grant. So a token store that has a race loses grants. The provider can also be slow, be unavailable,
delay its responses, or close the connection instead of responding::

    with StrictRotatingProvider(access_token_lifetime=60) as provider:
        tokens = provider.new_grant("alice")
        tokens = await refresh_over_http(
            provider.token_url,
            tokens["refresh_token"],
            client_id=provider.client_id,
            client_secret=provider.client_secret,
        )
        assert provider.stats().refreshes == 1

The token endpoint also issues tokens for the client itself (RFC 6749 section 4.4) and in exchange for a valid access
token (RFC 8693), both without a refresh token.

Endpoints: ``POST /token``, ``POST /revoke`` (client authentication by HTTP Basic or in the body),
``GET /resource`` (Bearer token), ``GET /stats`` (the counters as JSON, for other processes).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import secrets
import socket
import threading
import time
from base64 import b64decode
from collections import Counter, deque
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from email.utils import formatdate
from functools import cache
from http.client import responses
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qsl, quote_plus, unquote_plus

from tokenstore.errors import MissingDependencyError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["ProviderError", "ProviderStats", "StrictRotatingProvider", "refresh_over_http"]

_MAX_BYTES = 16 * 1024  # limit of a request's head, and of its body; a real token request has under 4 KiB
_BACKLOG = 1024  # many workers may connect before the event loop's thread accepts the first connection
_REALM = 'realm="tokenstore.testing"'
_REQUEST_LINE = re.compile(r"([A-Z]+) (/[!-~]*) HTTP/1\.([01])")
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\r\n\0]*)")
_SINGULAR = frozenset({"authorization", "content-length", "content-type", "host"})


class ProviderError(Exception):
    """The token endpoint refused a request.

    Attributes:
        status: The HTTP status.
        error: The OAuth error code; it never contains a token.
    """

    def __init__(self, status: int, error: str) -> None:
        super().__init__(status, error)  # both in `args`, so that the error can be pickled for another process
        self.status = status
        self.error = error

    def __str__(self) -> str:
        return f"token endpoint answered {self.status} ({self.error})"


@dataclass(frozen=True, slots=True)
class ProviderStats:
    """Counters of a :class:`StrictRotatingProvider` since it was made. All of them but ``in_flight`` only grow."""

    requests: int
    """``POST /token`` requests that were received completely, whatever the response."""
    refreshes: int
    """Successful refreshes; each one issued new tokens."""
    replays: int
    """Requests with a used refresh token that succeeded because they came within ``grace`` seconds."""
    reuses: int
    """Requests with a used refresh token that were refused, including those for a revoked grant."""
    revoked_grants: int
    """Grants that were revoked, by the reuse of a refresh token or through ``/revoke``."""
    rejected_clients: int
    """Requests refused with ``invalid_client``."""
    in_flight: int
    """``POST /token`` requests that have taken effect and are not answered yet."""
    max_in_flight: int
    """The highest value that ``in_flight`` has had."""
    refreshes_by_user: Mapping[str, int]
    """Successful refreshes per user; users without one are absent."""
    issues: int
    """Access tokens that were issued without a refresh token: for the client itself, or in an exchange."""


@dataclass(slots=True)
class _Grant:
    user: str
    scope: str
    access: str = field(default="", repr=False)
    access_scope: str = ""
    access_expires: float = 0.0
    refresh: str = field(default="", repr=False)
    refresh_expires: float | None = None
    previous: str = field(default="", repr=False)  # the refresh token consumed last, for `grace`
    rotated_at: float = 0.0
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)
    keep_alive: bool
    body: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    body: Mapping[str, Any] | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)

    def encode(self, *, now: float, head_only: bool, keep_alive: bool) -> bytes:
        body = b"" if self.body is None else json.dumps(self.body).encode()
        headers = {
            "Date": formatdate(now, usegmt=True),
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",  # RFC 6749 section 5.1 asks for this and the next
            "Pragma": "no-cache",
            "Connection": "keep-alive" if keep_alive else "close",
            **self.headers,
        }
        lines = (f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {self.status} {responses.get(self.status, '')}\r\n{''.join(lines)}\r\n"
        return head.encode("latin-1") + (b"" if head_only else body)


class _HttpError(Exception):
    def __init__(self, status: int, error: str, description: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error)
        self.reply = _Reply(status, {"error": error, "error_description": description}, headers or {})


class StrictRotatingProvider:
    """A token endpoint on ``127.0.0.1`` that rotates refresh tokens and detects their reuse.

    Use it as a context manager, or call :meth:`start` and :meth:`stop`. If it is started again, it keeps its port and
    its grants. It is thread-safe. Every setting but ``port`` and ``clock`` is an attribute that may be changed while
    the provider runs. Nothing is logged, and no ``repr`` contains a token.

    Args:
        client_id: The one client that may refresh.
        client_secret: The client's secret, sent as HTTP Basic or in the body (RFC 6749 section 2.3.1).
        access_token_lifetime: Lifetime of an access token in seconds; a refresh ends it sooner. Default: one hour.
        refresh_token_lifetime: Lifetime of a refresh token in seconds, which the token response states as
            ``refresh_token_expires_in``. Default: None; a refresh token is valid until it is used.
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
        latency: float = 0.0,
        rotate: bool = True,
        grace: float = 0.0,
        port: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.client_id = client_id
        self.client_secret = client_secret
        self.access_token_lifetime = access_token_lifetime
        self.refresh_token_lifetime = refresh_token_lifetime
        self.latency = latency
        self.rotate = rotate
        self.grace = grace
        self.outage = False
        """While True, the provider answers every request but ``/stats`` with 503 and consumes no refresh token."""
        self._port = port
        self._clock = clock
        # Guards the attributes below: the event loop's thread handles requests with them, callers read and set them.
        self._state = threading.Condition()
        self._refresh_tokens: dict[str, _Grant] = {}  # all that were issued, so that a used one is recognised
        self._access_tokens: dict[str, _Grant] = {}  # only valid ones
        self._faults: deque[_Reply] = deque()
        self._drops = 0
        self._gates: list[Future[None]] = []
        self._requests = self._replays = self._reuses = self._revoked = self._rejected = 0
        self._in_flight = self._max_in_flight = 0
        self._refreshes: Counter[str] = Counter()
        self._issues = 0
        self._thread: threading.Thread | None = None
        self._shutdown: Callable[[], object] = lambda: None

    def __repr__(self) -> str:
        state = f"at 127.0.0.1:{self._port}" if self._thread else "stopped"
        return f"<{type(self).__name__} {state}>"

    # -- lifecycle -------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, and serve requests in a background thread. Does nothing if the provider is running."""
        if self._thread is not None:
            return
        listener = socket.create_server(("127.0.0.1", self._port), backlog=_BACKLOG)
        self._port = listener.getsockname()[1]
        ready: Future[Callable[[], object]] = Future()
        # A daemon thread, so that a provider that was not stopped cannot keep the interpreter from exiting.
        thread = threading.Thread(target=self._run, args=(listener, ready), name=f"provider-{self._port}", daemon=True)
        thread.start()
        self._shutdown = ready.result()
        self._thread = thread

    def stop(self) -> None:
        """Stop listening, close all connections and end every :meth:`hold`. Does nothing if it is not running."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._shutdown()
            thread.join()
            with self._state:
                self._gates.clear()  # cancelled together with the requests that waited for them

    @property
    def base_url(self) -> str:
        """``http://127.0.0.1:PORT``, without a slash at the end.

        Raises:
            RuntimeError: The provider was never started, and no port was given.
        """
        if self._port == 0:
            raise RuntimeError("the provider has no address yet: start it with `with` or start()")
        return f"http://127.0.0.1:{self._port}"

    @property
    def token_url(self) -> str:
        """The URL of the token endpoint."""
        return f"{self.base_url}/token"

    # -- grants, counters and faults -------------------------------------------------------------

    def new_grant(self, user: str, *, scope: str = "read write") -> dict[str, Any]:
        """Log ``user`` in and return the token response of the new grant (RFC 6749 section 5.1)."""
        with self._state:
            grant = _Grant(user=user, scope=scope)
            self._issue(grant, scope, rotate=True)
            return self._response(grant, with_refresh=True)

    def stats(self) -> ProviderStats:
        """Return a consistent snapshot of the counters."""
        with self._state:
            return ProviderStats(
                requests=self._requests,
                refreshes=self._refreshes.total(),
                replays=self._replays,
                reuses=self._reuses,
                revoked_grants=self._revoked,
                rejected_clients=self._rejected,
                in_flight=self._in_flight,
                max_in_flight=self._max_in_flight,
                refreshes_by_user=dict(self._refreshes),
                issues=self._issues,
            )

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
        reply = _HttpError(status, error, "injected fault", headers).reply
        with self._state:
            self._faults.extend([reply] * times)

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
            if not self._state.wait_for(lambda: self._requests >= n, timeout):
                raise TimeoutError(f"only {self._requests} of {n} token requests within {timeout} s")

    # -- in the event loop's thread --------------------------------------------------------------

    def _run(self, listener: socket.socket, ready: Future[Callable[[], object]]) -> None:
        try:
            # A selector event loop, whatever the process's event loop policy, because `_serve` needs `add_reader`.
            with listener, asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                runner.run(self._serve(listener, ready))
        except BaseException as exc:
            if ready.done():
                raise
            ready.set_exception(exc)

    async def _serve(self, listener: socket.socket, ready: Future[Callable[[], object]]) -> None:
        loop, stopping = asyncio.get_running_loop(), asyncio.Event()
        connections: set[asyncio.Task[None]] = set()

        # Not `asyncio.start_server`: when closed, it leaks connections that it has accepted but not passed on yet.
        def accept() -> None:
            with suppress(OSError):  # the client has closed the connection already
                connection, _ = listener.accept()
                connection.setblocking(False)
                task = loop.create_task(self._serve_connection(connection))
                connections.add(task)
                task.add_done_callback(connections.discard)

        listener.setblocking(False)
        loop.add_reader(listener, accept)
        ready.set_result(lambda: loop.call_soon_threadsafe(stopping.set))
        await stopping.wait()
        loop.remove_reader(listener)
        await asyncio.sleep(0)  # a task cancelled before its first step would not close its connection
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve_connection(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection, limit=_MAX_BYTES)
        keep_alive = True
        try:
            while keep_alive:
                head_only = False
                try:
                    request = await _read_request(reader, writer)
                except _HttpError as error:  # the next request's start is unknown: respond, then close
                    reply, keep_alive = error.reply, False
                else:
                    answer = await self._answer(request)
                    if answer is None:
                        return
                    reply, keep_alive = answer, request.keep_alive
                    head_only = request.method == "HEAD"
                now = self._clock()
                writer.write(reply.encode(now=now, head_only=head_only, keep_alive=keep_alive))
                await writer.drain()
            # Read to the end: closing a socket with unread input resets the connection, which can lose the response.
            writer.write_eof()
            async with asyncio.timeout(1):
                while await reader.read(_MAX_BYTES):
                    pass
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client closed the connection, or did not do so in time (TimeoutError is an OSError)
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        finally:
            writer.close()

    async def _answer(self, request: _Request) -> _Reply | None:
        """Handle the request; return the response when it is due, or None to close the connection instead."""
        with self._state:
            try:
                reply = self._decide(request)
            except _HttpError as error:
                reply = error.reply
            if (request.method, request.path) != ("POST", "/token"):
                return reply
            dropped = reply.status == 200 and self._drops > 0
            self._drops -= dropped
            self._requests += 1
            self._in_flight += 1
            self._max_in_flight = max(self._max_in_flight, self._in_flight)
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
                self._in_flight -= 1
        return None if dropped else reply

    # -- request handlers, which run with the lock held ------------------------------------------

    def _decide(self, request: _Request) -> _Reply:
        routes = {
            "/token": ("POST", self._token),
            "/revoke": ("POST", self._revoke),
            "/resource": ("GET", self._resource),
            "/stats": ("GET", lambda _: _Reply(200, asdict(self.stats()))),
        }
        if request.path not in routes:
            raise _HttpError(404, "invalid_request", "no such endpoint")
        method, handler = routes[request.path]
        if request.method != method:
            raise _HttpError(405, "invalid_request", f"use {method}", {"Allow": method})
        if self.outage and request.path != "/stats":
            raise _HttpError(503, "temporarily_unavailable", "the provider is unavailable")
        return handler(request)

    def _token(self, request: _Request) -> _Reply:
        if self._faults:
            return self._faults.popleft()
        form = self._authenticated_form(request)
        match _required(form, "grant_type"):
            case "client_credentials":
                return self._issue_alone(self.client_id, form)
            case "urn:ietf:params:oauth:grant-type:token-exchange":
                return self._exchange(form)
            case "refresh_token":
                return self._refresh(form)
        raise _HttpError(400, "unsupported_grant_type", "this grant_type is not supported")

    def _issue_alone(self, user: str, form: Mapping[str, str], **fields: str) -> _Reply:
        """Issue an access token without a refresh token."""
        grant = _Grant(user, form.get("scope", "read write"))
        self._issue(grant, grant.scope, rotate=False)
        self._issues += 1
        return _Reply(200, {**self._response(grant, with_refresh=False), **fields})

    def _exchange(self, form: Mapping[str, str]) -> _Reply:
        """Exchange a valid access token for another one of the same user (RFC 8693)."""
        access_token = "urn:ietf:params:oauth:token-type:access_token"
        if _required(form, "subject_token_type") != access_token:
            raise _HttpError(400, "invalid_request", "the subject_token_type is not supported")
        subject = self._access_tokens.get(_required(form, "subject_token"))
        if subject is None or self._clock() >= subject.access_expires:
            raise _HttpError(400, "invalid_grant", "the subject_token is unknown, expired or revoked")
        return self._issue_alone(subject.user, form, issued_token_type=access_token)

    def _refresh(self, form: Mapping[str, str]) -> _Reply:
        token = _required(form, "refresh_token")
        grant = self._refresh_tokens.get(token)
        if grant is None:
            raise _HttpError(400, "invalid_grant", "unknown refresh token")
        scope = form.get("scope", grant.scope)
        if not set(scope.split()) <= set(grant.scope.split()):  # RFC 6749 section 6
            raise _HttpError(400, "invalid_scope", "the scope exceeds what the user granted")
        now = self._clock()
        if token != grant.refresh:
            # No grace for older refresh tokens: the ones that replaced them are used.
            in_grace = token == grant.previous and now - grant.rotated_at < self.grace
            if grant.revoked or not in_grace:
                self._reuses += 1
                self._revoke_grant(grant)
                raise _HttpError(400, "invalid_grant", "refresh token already used: grant revoked")
            self._replays += 1
            return _Reply(200, self._response(grant, with_refresh=True))
        if grant.revoked:
            raise _HttpError(400, "invalid_grant", "the grant is revoked")
        if grant.refresh_expires is not None and now >= grant.refresh_expires:
            raise _HttpError(400, "invalid_grant", "refresh token expired")
        rotate = self.rotate
        self._issue(grant, scope, rotate=rotate)
        self._refreshes[grant.user] += 1
        return _Reply(200, self._response(grant, with_refresh=rotate))

    def _revoke(self, request: _Request) -> _Reply:
        """Revoke a token (RFC 7009). A refresh token is revoked with its grant, an access token alone."""
        token = _required(self._authenticated_form(request), "token")
        self._access_tokens.pop(token, None)
        if grant := self._refresh_tokens.get(token):
            self._revoke_grant(grant)
        return _Reply(200)  # also for an unknown token (RFC 7009 section 2.2)

    def _resource(self, request: _Request) -> _Reply:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":  # without a token, the challenge has no error code (RFC 6750 section 3.1)
            challenge = {"WWW-Authenticate": f"Bearer {_REALM}"}
            raise _HttpError(401, "invalid_token", "a Bearer token is required", challenge)
        grant = self._access_tokens.get(token.strip())
        if grant is None or self._clock() >= grant.access_expires:
            challenge = {"WWW-Authenticate": f'Bearer {_REALM}, error="invalid_token"'}
            raise _HttpError(401, "invalid_token", "the token is unknown, expired or revoked", challenge)
        return _Reply(200, {"user": grant.user, "scope": grant.access_scope})

    def _authenticated_form(self, request: _Request) -> dict[str, str]:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/x-www-form-urlencoded":
            raise _HttpError(415, "invalid_request", "use application/x-www-form-urlencoded")
        try:
            # parse_qsl drops parameters without a value, which count as omitted (RFC 6749 section 3.2).
            pairs = parse_qsl(request.body.decode(), errors="strict", max_num_fields=100)
        except ValueError:
            raise _HttpError(400, "invalid_request", "malformed body") from None
        form = dict(pairs)
        if len(form) < len(pairs):
            raise _HttpError(400, "invalid_request", "a parameter is repeated")
        try:
            given = _credentials(request.headers.get("authorization"), form)
        except ValueError:
            given = "", ""
        known = self.client_id, self.client_secret
        same = [hmac.compare_digest(a.encode(), b.encode()) for a, b in zip(given, known, strict=True)]
        if not all(same):
            self._rejected += 1
            challenge = {"WWW-Authenticate": f"Basic {_REALM}"}
            raise _HttpError(401, "invalid_client", "client authentication failed", challenge)
        return form

    def _issue(self, grant: _Grant, scope: str, *, rotate: bool) -> None:
        now = self._clock()
        self._access_tokens.pop(grant.access, None)
        grant.access = f"at_{secrets.token_urlsafe(32)}"
        grant.access_scope = scope
        grant.access_expires = now + self.access_token_lifetime
        self._access_tokens[grant.access] = grant
        if rotate:
            grant.previous, grant.rotated_at = grant.refresh, now
            grant.refresh = f"rt_{secrets.token_urlsafe(32)}"
            lifetime = self.refresh_token_lifetime
            grant.refresh_expires = None if lifetime is None else now + lifetime
            self._refresh_tokens[grant.refresh] = grant

    def _response(self, grant: _Grant, *, with_refresh: bool) -> dict[str, Any]:
        now = self._clock()

        def seconds(expires: float) -> int:
            return max(0, int(expires - now + 1e-3))  # 3600 s must not come out as 3599

        response: dict[str, Any] = {
            "access_token": grant.access,
            "token_type": "Bearer",
            "expires_in": seconds(grant.access_expires),
            "scope": grant.access_scope,
        }
        if with_refresh:
            response["refresh_token"] = grant.refresh
        if grant.refresh_expires is not None:
            response["refresh_token_expires_in"] = seconds(grant.refresh_expires)
        return response

    def _revoke_grant(self, grant: _Grant) -> None:
        self._access_tokens.pop(grant.access, None)
        self._revoked += not grant.revoked
        grant.revoked = True


def _required(form: Mapping[str, str], name: str) -> str:
    if name not in form:
        raise _HttpError(400, "invalid_request", f"{name} is missing")
    return form[name]


def _credentials(header: str | None, form: Mapping[str, str]) -> tuple[str, str]:
    """Return the client's id and secret (RFC 6749 section 2.3.1).

    Raises:
        ValueError: The request does not contain them.
    """
    if header is None:
        return form.get("client_id", ""), form.get("client_secret", "")
    if "client_secret" in form:  # RFC 6749 section 2.3 allows one method
        raise _HttpError(400, "invalid_request", "more than one client authentication")
    scheme, _, encoded = header.partition(" ")
    client_id, _, secret = (
        unquote_plus(part, errors="strict")
        for part in b64decode(encoded.strip(), validate=True).decode().partition(":")
    )
    if scheme.lower() != "basic" or form.get("client_id", client_id) != client_id:
        raise ValueError("the scheme is not Basic, or the body names another client_id")
    return client_id, secret


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Request:
    """Read one HTTP/1.x request (RFC 9112) of known, limited length.

    Raises:
        _HttpError: It is not such a request.
    """
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise _HttpError(431, "invalid_request", "the head is too long") from None
    first, *lines = head.decode("latin-1").strip("\r\n").split("\r\n")
    start = _REQUEST_LINE.fullmatch(first)
    if start is None:
        raise _HttpError(400, "invalid_request", "not an HTTP/1.x request")
    headers: dict[str, str] = {}
    for line in lines:
        name, value = parsed.groups() if (parsed := _FIELD.fullmatch(line)) else ("", "")
        name = name.lower()
        if not name or (name in _SINGULAR and name in headers):
            raise _HttpError(400, "invalid_request", "malformed or repeated header")
        headers[name] = value.strip(" \t")
    method, target, minor = start.groups()
    if minor == "1" and "host" not in headers:
        raise _HttpError(400, "invalid_request", "Host is missing")
    if "transfer-encoding" in headers:
        raise _HttpError(411, "invalid_request", "send the body with a Content-Length")
    length = headers.get("content-length", "0")
    if not re.fullmatch(r"[0-9]{1,18}", length):
        raise _HttpError(400, "invalid_request", "malformed Content-Length")
    if int(length) > _MAX_BYTES:
        raise _HttpError(413, "invalid_request", "the body is too long")
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = await reader.readexactly(int(length))
    keep_alive = minor == "1" and headers.get("connection", "").lower() != "close"
    return _Request(method, target.partition("?")[0], headers, keep_alive, body)


@cache
def _tls_context() -> ssl.SSLContext:
    """Make httpx's default TLS context once: loading the certificates is slow and blocks the event loop."""
    import httpx

    return httpx.create_ssl_context(trust_env=False)


async def refresh_over_http(
    token_url: str,
    refresh_token: str,
    *,
    client_id: str,
    client_secret: str,
    timeout: float = 10.0,
) -> dict[str, Any]:
    """Refresh at ``token_url`` and return the token response (RFC 6749 section 6).

    Ignores proxy settings, which would redirect loopback traffic, and follows no HTTP redirect.

    Args:
        token_url: The URL of the token endpoint.
        refresh_token: The refresh token; a rotating provider consumes it, even if its response is lost.
        client_id: The client's id, sent with the secret as HTTP Basic.
        client_secret: The client's secret.
        timeout: Seconds for each network operation. Default: 10.

    Raises:
        ProviderError: The endpoint refused, or its response is not a token response.
        MissingDependencyError: httpx is not installed.
        httpx.TransportError: There was no response.
    """
    try:
        import httpx  # imported here because the server does not need it
    except ImportError:
        raise MissingDependencyError("refresh_over_http needs httpx: pip install 'tokenstore[cli]'") from None
    async with httpx.AsyncClient(verify=_tls_context(), trust_env=False, timeout=timeout) as client:
        answer = await client.post(
            token_url,
            data={"grant_type": "refresh_token", "refresh_token": refresh_token},
            auth=(quote_plus(client_id), quote_plus(client_secret)),  # both encoded, see RFC 6749 section 2.3.1
        )
    tokens: Any = None
    with suppress(ValueError):
        tokens = answer.json()
    if answer.status_code == 200 and isinstance(tokens, dict) and "access_token" in tokens:
        return tokens
    error = tokens.get("error") if isinstance(tokens, dict) else None
    # Only text that looks like an error code: any other text from a server may contain a token.
    known = isinstance(error, str) and re.fullmatch(r"[a-z_]{1,40}", error)
    raise ProviderError(answer.status_code, str(error) if known else "invalid_response")
