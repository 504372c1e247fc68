"""A strict OAuth 2.0 token endpoint on loopback, for tests and demos.

:class:`StrictRotatingProvider` serves real HTTP from a background thread and treats refresh tokens the way the
strictest providers do (RFC 6749 section 6, RFC 9700 section 4.14): each one works once, and presenting a used one
revokes its whole grant. A token store with a race in it loses its grants here; one without never notices. The provider
can also be slow, be down, hold its answers back or hang up instead::

    with StrictRotatingProvider(access_token_lifetime=60) as provider:
        tokens = provider.new_grant("alice")
        tokens = await refresh_over_http(
            provider.token_url,
            tokens["refresh_token"],
            client_id=provider.client_id,
            client_secret=provider.client_secret,
        )
        assert provider.stats().refreshes == 1

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

_MAX_BYTES = 16 * 1024  # each of a request's head and body; a real token request has under 4 KiB
_BACKLOG = 1024  # a fleet connects at once, before the loop thread gets to accept
_REALM = 'realm="tokenstore.testing"'
_REQUEST_LINE = re.compile(r"([A-Z]+) (/[!-~]*) HTTP/1\.([01])")
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\r\n\0]*)")
_SINGULAR = frozenset({"authorization", "content-length", "content-type", "host"})


class ProviderError(Exception):
    """The token endpoint refused: HTTP ``status`` and OAuth ``error`` code; never holds a token."""

    def __init__(self, status: int, error: str) -> None:
        super().__init__(status, error)  # both as args, so that it pickles between processes
        self.status = status
        self.error = error

    def __str__(self) -> str:
        return f"token endpoint answered {self.status} ({self.error})"


@dataclass(frozen=True, slots=True)
class ProviderStats:
    """Counters of a :class:`StrictRotatingProvider` since it was made; all but one only grow."""

    requests: int
    """``POST /token`` requests received whole, whatever their outcome."""
    refreshes: int
    """Successful refreshes: each issued new tokens."""
    replays: int
    """Used refresh tokens forgiven because they came within ``grace`` seconds."""
    reuses: int
    """Used refresh tokens presented and not forgiven, on revoked grants too."""
    revoked_grants: int
    """Grants revoked, by a reuse or through ``/revoke``."""
    rejected_clients: int
    """Requests refused with ``invalid_client``."""
    in_flight: int
    """``POST /token`` requests decided but not answered yet."""
    max_in_flight: int
    """The highest ``in_flight`` seen."""
    refreshes_by_user: Mapping[str, int]
    """Successful refreshes per user; users with none are absent."""


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
    def __init__(self, status: int, error: str, why: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error)
        self.reply = _Reply(status, {"error": error, "error_description": why}, headers or {})


class StrictRotatingProvider:
    """A token endpoint on ``127.0.0.1`` that rotates refresh tokens and detects their reuse.

    A context manager (or :meth:`start` and :meth:`stop`); started again it keeps its port and its grants. Thread-safe.
    Every setting but ``port`` and ``clock`` is an attribute that may be changed while the provider runs. Nothing is
    logged, and no token shows in a ``repr``.

    Args:
        client_id: The one client that may refresh.
        client_secret: Its secret, sent as HTTP Basic or in the body (RFC 6749 section 2.3.1).
        access_token_lifetime: Seconds an access token lives, unless a refresh replaces it sooner. Default: an hour.
        refresh_token_lifetime: Seconds a refresh token lives, told to the client as ``refresh_token_expires_in``.
            Default: until it is used.
        latency: Seconds between a token request taking effect (its refresh token is consumed) and the answer.
        rotate: Whether a refresh issues a new refresh token. Otherwise the answer names none and the old one stays
            good, as with several large providers.
        grace: Seconds during which the refresh token used last gets its successor once more instead of revoking the
            grant, as long as that successor is unused. Default: none, which is strict.
        port: The port to listen on. Default: a free one.
        clock: Seconds since the epoch, for all lifetimes.
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
        """While true, every call but ``/stats`` is answered 503 and nothing is consumed."""
        self._port = port
        self._clock = clock
        # Guards everything below: the loop thread decides requests, callers read and steer.
        self._state = threading.Condition()
        self._refresh_tokens: dict[str, _Grant] = {}  # every one ever issued: used ones are known
        self._access_tokens: dict[str, _Grant] = {}  # live ones only
        self._faults: deque[_Reply] = deque()
        self._drops = 0
        self._gates: list[Future[None]] = []
        self._requests = self._replays = self._reuses = self._revoked = self._rejected = 0
        self._in_flight = self._max_in_flight = 0
        self._refreshes: Counter[str] = Counter()
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
        """Listen and serve from a background thread; a no-op if it already does."""
        if self._thread is not None:
            return
        listener = socket.create_server(("127.0.0.1", self._port), backlog=_BACKLOG)
        self._port = listener.getsockname()[1]
        ready: Future[Callable[[], object]] = Future()
        # A daemon, so that a provider nobody stopped cannot keep the interpreter alive.
        thread = threading.Thread(target=self._run, args=(listener, ready), name=f"provider-{self._port}", daemon=True)
        thread.start()
        self._shutdown = ready.result()
        self._thread = thread

    def stop(self) -> None:
        """Stop listening, cut every connection, end every hold; a no-op if not running."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._shutdown()
            thread.join()
            with self._state:
                self._gates.clear()  # cancelled along with the requests that waited for them

    @property
    def base_url(self) -> str:
        """``http://127.0.0.1:PORT``, without a slash; the port is known once started."""
        if self._port == 0:
            raise RuntimeError("the provider has no address yet: enter it with `with` or start()")
        return f"http://127.0.0.1:{self._port}"

    @property
    def token_url(self) -> str:
        """The token endpoint."""
        return f"{self.base_url}/token"

    # -- steering --------------------------------------------------------------------------------

    def new_grant(self, user: str, *, scope: str = "read write") -> dict[str, Any]:
        """Log ``user`` in: a new grant's token response (RFC 6749 section 5.1)."""
        with self._state:
            grant = _Grant(user=user, scope=scope)
            self._issue(grant, scope, rotate=True)
            return self._response(grant, with_refresh=True)

    def stats(self) -> ProviderStats:
        """A consistent snapshot of the counters."""
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
            )

    def fail_next(
        self,
        status: int = 503,
        times: int = 1,
        retry_after: int | str | None = None,
        *,
        error: str = "temporarily_unavailable",
    ) -> None:
        """Answer the next ``times`` token requests with ``status``, consuming nothing.

        ``retry_after`` becomes the ``Retry-After`` header: seconds, or an HTTP date.
        """
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        reply = _HttpError(status, error, "injected fault", headers).reply
        with self._state:
            self._faults.extend([reply] * times)

    def drop_next_response(self, times: int = 1) -> None:
        """Carry out the next ``times`` successful refreshes but hang up instead of answering."""
        with self._state:
            self._drops += times

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep back the answers to token requests until the block ends; they still take effect."""
        gate: Future[None] = Future()
        with self._state:
            self._gates.append(gate)
        try:
            yield
        finally:
            with self._state, suppress(ValueError):
                self._gates.remove(gate)
            with suppress(InvalidStateError):  # stop() came first
                gate.set_result(None)

    def wait_for_requests(self, n: int, timeout: float = 10.0) -> None:
        """Block until ``stats().requests`` reaches ``n``: so many have taken effect in all.

        From a coroutine: ``await asyncio.to_thread(provider.wait_for_requests, n)``.

        Raises:
            TimeoutError: Fewer came within ``timeout`` seconds.
        """
        with self._state:
            if not self._state.wait_for(lambda: self._requests >= n, timeout):
                raise TimeoutError(f"{self._requests} of {n} token requests in {timeout} s")

    # -- the loop thread -------------------------------------------------------------------------

    def _run(self, listener: socket.socket, ready: Future[Callable[[], object]]) -> None:
        try:
            # A loop with a selector whatever the process's policy: `_serve` needs `add_reader`.
            with listener, asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                runner.run(self._serve(listener, ready))
        except BaseException as exc:
            if ready.done():
                raise
            ready.set_exception(exc)

    async def _serve(self, listener: socket.socket, ready: Future[Callable[[], object]]) -> None:
        loop, stopping = asyncio.get_running_loop(), asyncio.Event()
        conversations: set[asyncio.Task[None]] = set()

        # Not `asyncio.start_server`: closing it leaks the connections that it accepted but has not handed over yet.
        def accept() -> None:
            with suppress(OSError):  # the client left again
                connection, _ = listener.accept()
                connection.setblocking(False)
                task = loop.create_task(self._converse(connection))
                conversations.add(task)
                task.add_done_callback(conversations.discard)

        listener.setblocking(False)
        loop.add_reader(listener, accept)
        ready.set_result(lambda: loop.call_soon_threadsafe(stopping.set))
        await stopping.wait()
        loop.remove_reader(listener)
        await asyncio.sleep(0)  # every conversation begins, so that it closes its connection when cancelled
        for task in conversations:
            task.cancel()
        await asyncio.gather(*conversations, return_exceptions=True)

    async def _converse(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection, limit=_MAX_BYTES)
        keep_alive = True
        try:
            while keep_alive:
                head_only = False
                try:
                    request = await _read_request(reader, writer)
                except _HttpError as error:  # the stream's framing is lost: answer and hang up
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
            # Closing with unread input would reset the connection and might destroy the answer.
            writer.write_eof()
            async with asyncio.timeout(1):
                while await reader.read(_MAX_BYTES):
                    pass
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client went away, or (TimeoutError is an OSError) would not
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        finally:
            writer.close()

    async def _answer(self, request: _Request) -> _Reply | None:
        """The reply once it is due, or ``None`` to hang up."""
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
            # Before the bytes leave: whoever has the answer does not see itself in flight.
            with self._state:
                self._in_flight -= 1
        return None if dropped else reply

    # -- decisions, all under the lock -----------------------------------------------------------

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
            raise _HttpError(503, "temporarily_unavailable", "the provider is down")
        return handler(request)

    def _token(self, request: _Request) -> _Reply:
        if self._faults:
            return self._faults.popleft()
        form = self._authenticated_form(request)
        if _required(form, "grant_type") != "refresh_token":
            raise _HttpError(400, "unsupported_grant_type", "only refresh_token is supported")
        token = _required(form, "refresh_token")
        grant = self._refresh_tokens.get(token)
        if grant is None:
            raise _HttpError(400, "invalid_grant", "unknown refresh token")
        scope = form.get("scope", grant.scope)
        if not set(scope.split()) <= set(grant.scope.split()):  # RFC 6749 section 6
            raise _HttpError(400, "invalid_scope", "exceeds the scope granted by the user")
        now = self._clock()
        if token != grant.refresh:
            # Older ones get no grace: their successor is used, so somebody is ahead of the caller.
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
        """RFC 7009: a refresh token takes its grant along, an access token only itself."""
        token = _required(self._authenticated_form(request), "token")
        self._access_tokens.pop(token, None)
        if grant := self._refresh_tokens.get(token):
            self._revoke_grant(grant)
        return _Reply(200)  # for an unknown token too, section 2.2

    def _resource(self, request: _Request) -> _Reply:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":  # RFC 6750 section 3.1: no error code without a token
            challenge = {"WWW-Authenticate": f"Bearer {_REALM}"}
            raise _HttpError(401, "invalid_token", "a Bearer token is required", challenge)
        grant = self._access_tokens.get(token.strip())
        if grant is None or self._clock() >= grant.access_expires:
            challenge = {"WWW-Authenticate": f'Bearer {_REALM}, error="invalid_token"'}
            raise _HttpError(401, "invalid_token", "unknown, expired or revoked", challenge)
        return _Reply(200, {"user": grant.user, "scope": grant.access_scope})

    def _authenticated_form(self, request: _Request) -> dict[str, str]:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/x-www-form-urlencoded":
            raise _HttpError(415, "invalid_request", "use application/x-www-form-urlencoded")
        try:
            # Parameters without a value count as omitted (section 3.2): parse_qsl drops them.
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
    """The client's id and secret (RFC 6749 section 2.3.1); ``ValueError`` if it does not give them."""
    if header is None:
        return form.get("client_id", ""), form.get("client_secret", "")
    if "client_secret" in form:  # section 2.3
        raise _HttpError(400, "invalid_request", "more than one client authentication")
    scheme, _, encoded = header.partition(" ")
    client_id, _, secret = (
        unquote_plus(part, errors="strict")
        for part in b64decode(encoded.strip(), validate=True).decode().partition(":")
    )
    if scheme.lower() != "basic" or form.get("client_id", client_id) != client_id:
        raise ValueError("not Basic, or another client's id in the body")
    return client_id, secret


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Request:
    """One HTTP/1.x request (RFC 9112), small and of known length, or :class:`_HttpError`."""
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
    """The default of httpx, made once: loading the certificates takes longer than a refresh and blocks the loop."""
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
    """Refresh at ``token_url`` (RFC 6749 section 6): the token response.

    Ignores proxy settings, as they would divert loopback traffic, and follows no redirect.

    Args:
        token_url: The token endpoint.
        refresh_token: Consumed by a rotating provider, even if its answer is lost.
        client_id: Sent with the secret as HTTP Basic.
        client_secret: The client's secret.
        timeout: Seconds for each network operation.

    Raises:
        ProviderError: The endpoint refused, or its answer is no token response.
        MissingDependencyError: httpx is not installed.
        httpx.TransportError: There was no answer.
    """
    try:
        import httpx  # here, as the server does without
    except ImportError as exc:
        raise MissingDependencyError("refresh_over_http needs httpx: pip install 'tokenstore[cli]'") from exc
    async with httpx.AsyncClient(verify=_tls_context(), trust_env=False, timeout=timeout) as client:
        answer = await client.post(
            token_url,
            data={"grant_type": "refresh_token", "refresh_token": refresh_token},
            auth=(quote_plus(client_id), quote_plus(client_secret)),  # section 2.3.1 encodes both
        )
    tokens: Any = None
    with suppress(ValueError):
        tokens = answer.json()
    if answer.status_code == 200 and isinstance(tokens, dict) and "access_token" in tokens:
        return tokens
    error = tokens.get("error") if isinstance(tokens, dict) else None
    # Only what looks like an error code: whatever else a server echoes may contain a token.
    known = isinstance(error, str) and re.fullmatch(r"[a-z_]{1,40}", error)
    raise ProviderError(answer.status_code, str(error) if known else "invalid_response")
