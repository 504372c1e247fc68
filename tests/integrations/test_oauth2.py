"""The ready-made refresher against real HTTP: a strict provider, and an endpoint that answers by a script."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import traceback
import tracemalloc
import zlib
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, quote_plus

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.jwk import ECKey, OctKey, OKPKey, RSAKey

from support.paths import DOCS
from tokenstore import (
    ConfigurationError,
    InvalidInputError,
    MissingDependencyError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
    TokenRecord,
    UnsupportedOperationError,
)
from tokenstore.integrations import _answers, oauth2
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.providers import PROVIDERS, AuthMethod, Provider, Rotation
from tokenstore.testing.provider import StrictRotatingProvider

PAGE = DOCS / "providers.md"
ID = "my client:ü"  # needs encoding in every method
SECRET = "s3cr&t+/=% ~ö"
REFRESH, ACCESS = "ghr_theUsedOne", "gho_theOldOne"
GOOD = {"access_token": "gho_new", "expires_in": 3600, "refresh_token": "ghr_next", "token_type": "bearer", "x": [1]}
FORM = "application/x-www-form-urlencoded"
RSA = RSAKey.generate_key(2048)
ROTATIONS: tuple[Rotation, ...] = ("strict", "grace", "none")


def record(refresh_token: str | None = REFRESH) -> TokenRecord:
    return TokenRecord(
        provider="github", user_id="u1", access_token=ACCESS, refresh_token=refresh_token, extra={}, generation=1
    )


# -- an endpoint that does as it is told -----------------------------------------------------------


@dataclass
class Received:
    """A request as it arrived."""

    line: str
    headers: dict[str, str]
    body: str

    @property
    def form(self) -> dict[str, str]:
        pairs = parse_qsl(self.body, keep_blank_values=True, strict_parsing=True)
        assert len(dict(pairs)) == len(pairs)  # RFC 6749 section 3.2: no parameter twice
        return dict(pairs)


Step = bytes | Callable[[socket.socket], None]


@dataclass
class Endpoint:
    """Answers each request with the next step of its script, and the last step again and again."""

    steps: deque[Step] = field(default_factory=deque)
    received: list[Received] = field(default_factory=list)
    arrived: threading.Event = field(default_factory=threading.Event)
    stopping: threading.Event = field(default_factory=threading.Event)
    reads: bool = True
    connections: int = 0

    def __post_init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.url = f"http://{self.address}/token"
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def script(self, *steps: Step) -> None:
        self.steps, self.received, self.connections, self.reads = deque(steps), [], 0, True
        self.arrived.clear()

    def hang(self, _: socket.socket) -> None:
        self.stopping.wait(20)

    def stop(self) -> None:
        self.stopping.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()

    def _serve(self) -> None:
        while not self.stopping.is_set():
            with suppress(OSError):
                connection, _ = self.listener.accept()
                with connection:
                    connection.settimeout(20)
                    self.connections += 1
                    while self._converse(connection):
                        pass

    def _converse(self, connection: socket.socket) -> bool:
        """One request and its answer; whether another may follow."""
        if self.reads:
            with connection.makefile("rb") as stream:
                lines = []
                while (line := stream.readline()) not in (b"\r\n", b""):
                    lines.append(line.decode("latin-1").strip())
                if not lines:
                    return False
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
                body = stream.read(int(headers.get("content-length", 0))).decode()
            self.received.append(Received(lines[0], headers, body))
            self.arrived.set()
        step = self.steps.popleft() if len(self.steps) > 1 else self.steps[0]
        if not isinstance(step, bytes):
            step(connection)
            return False
        connection.sendall(step)
        if b"connection: close" not in step.lower():
            return True
        # Closing with the client's bytes unread would reset the connection under the answer.
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
        return False


def answer(body: object = None, status: int = 200, /, **headers: str) -> bytes:
    """An HTTP answer; the body as JSON, or as it is if it is bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {
        "Content-Type": "application/json",
        "Content-Length": str(len(data)),
        "Connection": "close",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"HTTP/1.1 {status} Whatever\r\n{head}\r\n".encode("latin-1") + data


def hang_up(_: socket.socket) -> None:
    pass


def until_the_client_gives_up(connection: socket.socket) -> None:
    with suppress(ConnectionError):
        while connection.recv(65536):
            pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.stop()


@pytest.fixture(scope="module")
def target() -> Iterator[Endpoint]:
    """One endpoint for all examples of a property."""
    endpoint = Endpoint()
    yield endpoint
    endpoint.stop()


@pytest.fixture
def provider() -> Iterator[StrictRotatingProvider]:
    with StrictRotatingProvider(client_id=ID, client_secret=SECRET, clock=lambda: 1_700_000_000.0) as provider:
        yield provider


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oauth2, "_PAUSE", (0.0, 0.0))


def refresh(refresher: OAuth2Refresher, refresh_token: str | None = REFRESH) -> dict[str, Any]:
    return asyncio.run(refresher(record(refresh_token)))


def refusal(refresher: OAuth2Refresher, *, revoke: bool = False) -> RefreshError:
    """The error of a call, which shows no secret, nor does anything that hangs on it."""

    async def call() -> object:
        return await (refresher.revoke(record()) if revoke else refresher(record()))

    with pytest.raises(RefreshError) as caught:
        asyncio.run(call())
    show_no_secret(caught.value)
    return caught.value


def show_no_secret(error: BaseException) -> None:
    text = "".join(traceback.format_exception(error))
    link: BaseException | None = error
    while link is not None:
        assert not isinstance(link, httpx.HTTPError | httpx.InvalidURL)  # they carry the request
        text += f"{link!r}{vars(link)}"
        link = link.__cause__ or link.__context__
    for secret in (REFRESH, ACCESS, SECRET, "gho_new", "ghr_next", "PRIVATE KEY"):
        assert secret not in text
        assert quote_plus(secret) not in text


# -- the strict provider ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post"])
def test_refreshes_at_the_strict_provider(provider: StrictRotatingProvider, method: AuthMethod) -> None:
    """Time and again, with either way of sending the secret; the answer is passed on as it is."""
    refresher = OAuth2Refresher(provider.token_url, ID, SECRET, auth_method=method)
    tokens = provider.new_grant("alice")
    for _ in range(3):
        tokens = refresh(refresher, tokens["refresh_token"])
        assert tokens["expires_in"] == 3600
        assert tokens["scope"] == "read write"
    assert provider.stats().refreshes == 3
    assert provider.stats().rejected_clients == 0


