"""The strict provider's HTTP server: client authentication, malformed requests, and generated requests."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from typing import Any
from urllib.parse import quote_plus, urlencode

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.provider_requests import FORM, outcome, raw, refresh, refresh_at, resource
from tokenstore.testing.provider import StrictRotatingProvider


@pytest.mark.parametrize("in_body", [False, True])
def test_the_client_authenticates_with_basic_or_in_the_body(in_body: bool) -> None:
    client_id, client_secret = "café & co", "s:3+c r%t"
    with StrictRotatingProvider(client_id=client_id, client_secret=client_secret) as provider:
        data = {"grant_type": "refresh_token", "refresh_token": provider.new_grant("alice")["refresh_token"]}
        if in_body:
            data |= {"client_id": client_id, "client_secret": client_secret}
        auth = None if in_body else (quote_plus(client_id), quote_plus(client_secret))
        assert httpx.post(provider.token_url, data=data, auth=auth, trust_env=False).status_code == 200
        data["refresh_token"] = provider.new_grant("alice")["refresh_token"]
        assert "access_token" in asyncio.run(refresh_at(provider, data["refresh_token"]))


@pytest.mark.parametrize(
    ("header", "form"),
    [
        (None, {}),
        (None, {"client_id": "demo-client"}),
        (None, {"client_id": "demo-client", "client_secret": "wrong"}),
        ("Basic " + b64encode(b"demo-client:wrong").decode(), {}),
        ("Basic " + b64encode(b"demo-client:demo-secret").decode(), {"client_id": "another"}),
        ("Bearer " + b64encode(b"demo-client:demo-secret").decode(), {}),
        ("Basic " + b64encode(b"demo-client").decode(), {}),
        ("Basic " + b64encode(b"\xff:%ff").decode(), {}),
        ("Basic ***", {}),
        ("Basic", {}),
    ],
)
def test_wrong_client_credentials_are_rejected(
    provider: StrictRotatingProvider, header: str | None, form: dict[str, str]
) -> None:
    tokens = provider.new_grant("alice")
    response = httpx.post(
        provider.token_url,
        data={"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"], **form},
        headers={"Authorization": header} if header else {},
        trust_env=False,
    )
    assert outcome(response) == (401, "invalid_client")
    assert response.headers["WWW-Authenticate"].startswith("Basic realm=")
    assert provider.stats().rejected_clients == 1
    asyncio.run(refresh_at(provider, tokens["refresh_token"]))  # the refused requests consumed no refresh token


GRANT = "grant_type=refresh_token"


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("refresh_token=x", "invalid_request"),
        ("grant_type=&refresh_token=x", "invalid_request"),
        (GRANT, "invalid_request"),
        (f"{GRANT}&refresh_token=x&refresh_token=x", "invalid_request"),
        (f"{GRANT}&refresh_token=x&state=1&state=2", "invalid_request"),
        (f"{GRANT}&refresh_token=x&client_secret=demo-secret", "invalid_request"),
        (f"{GRANT}&refresh_token=%ff", "invalid_request"),
        (b"\xff", "invalid_request"),
        ("&".join(f"{n}={n}" for n in range(101)), "invalid_request"),
        ("grant_type=password&username=a&password=b", "unsupported_grant_type"),
        (f"{GRANT}&refresh_token=x", "invalid_grant"),
    ],
)
def test_requests_with_bad_parameters_are_refused(http: httpx.Client, content: str | bytes, error: str) -> None:
    response = http.post("/token", content=content, headers={"Content-Type": FORM})
    assert outcome(response) == (400, error)


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "header"),
    [
        ("GET", "/token", {}, 405, ("Allow", "POST")),
        ("PUT", "/revoke", {}, 405, ("Allow", "POST")),
        ("POST", "/stats", {}, 405, ("Allow", "GET")),
        ("POST", "/", {}, 404, ("Cache-Control", "no-store")),
        ("POST", "/token", {"json": {}}, 415, ("Cache-Control", "no-store")),
        ("POST", "/token", {}, 415, ("Cache-Control", "no-store")),
        ("POST", "/token", {"data": {"refresh_token": "x" * 20_000}}, 413, ("Connection", "close")),
        ("POST", "/token", {"content": b"x" * 2_000_000}, 413, ("Connection", "close")),
        ("POST", "/token", {"content": iter([b"x"])}, 411, ("Connection", "close")),
        ("GET", "/" + "x" * 20_000, {}, 431, ("Connection", "close")),
        ("GET", "/resource", {}, 401, ("WWW-Authenticate", 'Bearer realm="tokenstore.testing"')),
    ],
)
def test_each_invalid_request_gets_its_http_status_and_header(
    http: httpx.Client, method: str, path: str, options: dict[str, Any], status: int, header: tuple[str, str]
) -> None:
    response = http.request(method, path, **options)
    assert outcome(response)[0] == status
    assert response.headers[header[0]] == header[1]
    assert http.get("/stats").status_code == 200


def test_a_bad_bearer_token_is_answered_with_invalid_token(http: httpx.Client) -> None:
    response = resource(http, "at_unknown")
    assert outcome(response) == (401, "invalid_token")
    assert 'error="invalid_token"' in response.headers["WWW-Authenticate"]


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"GET / HTTP/2\r\n\r\n",
        b"GET /stats HTTP/1.1\r\n\r\n",
        b"GET /stats HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /stats HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET /stats HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
        b"POST /token HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /token HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    ],
)
def test_malformed_http_is_answered_with_400(provider: StrictRotatingProvider, data: bytes) -> None:
    assert raw(provider, data).startswith(b"HTTP/1.1 400 Bad Request\r\n")


def test_incomplete_requests_get_no_response(provider: StrictRotatingProvider) -> None:
    assert raw(provider, b"") == raw(provider, b"GET /stats HTTP/1.1\r\nHost: a\r\n") == b""
    assert raw(provider, b"POST /token HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nshort") == b""
    assert provider.stats().requests == 0


def test_connections_stay_open_unless_the_client_asks_to_close(provider: StrictRotatingProvider) -> None:
    get = b"\r\nGET /stats?x=y HTTP/1.1\r\nHost: a\r\n"
    assert raw(provider, (get + b"\r\n") * 3).count(b"HTTP/1.1 200 OK") == 3
    assert raw(provider, (get + b"Connection: close\r\n\r\n") * 3).count(b"HTTP/1.1 200 OK") == 1
    assert raw(provider, b"GET /stats HTTP/1.0\r\n\r\n" * 3).count(b"HTTP/1.1 200 OK") == 1
    assert raw(provider, b"HEAD /stats HTTP/1.1\r\nHost: a\r\n\r\n").endswith(b"\r\n\r\n")
    expecting = b"POST /x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx"
    assert raw(provider, expecting).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\n")


def test_a_connection_serves_many_requests(provider: StrictRotatingProvider, http: httpx.Client) -> None:
    tokens = provider.new_grant("alice")
    ports = set()
    for _ in range(5):
        response = refresh(http, tokens["refresh_token"])
        ports.add(response.extensions["network_stream"].get_extra_info("client_addr"))
        tokens = response.json()
    assert len(ports) == 1


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=200))
def test_random_bytes_are_answered_with_400(target: StrictRotatingProvider, data: bytes) -> None:
    assert raw(target, data + b"\r\n\r\n").startswith(b"HTTP/1.1 400 ")


NAMES = st.sampled_from(["grant_type", "refresh_token", "scope", "token", "client_id", "client_secret"])
VALUES = st.sampled_from(["refresh_token", "demo-client", "demo-secret", ""]) | st.text(max_size=10)
FORMS = st.lists(st.tuples(NAMES | st.text(max_size=5), VALUES), max_size=6).map(urlencode).map(str.encode)
HEADERS = st.tuples(
    st.sampled_from(["Authorization", "Content-Type", "Connection", "Expect", "X-Any"]),
    st.sampled_from(
        [FORM, "Basic ZGVtby1jbGllbnQ6ZGVtby1zZWNyZXQ=", "Basic Og==", "Bearer at_", "close", "100-continue"]
    )
    | st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=20),
)


@settings(max_examples=100, deadline=None)
@given(
    method=st.sampled_from(["POST", "GET", "HEAD", "DELETE"]),
    path=st.sampled_from(["/token", "/revoke", "/resource", "/stats", "/token?x", "//", "/%00"]),
    headers=st.lists(HEADERS, max_size=4, unique_by=lambda header: header[0]),
    body=FORMS | st.binary(max_size=50),
)
def test_every_complete_request_is_answered(
    target: StrictRotatingProvider, method: str, path: str, headers: list[tuple[str, str]], body: bytes
) -> None:
    lines = [f"{method} {path} HTTP/1.1", "Host: a", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    answer = raw(target, "\r\n".join([*lines, "", ""]).encode("latin-1") + body)
    status = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").split()[1]
    assert status in {b"200", b"400", b"401", b"404", b"405", b"415"}
    assert target.stats().in_flight == 0
