"""Valid and malformed requests to a StrictRotatingProvider, and a clock for it."""

from __future__ import annotations

import socket
from base64 import urlsafe_b64encode
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx

from tokenstore.testing.provider import StrictRotatingProvider, refresh_over_http

FORM = "application/x-www-form-urlencoded"
CALLBACK = "https://app.example.com/callback?from=login"
VERIFIER = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"  # of RFC 7636, appendix B
CHALLENGE = urlsafe_b64encode(sha256(VERIFIER.encode()).digest()).decode().rstrip("=")


class Clock:
    now = 1_700_000_000.25

    def __call__(self) -> float:
        return self.now


def refresh(http: httpx.Client, refresh_token: str, **extra: str) -> httpx.Response:
    return http.post("/token", data={"grant_type": "refresh_token", "refresh_token": refresh_token, **extra})


def resource(http: httpx.Client, access_token: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {access_token}"}
    return http.get("/resource", headers=headers, auth=None)


def authorize(http: httpx.Client, **changes: str | None) -> httpx.Response:
    """Send a valid authorization request, with these parameters changed; None leaves one out."""
    valid: dict[str, str | None] = {
        "response_type": "code",
        "client_id": "demo-client",
        "redirect_uri": CALLBACK,
        "state": "s t&1",
        "code_challenge": CHALLENGE,
        "code_challenge_method": "S256",
        "login_hint": "alice",
    }
    given = {name: value for name, value in {**valid, **changes}.items() if value is not None}
    return http.get("/authorize", params=given, auth=None)


def redirected(response: httpx.Response) -> dict[str, str]:
    """The parameters that a redirect adds to the callback's."""
    assert (response.status_code, response.content) == (302, b"")
    location = response.headers["Location"]
    assert location.startswith(CALLBACK + "&")
    return {name: value for name, [value] in parse_qs(location.removeprefix(CALLBACK + "&")).items()}


def redeem(http: httpx.Client, code: str, /, **changes: str) -> httpx.Response:
    """Exchange a code for tokens, with these parameters changed."""
    valid = {"grant_type": "authorization_code", "redirect_uri": CALLBACK, "code_verifier": VERIFIER, "code": code}
    return http.post("/token", data={**valid, **changes})


def outcome(response: httpx.Response) -> tuple[int, str]:
    """Return the status and the error code of a refusal, and check the form of the response."""
    body = response.json()
    assert set(body) == {"error", "error_description"}
    assert response.headers["Cache-Control"] == "no-store"
    return response.status_code, body["error"]


def raw(provider: StrictRotatingProvider, data: bytes) -> bytes:
    """Send ``data`` and the end of the stream; return the complete response."""
    with socket.create_connection(("127.0.0.1", urlsplit(provider.base_url).port or 0), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


async def refresh_at(provider: StrictRotatingProvider, refresh_token: str) -> dict[str, Any]:
    return await refresh_over_http(
        provider.token_url, refresh_token, client_id=provider.client_id, client_secret=provider.client_secret
    )