def test_a_used_refresh_token_needs_a_new_login(provider: StrictRotatingProvider) -> None:
    """The provider's invalid_grant says so."""
    refresher = OAuth2Refresher(provider.token_url, ID, SECRET)
    used = provider.new_grant("alice")["refresh_token"]
    refresh(refresher, used)
    with pytest.raises(ReauthorizationRequiredError, match="log in again") as caught:
        refresh(refresher, used)
    assert caught.value.code == "invalid_grant"


def test_a_wrong_secret_is_for_an_operator(provider: StrictRotatingProvider) -> None:
    """invalid_client is nothing that a user can mend."""
    with pytest.raises(ProviderRefusedError, match="invalid_client") as caught:
        refresh(OAuth2Refresher(provider.token_url, ID, "wrong"), provider.new_grant("alice")["refresh_token"])
    assert caught.value.code == "invalid_client"


def test_a_scope_is_asked_for(provider: StrictRotatingProvider) -> None:
    """A part of what was granted; more than that is refused."""
    granted = provider.new_grant("alice")["refresh_token"]
    narrow = refresh(OAuth2Refresher(provider.token_url, ID, SECRET, scope="read"), granted)
    assert narrow["scope"] == "read"
    with pytest.raises(ProviderRefusedError, match="invalid_scope"):
        refresh(OAuth2Refresher(provider.token_url, ID, SECRET, scope="admin"), narrow["refresh_token"])


def test_a_lost_answer_is_repeated_only_where_it_is_forgiven(provider: StrictRotatingProvider) -> None:
    """A strict provider would revoke the grant; one with a grace gives the same tokens again."""
    token = provider.new_grant("alice")["refresh_token"]
    provider.drop_next_response()
    with pytest.raises(ProviderUnavailableError):
        refresh(OAuth2Refresher(provider.token_url, ID, SECRET), token)
    assert provider.stats().requests == 1
    assert provider.stats().revoked_grants == 0

    provider.grace = 60
    token = provider.new_grant("bob")["refresh_token"]
    provider.drop_next_response()
    tokens = refresh(OAuth2Refresher(provider.token_url, ID, SECRET, rotation="grace"), token)
    assert provider.stats().replays == 1
    refresh(OAuth2Refresher(provider.token_url, ID, SECRET), tokens["refresh_token"])


def test_revokes_at_the_strict_provider(provider: StrictRotatingProvider) -> None:
    """The grant is gone; to do it again, or with an unknown token, is no error (RFC 7009 section 2.2)."""
    revocation_url = f"{provider.base_url}/revoke"
    refresher = OAuth2Refresher(provider.token_url, ID, SECRET, revocation_url=revocation_url)
    assert refresher.can_revoke
    token = provider.new_grant("alice")["refresh_token"]
    for _ in range(2):
        asyncio.run(refresher.revoke(record(token)))
    asyncio.run(refresher.revoke(record("unknown")))
    assert provider.stats().revoked_grants == 1
    with pytest.raises(ReauthorizationRequiredError):
        refresh(refresher, token)


def test_works_from_any_event_loop(provider: StrictRotatingProvider) -> None:
    """One refresher serves loops in several threads at once, and several tasks in each."""
    refresher = OAuth2Refresher(provider.token_url, ID, SECRET)

    async def some(user: str) -> None:
        records = [record(provider.new_grant(f"{user}{n}")["refresh_token"]) for n in range(5)]
        await asyncio.gather(*map(refresher, records))

    threads = [threading.Thread(target=lambda n=n: asyncio.run(some(str(n)))) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert provider.stats().refreshes == 15


# -- what is sent ----------------------------------------------------------------------------------


def test_the_request(endpoint: Endpoint) -> None:
    """RFC 6749 section 6: a POST with a form; nothing in the URL; JSON wanted, uncompressed."""
    endpoint.script(answer(GOOD))
    refresher = OAuth2Refresher(
        endpoint.url, ID, SECRET, scope="a b", extra_parameters={"redirect_uri": "https://example.com/?a=b&c"}
    )
    assert refresh(refresher) == GOOD
    [request] = endpoint.received
    assert request.line == "POST /token HTTP/1.1"
    assert request.headers["content-type"] == FORM
    assert request.headers["accept"] == "application/json"
    assert request.headers["accept-encoding"] == "identity"
    assert request.form == {
        "grant_type": "refresh_token",
        "refresh_token": REFRESH,
        "redirect_uri": "https://example.com/?a=b&c",
        "scope": "a b",
    }


def test_client_secret_basic_encodes_both_parts(endpoint: Endpoint) -> None:
    """RFC 6749 section 2.3.1: as in a form, then Base64; the body has neither."""
    endpoint.script(answer(GOOD))
    refresh(OAuth2Refresher(endpoint.url, ID, SECRET))
    [request] = endpoint.received
    scheme, _, pair = request.headers["authorization"].partition(" ")
    assert scheme == "Basic"
    assert b64decode(pair, validate=True).decode() == f"{quote_plus(ID)}:{quote_plus(SECRET)}"
    assert request.form.keys() == {"grant_type", "refresh_token"}


def test_client_secret_post_sends_both_in_the_body(endpoint: Endpoint) -> None:
    """And nothing in a header."""
    endpoint.script(answer(GOOD))
    refresh(OAuth2Refresher(endpoint.url, ID, SECRET, auth_method="client_secret_post"))
    [request] = endpoint.received
    assert request.form["client_id"] == ID
    assert request.form["client_secret"] == SECRET
    assert "authorization" not in request.headers


def test_a_public_client_sends_its_id(endpoint: Endpoint) -> None:
    """RFC 6749 section 3.2.1: without a secret and a key, that is the default."""
    endpoint.script(answer(GOOD))
    refresh(OAuth2Refresher(endpoint.url, ID))
    [request] = endpoint.received
    assert request.form == {"grant_type": "refresh_token", "refresh_token": REFRESH, "client_id": ID}
    assert "authorization" not in request.headers


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (RSA, "RS256"),
        (ECKey.generate_key("P-256"), "ES256"),
        (ECKey.generate_key("P-384"), "ES384"),
        (ECKey.generate_key("P-521"), "ES512"),
        (OKPKey.generate_key("Ed25519"), "Ed25519"),
    ],
    ids=["RSA", "P-256", "P-384", "P-521", "Ed25519"],
)
def test_private_key_jwt(endpoint: Endpoint, key: RSAKey | ECKey | OKPKey, algorithm: str) -> None:
    """RFC 7523 section 3: signed, about and for this client and endpoint, short-lived, and new for each request."""
    endpoint.script(answer({}, 500), answer(GOOD))
    before = int(datetime.now(UTC).timestamp())
    for form in (key.as_pem(private=True).decode(), key.as_pem(private=True), key.as_dict(private=True)):
        refresher = OAuth2Refresher(
            endpoint.url, ID, private_key=form, rotation="none", jwt_headers={"kid": "k1", "x5t#S256": "abc"}
        )
        refresh(refresher)  # the very first one takes two attempts
    seen = set()
    for request in endpoint.received:
        assert request.form["client_assertion_type"] == "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
        assert request.form["client_id"] == ID
        assert request.form["refresh_token"] == REFRESH
        assert "authorization" not in request.headers
        token = jwt.decode(request.form["client_assertion"], key, algorithms=[algorithm])
        assert token.header.items() >= {"alg": algorithm, "kid": "k1", "x5t#S256": "abc"}.items()
        claims = token.claims
        assert claims["iss"] == claims["sub"] == ID
        assert claims["aud"] == endpoint.url
        assert before <= claims["iat"] < claims["exp"] <= before + 330
        seen.add(claims["jti"])
    assert len(seen) == len(endpoint.received) == 4


