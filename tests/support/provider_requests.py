"""Valid and malformed requests to a StrictRotatingProvider, and a clock for it."""

from __future__ import annotations

import socket
from typing import Any
from urllib.parse import urlsplit

import httpx

from tokenstore.testing.provider import StrictRotatingProvider, refresh_over_http

FORM = "application/x-www-form-urlencoded"


class Clock:
    now = 1_700_000_000.25

    def __call__(self) -> float:
        return self.now


def refresh(http: httpx.Client, refresh_token: str, **extra: str) -> httpx.Response:
    return http.post("/token", data={"grant_type": "refresh_token", "refresh_token": refresh_token, **extra})


def resource(http: httpx.Client, access_token: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {access_token}"}
    return http.get("/resource", headers=headers, auth=None)


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