def test_another_algorithm_can_be_asked_for(endpoint: Endpoint) -> None:
    """Microsoft prefers PS256 to RS256, which is the default of RSA keys."""
    endpoint.script(answer(GOOD))
    refresh(OAuth2Refresher(endpoint.url, ID, private_key=RSA.as_pem(private=True), jwt_algorithm="PS256"))
    [request] = endpoint.received
    assert jwt.decode(request.form["client_assertion"], RSA, algorithms=["PS256"]).header["alg"] == "PS256"


def test_without_a_refresh_token_nothing_is_sent(endpoint: Endpoint) -> None:
    """Only a login helps."""
    with pytest.raises(ReauthorizationRequiredError, match="log in again"):
        refresh(OAuth2Refresher(endpoint.url, ID, SECRET), None)
    assert not endpoint.received


def test_a_client_of_the_caller_is_used_and_left_open(endpoint: Endpoint) -> None:
    """Its connection serves both calls; its own credentials are not sent."""
    endpoint.script(answer(GOOD, Connection="keep-alive"))

    async def main() -> None:
        async with httpx.AsyncClient(trust_env=False, auth=("somebody", "else"), follow_redirects=True) as client:
            refresher = OAuth2Refresher(endpoint.url, ID, http_client=client)
            for _ in range(2):
                assert await refresher(record()) == GOOD
            assert not client.is_closed
        with pytest.raises(ProviderUnavailableError, match="HTTP client"):
            await refresher(record())

    asyncio.run(main())
    assert endpoint.connections == 1
    assert not [request for request in endpoint.received if "authorization" in request.headers]


def test_the_environments_proxy_is_used_but_not_on_loopback(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else's machine sees what goes to this one. A proxy that refuses has passed nothing on."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://{endpoint.address}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    endpoint.script(answer(b"", 502))
    error = refusal(OAuth2Refresher("https://login.example.com/token", ID, SECRET))
    assert error.code == "network_error"
    assert [request.line for request in endpoint.received] == ["CONNECT login.example.com:443 HTTP/1.1"] * 2
    assert not [request for request in endpoint.received if "authorization" in request.headers]
    endpoint.script(answer(GOOD))
    assert refresh(OAuth2Refresher(endpoint.url, ID, SECRET)) == GOOD
    assert [request.line for request in endpoint.received] == ["POST /token HTTP/1.1"]


def test_unusable_proxy_settings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What httpx says of them may hold the proxy's password."""
    monkeypatch.setenv("HTTPS_PROXY", f"gopher://user:{SECRET}@proxy.example.com")
    error = refusal(OAuth2Refresher("https://login.example.com/token", ID, SECRET))
    assert error.code == "http_client"
    assert "proxy" in str(error)


# -- what an answer means --------------------------------------------------------------------------

REAUTHORIZE, UNAVAILABLE, REFUSED = ReauthorizationRequiredError, ProviderUnavailableError, ProviderRefusedError


@pytest.mark.parametrize(
    ("preset", "status", "body", "kind", "code"),
    [
        ("", 400, {"error": "invalid_grant", "error_description": REFRESH}, REAUTHORIZE, "invalid_grant"),
        ("", 200, {"error": "invalid_grant", **GOOD}, REAUTHORIZE, "invalid_grant"),
        ("", 500, {"error": "invalid_grant"}, REAUTHORIZE, "invalid_grant"),
        ("", 400, {"error": "bad_refresh_token"}, REFUSED, "bad_refresh_token"),
        ("", 401, {"error": "invalid_client"}, REFUSED, "invalid_client"),
        ("", 400, {"error": "unauthorized_client"}, REFUSED, "unauthorized_client"),
        ("", 400, {"error": "invalid_request"}, REFUSED, "invalid_request"),
        ("", 400, {"error": "unsupported_grant_type"}, REFUSED, "unsupported_grant_type"),
        ("", 400, {"error": "invalid_scope"}, REFUSED, "invalid_scope"),
        ("", 404, b"<html>", REFUSED, "http_404"),
        ("", 403, [], REFUSED, "http_403"),
        ("", 400, {"error": {"message": "x"}}, REFUSED, "http_400"),
        ("", 400, {"error": f"refused {REFRESH}"}, REFUSED, "http_400"),
        ("", 400, {"error": REFRESH}, REFUSED, "http_400"),
        ("", 400, {"error": f"x-{ACCESS}"}, REFUSED, "http_400"),
        ("", 400, {"error": "gho_new", "access_token": "gho_new"}, REFUSED, "http_400"),
        ("", 400, {"error": "E" * 65}, REFUSED, "http_400"),
        ("", 200, {"error": "access_denied"}, REFUSED, "access_denied"),
        ("", 429, {"error": "slow_down"}, UNAVAILABLE, "slow_down"),
        ("", 408, b"", UNAVAILABLE, "http_408"),
        ("", 500, b"<html>", UNAVAILABLE, "http_500"),
        ("", 503, {"error": "temporarily_unavailable"}, UNAVAILABLE, "temporarily_unavailable"),
        ("", 400, {"error": "temporarily_unavailable"}, UNAVAILABLE, "temporarily_unavailable"),
        ("", 400, {"error": "server_error"}, UNAVAILABLE, "server_error"),
        ("", 200, b"", UNAVAILABLE, "invalid_response"),
        ("", 204, b"", UNAVAILABLE, "invalid_response"),
        ("", 200, b"<html>gho_new</html>", UNAVAILABLE, "invalid_response"),
        ("", 200, b"\xff\xfe\xff", UNAVAILABLE, "invalid_response"),
        ("", 200, b"[" * 100_000, UNAVAILABLE, "invalid_response"),
        ("", 200, b'{"access_token": "gho_new"', UNAVAILABLE, "invalid_response"),
        ("", 200, [GOOD], UNAVAILABLE, "invalid_response"),
        ("", 200, {}, UNAVAILABLE, "invalid_response"),
        ("", 200, {"access_token": ""}, UNAVAILABLE, "invalid_response"),
        ("", 200, {"access_token": 7}, UNAVAILABLE, "invalid_response"),
        ("", 200, {"access_token": "\ud800"}, UNAVAILABLE, "invalid_response"),
        ("", 200, {"authed_user": GOOD}, UNAVAILABLE, "invalid_response"),
        ("github", 200, {"error": "bad_refresh_token"}, REAUTHORIZE, "bad_refresh_token"),
        ("github", 200, {"error": "incorrect_client_credentials"}, REFUSED, "incorrect_client_credentials"),
        ("slack", 200, {"ok": False, "error": "invalid_refresh_token"}, REAUTHORIZE, "invalid_refresh_token"),
        ("slack", 200, {"ok": False, "error": "bad_client_secret"}, REFUSED, "bad_client_secret"),
        ("slack", 200, {"ok": False, "error": "internal_error"}, UNAVAILABLE, "internal_error"),
        ("slack", 429, {"ok": False, "error": "ratelimited"}, UNAVAILABLE, "ratelimited"),
        ("slack", 200, {"ok": False, **GOOD}, REFUSED, "http_200"),
        ("microsoft", 400, {"error": "interaction_required"}, REAUTHORIZE, "interaction_required"),
        ("microsoft", 400, {"error": "consent_required"}, REAUTHORIZE, "consent_required"),
        (
            "atlassian",
            403,
            {"error": "unauthorized_client", "error_description": "refresh_token is invalid"},
            REAUTHORIZE,
            "unauthorized_client",
        ),
        (
            "atlassian",
            401,
            {"error": "unauthorized_client", "error_description": "something else"},
            REFUSED,
            "unauthorized_client",
        ),
    ],
)
def test_every_answer_has_its_error(
    endpoint: Endpoint, preset: str, status: int, body: object, kind: type[RefreshError], code: str
) -> None:
    """By the error code whatever the status, then by the status; only a harmless code is shown, never a description."""
    endpoint.script(answer(body, status))
    error = refusal(OAuth2Refresher(endpoint.url, ID, SECRET, provider=PROVIDERS.get(preset)))
    assert type(error) is kind
    assert error.code == code
    assert len(endpoint.received) == 1
    assert (PROVIDERS[preset].name if preset else "127.0.0.1") in str(error)


def test_slack_may_wrap_a_users_tokens(endpoint: Endpoint) -> None:
    """What is in `authed_user` counts where the top level has no tokens; the rest is kept."""
    endpoint.script(answer({"ok": True, "team": {"id": "T1"}, "authed_user": {"id": "U1", **GOOD}}))
    tokens = refresh(OAuth2Refresher(endpoint.url, ID, SECRET, provider=PROVIDERS["slack"]))
    assert tokens.items() >= {"access_token": "gho_new", "refresh_token": "ghr_next", "id": "U1"}.items()
    assert tokens["team"] == {"id": "T1"}
    endpoint.script(answer({"ok": True, "access_token": "xoxb", "authed_user": {"access_token": "xoxp"}}))
    assert refresh(OAuth2Refresher(endpoint.url, ID, SECRET, provider=PROVIDERS["slack"]))["access_token"] == "xoxb"


@pytest.mark.parametrize("media_type", [FORM, f"{FORM.upper()} ; charset=utf-8"])
def test_a_form_is_understood(endpoint: Endpoint, media_type: str) -> None:
    """GitHub answers with one unless asked for JSON; errors too."""
    endpoint.script(answer(b"access_token=gho%2Bnew&expires_in=28800&scope=&x=%C3%BC+y", 200, Content_Type=media_type))
    tokens = refresh(OAuth2Refresher(endpoint.url, ID, SECRET))
    assert tokens == {"access_token": "gho+new", "expires_in": "28800", "x": "ü y"}
    endpoint.script(answer(b"error=invalid_grant&error_description=x", 200, Content_Type=media_type))
    assert type(refusal(OAuth2Refresher(endpoint.url, ID, SECRET))) is REAUTHORIZE
    for broken in (b"access_token=%FF", b"access_token=\xff"):
        endpoint.script(answer(broken, 200, Content_Type=media_type))
        assert refusal(OAuth2Refresher(endpoint.url, ID, SECRET)).code == "invalid_response"


def test_json_needs_no_media_type(endpoint: Endpoint) -> None:
    """Nor UTF-8 without a byte order mark; a form does need its own."""
    endpoint.script(answer(b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), 201, Content_Type="text/plain"))
    assert refresh(OAuth2Refresher(endpoint.url, ID, SECRET)) == GOOD
    endpoint.script(answer(b"access_token=gho_new"))
    assert refusal(OAuth2Refresher(endpoint.url, ID, SECRET)).code == "invalid_response"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(endpoint: Endpoint, status: int) -> None:
    """It would take the secret elsewhere; not even with a client that follows redirects."""
    endpoint.script(answer(GOOD, status, Location=endpoint.url))

    async def main() -> None:
        async with httpx.AsyncClient(trust_env=False, follow_redirects=True) as client:
            with pytest.raises(ProviderRefusedError, match="redirect") as caught:
                await OAuth2Refresher(endpoint.url, ID, SECRET, http_client=client)(record())
            assert caught.value.code == "redirect"

    asyncio.run(main())
    assert type(refusal(OAuth2Refresher(endpoint.url, ID, SECRET, rotation="none"))) is REFUSED
    assert len(endpoint.received) == 2


NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "date", "expected"),
    [
        ("0", None, 0),
        ("120", None, 120),
        ("00120", None, 120),
        ("3601", None, 3600),
        ("9" * 5000, None, 3600),
        ("-5", None, None),
        ("1.5", None, None),
        ("soon", None, None),
        ("", None, None),
        ("٣", None, None),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), NOW, 90),
        (format_datetime(NOW - timedelta(seconds=90), usegmt=True), NOW, 0),
        (format_datetime(NOW + timedelta(days=90), usegmt=True), NOW, 3600),
        ("Monday, 23-Nov-26 12:01:00 GMT", NOW, 60),
        ("Mon Nov 23 12:01:00 2026", NOW, 60),
        ("Mon, 23 Nov 99999 12:01:00 GMT", NOW, None),
        ("Mon, 23 Nov 2026 12:01:00 +9999", NOW, None),
    ],
)
def test_retry_after(value: str, date: datetime | None, expected: float | None) -> None:
    """RFC 9110 section 10.2.3: seconds, or a date by the server's own clock; at most an hour, never negative."""
    headers = [
        (b"Retry-After", value.encode()),
        (b"Date", format_datetime(date, usegmt=True).encode() if date else b""),
    ]
    assert _answers.retry_after(httpx.Headers(headers)) == expected


def test_retry_after_without_the_servers_clock() -> None:
    """This machine's clock has to do."""
    soon = datetime.now(UTC) + timedelta(seconds=100)
    wait = _answers.retry_after(httpx.Headers({"Retry-After": format_datetime(soon, usegmt=True), "Date": "today"}))
    assert wait is not None
    assert 90 < wait <= 100


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("status", "kind"), [(429, UNAVAILABLE), (503, UNAVAILABLE), (403, REFUSED)])
def test_a_wait_is_passed_on_and_kept(
    endpoint: Endpoint, status: int, kind: type[RefreshError], rotation: Rotation
) -> None:
    """Whoever says when to come back is not asked again before, whatever the rotation."""
    endpoint.script(answer({}, status, Retry_After="30"))
    error = refusal(OAuth2Refresher(endpoint.url, ID, SECRET, rotation=rotation))
    assert isinstance(error, kind)
    assert isinstance(error, ProviderUnavailableError | ProviderRefusedError)
    assert error.retry_after == 30
    assert len(endpoint.received) == 1


# -- no answer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("failure", ["5xx", "hang up", "half an answer", "hang"])
def test_an_unclear_outcome_is_repeated_once_where_that_is_safe(
    endpoint: Endpoint, rotation: Rotation, failure: str
) -> None:
    """Never under a strict rotation: the refresh token may be used."""
    steps: dict[str, Step] = {
        "5xx": answer(b"", 502),
        "hang up": hang_up,
        "half an answer": answer(b"{", 200, Content_Length="99"),
        "hang": until_the_client_gives_up,
    }
    timeout = 10.0 if failure != "hang" else 1.0
    refresher = OAuth2Refresher(endpoint.url, ID, SECRET, rotation=rotation, timeout=timeout)
    endpoint.script(steps[failure], answer(GOOD))
    if rotation == "strict":
        expected = {"5xx": "http_502", "hang": "timeout"}.get(failure, "network_error")
        assert refusal(refresher).code == expected
        assert len(endpoint.received) == 1
    else:
        assert refresh(refresher) == GOOD
        assert len(endpoint.received) == 2
    endpoint.script(steps[failure])
    assert isinstance(refusal(refresher), ProviderUnavailableError)
    assert len(endpoint.received) == (1 if rotation == "strict" else 2)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(
    ("error", "unsent"),
    [
        (httpx.ConnectError, True),
        (httpx.ConnectTimeout, True),
        (httpx.PoolTimeout, True),
        (httpx.ProxyError, True),
        (httpx.ReadTimeout, False),
        (httpx.WriteTimeout, False),
        (httpx.ReadError, False),
        (httpx.WriteError, False),
        (httpx.CloseError, False),
        (httpx.RemoteProtocolError, False),
    ],
)
def test_what_was_never_sent_is_repeated_once_in_any_case(
    error: type[httpx.TransportError], unsent: bool, rotation: Rotation
) -> None:
    """A second attempt is all there is."""
    calls = 0

    def fail(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        raise error(f"about {SECRET}", request=request)

    client = httpx.AsyncClient(transport=httpx.MockTransport(fail))
    found = refusal(OAuth2Refresher("https://example.com", ID, SECRET, rotation=rotation, http_client=client))
    assert isinstance(found, ProviderUnavailableError)
    assert found.code == ("timeout" if error in (httpx.ReadTimeout, httpx.WriteTimeout) else "network_error")
    assert calls == (2 if unsent or rotation != "strict" else 1)


def test_a_second_attempt_has_its_own_outcome() -> None:
    """What is told is not that nothing was sent, if it then was."""
    calls = 0

    async def fail_then_hang(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise httpx.ConnectError("refused", request=request)
        await asyncio.Event().wait()
        raise AssertionError

    client = httpx.AsyncClient(transport=httpx.MockTransport(fail_then_hang))
    error = refusal(OAuth2Refresher("https://example.com", ID, SECRET, timeout=0.1, http_client=client))
    assert (calls, error.code) == (2, "timeout")


def test_nobody_listens() -> None:
    """The port is closed, and nothing was sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error = refusal(OAuth2Refresher(f"http://127.0.0.1:{port}/token", ID, SECRET))
    assert error.code == "network_error"
    assert "cannot be reached" in str(error)


def test_a_connection_that_ends_before_the_request_is_read(endpoint: Endpoint) -> None:
    """Nobody can tell whether it was."""
    endpoint.script(hang_up)
    endpoint.reads = False
    assert refusal(OAuth2Refresher(endpoint.url, ID, SECRET)).code == "network_error"
    assert endpoint.connections == 1


def test_tls_comes_first(endpoint: Endpoint) -> None:
    """An endpoint that does not speak it gets no request."""
    endpoint.script(answer(GOOD))
    endpoint.reads = False
    error = refusal(OAuth2Refresher(endpoint.url.replace("http:", "https:"), ID, SECRET))
    assert error.code == "network_error"
    assert "cannot be reached" in str(error)
    assert endpoint.connections == 2


def test_a_tls_handshake_that_hangs_leaves_no_connection(endpoint: Endpoint) -> None:
    """Neither when it takes too long nor when the caller gives up."""
    endpoint.script(until_the_client_gives_up)
    endpoint.reads = False
    refresher = OAuth2Refresher(endpoint.url.replace("http:", "https:"), ID, SECRET, timeout=0.4)
    assert refusal(refresher).code == "network_error"

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await OAuth2Refresher(endpoint.url.replace("http:", "https:"), ID, SECRET)(record())

    asyncio.run(main())


def drip(connection: socket.socket) -> None:
    """An answer without end, one byte at a time, until the client has enough."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    connection.settimeout(0.05)
    with suppress(OSError):
        while True:
            connection.sendall(b" ")
            with suppress(TimeoutError):
                if not connection.recv(1):
                    return


def test_the_time_is_limited_in_all(endpoint: Endpoint) -> None:
    """An endpoint that sends a byte now and then does not hold the caller for ever."""
    endpoint.script(drip)
    error = refusal(OAuth2Refresher(endpoint.url, ID, SECRET, timeout=0.3))
    assert isinstance(error, ProviderUnavailableError)
    assert error.code == "timeout"
    assert "0.3 s" in str(error)


def test_cancellation_passes_through(endpoint: Endpoint) -> None:
    """It is no timeout of ours, and leaves no connection."""
    endpoint.script(endpoint.hang)

    async def main() -> None:
        task = asyncio.create_task(OAuth2Refresher(endpoint.url, ID, SECRET, rotation="none")(record()))
        await asyncio.to_thread(endpoint.arrived.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert SECRET not in "".join(traceback.format_exception(caught.value))

    asyncio.run(main())
    assert len(endpoint.received) == 1


# -- answers that are too long ---------------------------------------------------------------------


def flood(connection: socket.socket) -> None:
    """Chunks without end."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    with suppress(OSError):
        while True:
            connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


@pytest.mark.parametrize(
    "step",
    [answer(b" " * (_answers.MAX_BYTES + 1)), answer(b" " * 2_000_000, 400), flood],
    ids=["one byte too many", "an error", "without end"],
)
def test_a_long_answer_is_cut_off(endpoint: Endpoint, step: Step) -> None:
    """Whatever its length is said to be; it is not asked for again."""

    def send(connection: socket.socket) -> None:
        with suppress(OSError):
            connection.sendall(step) if isinstance(step, bytes) else step(connection)

    endpoint.script(send)
    error = refusal(OAuth2Refresher(endpoint.url, ID, SECRET, rotation="none"))
    assert isinstance(error, ProviderUnavailableError)
    assert error.code == "invalid_response"
    assert len(endpoint.received) == 1


def test_the_longest_answer_is_read(endpoint: Endpoint) -> None:
    """The limit itself is within it."""
    body = json.dumps(GOOD).encode().ljust(_answers.MAX_BYTES)
    endpoint.script(answer(body))
    assert refresh(OAuth2Refresher(endpoint.url, ID, SECRET)) == GOOD


@pytest.mark.parametrize(
    ("coding", "compress"), [("gzip", gzip.compress), ("X-GZip ", gzip.compress), ("deflate", zlib.compress)]
)
def test_a_compressed_answer_is_read(endpoint: Endpoint, coding: str, compress: Callable[[bytes], bytes]) -> None:
    """It was not asked for, but the tokens in it may be the only ones."""
    endpoint.script(answer(compress(json.dumps(GOOD).encode()), 200, Content_Encoding=coding))
    assert refresh(OAuth2Refresher(endpoint.url, ID, SECRET)) == GOOD


def test_a_compressed_answer_is_not_blown_up(endpoint: Endpoint) -> None:
    """What counts is the size that it would have; no more than that is made of it."""
    bomb = gzip.compress(bytes(64 * 1024 * 1024))
    assert len(bomb) < _answers.MAX_BYTES
    endpoint.script(answer(bomb, 200, Content_Encoding="gzip"))
    refresher = OAuth2Refresher(endpoint.url, ID, SECRET)
    tracemalloc.start()
    try:
        assert refusal(refresher).code == "invalid_response"
        assert tracemalloc.get_traced_memory()[1] < 16 * 1024 * 1024
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("coding", "body"), [("gzip", b"no gzip"), ("br", b"{}"), ("gzip, gzip", b"{}")])
def test_an_unreadable_coding_is_no_sensible_answer(endpoint: Endpoint, coding: str, body: bytes) -> None:
    endpoint.script(answer(body, 200, Content_Encoding=coding))
    assert refusal(OAuth2Refresher(endpoint.url, ID, SECRET)).code == "invalid_response"


# -- anything at all -------------------------------------------------------------------------------

BODIES = st.binary(max_size=200) | st.builds(
    lambda value: json.dumps(value).encode(),
    st.dictionaries(
        st.sampled_from(["access_token", "error", "error_description", "ok", "expires_in", "authed_user", "x"]),
        st.none()
        | st.booleans()
        | st.floats()
        | st.text(max_size=20)
        | st.sampled_from(["invalid_grant", REFRESH, ACCESS, SECRET, "server_error"])
        | st.dictionaries(st.just("access_token"), st.text(max_size=5)),
    ),
)


@given(
    body=BODIES,
    status=st.sampled_from([200, 201, 204, 302, 400, 401, 403, 429, 500, 503]) | st.integers(200, 599),
    media_type=st.sampled_from(["application/json", FORM, "text/html", ""]),
    coding=st.sampled_from(["", "", "", "gzip", "identity", "br"]),
    retry_after=st.none() | st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=20),
    preset=st.none() | st.sampled_from(sorted(PROVIDERS)),
)
def test_any_answer_is_tokens_or_one_of_three_errors(
    target: Endpoint,
    body: bytes,
    status: int,
    media_type: str,
    coding: str,
    retry_after: str | None,
    preset: str | None,
) -> None:
    """Whatever comes; and no error shows a secret."""
    length = "" if status in (204, 304) else str(len(body))
    headers = {"Retry-After": retry_after or "", "Content-Type": media_type, "Content-Encoding": coding}
    sent = b"" if status in (204, 304) else body
    target.script(answer(sent, status, **{**headers, "Content-Length": length}))
    vendor = PROVIDERS.get(preset or "")
    refresher = OAuth2Refresher(target.url, ID, SECRET, provider=vendor, rotation="strict")
    try:
        tokens = asyncio.run(refresher(record()))
    except (ReauthorizationRequiredError, ProviderUnavailableError, ProviderRefusedError) as error:
        assert re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", error.code)  # noqa: PT017 - either outcome is good
        wait = getattr(error, "retry_after", None)
        assert wait is None or 0 <= wait <= 3600
        text = f"{error}{error.code}{error!r}{error.__cause__}{error.__context__}"
        assert not [secret for secret in (REFRESH, ACCESS, SECRET) if secret in text]
    else:
        assert isinstance(tokens["access_token"], str)
        assert tokens["access_token"]


# -- revocation ------------------------------------------------------------------------------------


def revoker(endpoint: Endpoint, **options: Any) -> OAuth2Refresher:
    return OAuth2Refresher(endpoint.url, ID, SECRET, revocation_url=endpoint.url, **options)


def test_the_revocation_request(endpoint: Endpoint) -> None:
    """RFC 7009 section 2.1: the refresh token, as it ends the grant; without one the access token."""
    endpoint.script(answer(b"", 200))
    asyncio.run(revoker(endpoint).revoke(record()))
    asyncio.run(revoker(endpoint).revoke(record(None)))
    with_refresh_token, without = endpoint.received
    assert with_refresh_token.form == {"token": REFRESH, "token_type_hint": "refresh_token"}
    assert without.form == {"token": ACCESS, "token_type_hint": "access_token"}
    assert with_refresh_token.headers["authorization"].startswith("Basic ")


@pytest.mark.parametrize("body", [b"", b"<html>", {"error": "invalid_grant"}, {}])
def test_a_revocation_that_succeeds_says_nothing(endpoint: Endpoint, body: object) -> None:
    """RFC 7009 section 2.2: the status is all."""
    endpoint.script(answer(body))
    asyncio.run(revoker(endpoint).revoke(record()))


def test_an_unknown_token_is_revoked(endpoint: Endpoint) -> None:
    """Also where the provider, against the RFC, makes an error of it."""
    endpoint.script(answer({"error": "invalid_token"}, 400))
    asyncio.run(revoker(endpoint).revoke(record()))


@pytest.mark.parametrize(
    ("status", "body", "kind", "code"),
    [
        (400, {"error": "unsupported_token_type"}, REFUSED, "unsupported_token_type"),
        (401, {"error": "invalid_client"}, REFUSED, "invalid_client"),
        (400, {"error": "invalid_grant"}, REAUTHORIZE, "invalid_grant"),
        (404, b"", REFUSED, "http_404"),
        (302, b"", REFUSED, "redirect"),
        (429, b"", UNAVAILABLE, "http_429"),
    ],
)
def test_a_revocation_that_fails(
    endpoint: Endpoint, status: int, body: object, kind: type[RefreshError], code: str
) -> None:
    """As with a refresh."""
    endpoint.script(answer(body, status))
    error = refusal(revoker(endpoint), revoke=True)
    assert (type(error), error.code) == (kind, code)
    assert "the revocation endpoint" in str(error)


def test_a_revocation_may_always_be_repeated(endpoint: Endpoint) -> None:
    """To revoke twice is to revoke, under a strict rotation, too."""
    endpoint.script(hang_up, answer(b""))
    asyncio.run(revoker(endpoint, rotation="strict").revoke(record()))
    assert len(endpoint.received) == 2


@pytest.mark.parametrize("preset", sorted(name for name, found in PROVIDERS.items() if not found.revocation_url))
def test_without_a_revocation_endpoint(preset: str) -> None:
    """The error says what can be done instead, here and at the vendor."""
    refresher = OAuth2Refresher.for_provider(preset, client_id=ID, client_secret=SECRET)
    assert not refresher.can_revoke
    with pytest.raises(UnsupportedOperationError, match="delete_tokens") as caught:
        asyncio.run(refresher.revoke(record()))
    assert PROVIDERS[preset].otherwise
    assert PROVIDERS[preset].otherwise in str(caught.value)
    show_no_secret(caught.value)
    plain = OAuth2Refresher("https://example.com/token", ID)
    with pytest.raises(UnsupportedOperationError, match=r"delete_tokens makes the store forget the tokens$"):
        asyncio.run(plain.revoke(record()))


# -- construction ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.com/token", "https"),
        ("http://localhost.example.com/token", "https"),
        ("http://127.0.0.1.example.com/token", "https"),
        ("http://10.0.0.1/token", "https"),
        ("ftp://localhost/token", "https"),
        ("https://user:s3cr3t@example.com/token", "password"),
        ("https://user@example.com/token", "password"),
        ("http://localhost@example.com/token", "password"),
        ("https://example.com/token#part", "fragment"),
        ("https://example.com/token#", "fragment"),
        ("https:///token", "no URL"),
        ("https://exa mple.com", "no URL"),
        ("https://example.com\n/token", "no URL"),
        ("https://[::1", "no URL"),
        ("https://example.com:port/", "no URL"),
        ("/token", "no URL"),
        ("", "empty"),
    ],
)
def test_an_unsafe_url_is_refused(url: str, why: str) -> None:
    """What goes there are secrets. The error does not show the URL, which may hold one, too."""
    for token_url, revocation_url in ((url, None), ("https://example.com", url)):
        with pytest.raises(ConfigurationError, match=why) as caught:
            OAuth2Refresher(token_url, ID, revocation_url=revocation_url)
        assert "s3cr3t" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "url", ["https://example.com/token?x=1", "http://localhost:8080/", "http://127.9.9.9/", "http://[::1]:80/token"]
)
def test_a_safe_url_is_taken(url: str) -> None:
    """With https anywhere, and http on this machine."""
    assert not OAuth2Refresher(url, ID).can_revoke


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"client_secret": ""}, "client_secret must not be empty"),
        ({"client_secret": "\ud800"}, "surrogate"),
        ({"client_secret": 7}, "client_secret must be a str"),
        ({"client_id": ""}, "client_id must not be empty"),
        ({"auth_method": "client_secret_basic"}, "do not go together"),
        ({"auth_method": "client_secret_jwt"}, "auth_method must be one of"),
        ({"client_secret": "x", "auth_method": "none"}, "do not go together"),
        ({"client_secret": "x", "auth_method": "private_key_jwt"}, "do not go together"),
        ({"auth_method": "private_key_jwt"}, "do not go together"),
        ({"client_secret": "x", "private_key": RSA.as_pem(private=True)}, "do not go together"),
        ({"private_key": "no key"}, "private_key must be"),
        ({"private_key": RSA.as_pem(private=False)}, "private_key must be"),
        ({"private_key": RSA.as_pem(private=True, password="x")}, "private_key must be"),
        ({"private_key": OctKey.generate_key(256).as_dict()}, "private_key must be"),
        ({"private_key": {"kty": "RSA"}}, "private_key must be"),
        ({"private_key": OKPKey.generate_key("X25519").as_pem(private=True)}, "do not go together"),
        ({"private_key": RSA.as_pem(private=True), "jwt_algorithm": "ES256"}, "do not go together"),
        ({"private_key": RSA.as_pem(private=True), "jwt_algorithm": "none"}, "do not go together"),
        ({"private_key": RSA.as_pem(private=True), "jwt_headers": {"unheard_of": "x"}}, "do not go together"),
        ({"rotation": "sometimes"}, "rotation must be one of"),
        ({"extra_parameters": {"client_secret": "x"}}, "extra_parameters cannot hold client_secret"),
        ({"extra_parameters": {"scope": "x", "grant_type": "y"}}, "cannot hold grant_type, scope"),
        ({"extra_parameters": {"x": ""}}, "x must not be empty"),
        ({"extra_parameters": {1: "x"}}, "extra_parameters must be a str"),
        ({"scope": ""}, "scope must not be empty"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: Mapping[str, Any], why: str) -> None:
    """At once, not at the first refresh; no key is shown."""
    with pytest.raises(ConfigurationError, match=why) as caught:
        OAuth2Refresher("https://example.com/token", **{"client_id": ID, **arguments})
    show_no_secret(caught.value)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "10", True])
def test_the_timeout_is_a_positive_number_of_seconds(timeout: Any) -> None:
    with pytest.raises(InvalidInputError, match="timeout"):
        OAuth2Refresher("https://example.com/token", ID, timeout=timeout)


def test_unloadable_certificates_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """When the refresher is made."""
    (tmp_path / "bad.pem").write_text("no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "bad.pem"))
    oauth2._tls_context.cache_clear()
    with pytest.raises(ConfigurationError, match="SSL_CERT_FILE"):
        OAuth2Refresher("https://example.com/token", ID)
    OAuth2Refresher("https://example.com/token", ID, trust_env=False)


def test_nothing_shows_a_secret(endpoint: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    """Neither its repr, nor what anybody logs on the way."""
    endpoint.script(answer({}, 500), answer(GOOD))
    basic = b64encode(f"{quote_plus(ID)}:{quote_plus(SECRET)}".encode()).decode()
    with caplog.at_level(logging.DEBUG):
        for method in ("client_secret_basic", "client_secret_post"):
            refresher = OAuth2Refresher(endpoint.url, ID, SECRET, auth_method=method, rotation="none")
            refresh(refresher)
            caplog.records.append(logging.makeLogRecord({"msg": repr(refresher)}))
    assert "<OAuth2Refresher 127.0.0.1 client_secret_post rotation=none>" in caplog.records[-1].getMessage()
    text = "".join(found.getMessage() for found in caplog.records)
    for secret in (SECRET, quote_plus(SECRET), basic, REFRESH, "gho_new", "ghr_next"):
        assert secret not in text


@pytest.mark.parametrize("missing", ["authlib", "httpx", "joserfc"])
def test_without_the_extra(missing: str) -> None:
    """The modules can be imported; to make a refresher says what to install."""
    code = f"""
import sys
sys.modules[{missing!r}] = None
from tokenstore import MissingDependencyError
from tokenstore.integrations import providers
from tokenstore.integrations.oauth2 import OAuth2Refresher
try:
    OAuth2Refresher("https://example.com/token", "id")
except MissingDependencyError as error:
    print(error)
"""
    printed = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True)
    assert 'pip install "tokenstore[oauth]"' in printed.stdout
    assert issubclass(MissingDependencyError, ImportError)


# -- presets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", sorted(PROVIDERS))
def test_a_preset_makes_a_refresher(preset: str) -> None:
    """With nothing but the client's id and secret; what the vendor documents is what it does."""
    found = PROVIDERS[preset]
    refresher = OAuth2Refresher.for_provider(preset, client_id=ID, client_secret=SECRET, timeout=5)
    assert repr(refresher) == f"<OAuth2Refresher {found.name} {found.auth_method} rotation={found.rotation}>"
    assert refresher.can_revoke is (found.revocation_url is not None)
    assert refresher.timeout == 5
    assert all(url is None or (url.startswith("https://") and "{" not in url) for url in found.urls({}))
    assert "client_secret" not in repr(OAuth2Refresher.for_provider(preset, client_id=ID))


def test_where_a_preset_runs_can_be_told(endpoint: Endpoint) -> None:
    """Self-hosted GitHub and GitLab, and the tenants of Microsoft; nowhere else."""
    assert PROVIDERS["gitlab"].urls({"base_url": "https://git.example.com/gitlab/"}) == (
        "https://git.example.com/gitlab/oauth/token",
        "https://git.example.com/gitlab/oauth/revoke",
    )
    assert PROVIDERS["microsoft"].urls({"tenant": "contoso.com"}) == (
        "https://login.microsoftonline.com/contoso.com/oauth2/v2.0/token",
        None,
    )
    endpoint.script(answer(GOOD))
    base_url = f"http://{endpoint.address}"
    refresh(OAuth2Refresher.for_provider("github", client_id=ID, client_secret=SECRET, base_url=base_url))
    assert endpoint.received[0].line == "POST /login/oauth/access_token HTTP/1.1"
    with pytest.raises(ConfigurationError, match="Google takes no base_url and no tenant"):
        OAuth2Refresher.for_provider("google", client_id=ID, base_url="https://example.com", tenant="x")
    with pytest.raises(ConfigurationError, match="there are atlassian, github"):
        OAuth2Refresher.for_provider("gitea", client_id=ID)


def test_options_win_over_a_preset(endpoint: Endpoint) -> None:
    """Of the table or of one's own."""
    own = Provider("Acme", endpoint.url, auth_method="client_secret_post", invalid_grant=frozenset({"no_more"}))
    endpoint.script(answer(GOOD))
    options: dict[str, Any] = {"rotation": "none", "auth_method": "client_secret_basic", "scope": "x"}
    refresher = OAuth2Refresher.for_provider(own, client_id=ID, client_secret=SECRET, **options)
    assert repr(refresher) == "<OAuth2Refresher Acme client_secret_basic rotation=none>"
    refresh(refresher)
    assert endpoint.received[0].form["scope"] == "x"
    endpoint.script(answer({"error": "no_more"}, 400))
    assert type(refusal(refresher)) is REAUTHORIZE


def test_linear_names_the_field_by_the_token(endpoint: Endpoint) -> None:
    """Its revocation endpoint differs from RFC 7009."""
    linear = replace(PROVIDERS["linear"], token_url=endpoint.url, revocation_url=endpoint.url)
    refresher = OAuth2Refresher.for_provider(linear, client_id=ID, client_secret=SECRET)
    endpoint.script(answer(b""))
    asyncio.run(refresher.revoke(record()))
    asyncio.run(refresher.revoke(record(None)))
    assert [parse_qs(request.body).keys() - {"client_id", "client_secret"} for request in endpoint.received] == [
        {"refresh_token"},
        {"access_token"},
    ]


def test_the_documented_table_is_the_data() -> None:
    """docs/providers.md shows every preset, as it is."""
    text = PAGE.read_text("utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    presets = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in PROVIDERS}
    assert list(presets) == list(PROVIDERS)
    for preset, (vendor, token_url, revocation_url, auth_method, rotation, codes, rule) in presets.items():
        found = PROVIDERS[preset]
        assert vendor == f"[{found.name}]({found.documentation})"
        assert token_url == f"`{found.token_url}`"
        assert revocation_url == (f"`{found.revocation_url}`" if found.revocation_url else "none")
        assert auth_method == f"`{found.auth_method}`"
        assert rotation == f"`{found.rotation}`"
        assert re.findall(r"`([^`]+)`", codes) == sorted(found.invalid_grant)
        assert rule == found.rule
