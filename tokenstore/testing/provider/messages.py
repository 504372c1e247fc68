"""HTTP/1.x requests and responses (RFC 9112), as far as the strict provider needs them."""

from __future__ import annotations

import asyncio
import json
import re
from base64 import b64decode
from dataclasses import dataclass, field
from email.utils import formatdate
from http.client import responses
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote_plus

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MAX_BYTES", "HttpError", "Reply", "Request", "credentials", "parameters", "read_request", "required"]

MAX_BYTES = 16 * 1024
"""The limit of a request's head, and of its body. A real token request has under 4 KiB."""

_REQUEST_LINE = re.compile(r"([A-Z]+) (/[!-~]*) HTTP/1\.([01])")
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\r\n\0]*)")
_SINGULAR = frozenset({"authorization", "content-length", "content-type", "dpop", "host"})


@dataclass(frozen=True, slots=True)
class Request:
    """One request; ``path`` is without the query."""

    method: str
    path: str
    query: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    keep_alive: bool
    body: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Reply:
    """One response; ``body`` is sent as JSON."""

    status: int
    body: Mapping[str, Any] | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)

    def encode(self, *, now: float, head_only: bool, keep_alive: bool) -> bytes:
        """The response as it is sent; ``now``: seconds since the epoch, for the header ``Date``."""
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


class HttpError(Exception):
    """A request is refused with an OAuth error (RFC 6749 section 5.2); ``fields`` is the body of ``reply``."""

    def __init__(self, status: int, error: str, description: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, error, description, headers)  # all in `args`, so that the error can be pickled
        self.fields = {"error": error, "error_description": description}
        self.reply = Reply(status, self.fields, headers or {})


def parameters(encoded: bytes | str) -> dict[str, str]:
    """The parameters of a form or a query, each of them given once (RFC 6749 section 3.1).

    Raises:
        HttpError: They cannot be read.
    """
    try:
        text = encoded if isinstance(encoded, str) else encoded.decode()
        # parse_qsl drops parameters without a value, which count as omitted (RFC 6749 section 3.2).
        pairs = parse_qsl(text, errors="strict", max_num_fields=100)
    except ValueError:
        raise HttpError(400, "invalid_request", "malformed parameters") from None
    found = dict(pairs)
    if len(found) < len(pairs):
        raise HttpError(400, "invalid_request", "a parameter is repeated")
    return found


def required(form: Mapping[str, str], name: str) -> str:
    """A parameter's value. Raises HttpError if it is missing."""
    if name not in form:
        raise HttpError(400, "invalid_request", f"{name} is missing")
    return form[name]


def credentials(header: str | None, form: Mapping[str, str]) -> tuple[str, str]:
    """Return the client's id and secret (RFC 6749 section 2.3.1).

    Raises:
        ValueError: The request does not contain them.
    """
    if header is None:
        return form.get("client_id", ""), form.get("client_secret", "")
    if "client_secret" in form:  # RFC 6749 section 2.3 allows one method
        raise HttpError(400, "invalid_request", "more than one client authentication")
    scheme, _, encoded = header.partition(" ")
    client_id, _, secret = (
        unquote_plus(part, errors="strict")
        for part in b64decode(encoded.strip(), validate=True).decode().partition(":")
    )
    if scheme.lower() != "basic" or form.get("client_id", client_id) != client_id:
        raise ValueError("the scheme is not Basic, or the body names another client_id")
    return client_id, secret


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request:
    """Read one HTTP/1.x request (RFC 9112) of known, limited length.

    Raises:
        HttpError: It is not such a request.
    """
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise HttpError(431, "invalid_request", "the head is too long") from None
    first, *lines = head.decode("latin-1").strip("\r\n").split("\r\n")
    start = _REQUEST_LINE.fullmatch(first)
    if start is None:
        raise HttpError(400, "invalid_request", "not an HTTP/1.x request")
    headers: dict[str, str] = {}
    for line in lines:
        name, value = parsed.groups() if (parsed := _FIELD.fullmatch(line)) else ("", "")
        name = name.lower()
        if not name or (name in _SINGULAR and name in headers):
            raise HttpError(400, "invalid_request", "malformed or repeated header")
        headers[name] = value.strip(" \t")
    method, target, minor = start.groups()
    if minor == "1" and "host" not in headers:
        raise HttpError(400, "invalid_request", "Host is missing")
    if "transfer-encoding" in headers:
        raise HttpError(411, "invalid_request", "send the body with a Content-Length")
    length = headers.get("content-length", "0")
    if not re.fullmatch(r"[0-9]{1,18}", length):
        raise HttpError(400, "invalid_request", "malformed Content-Length")
    if int(length) > MAX_BYTES:
        raise HttpError(413, "invalid_request", "the body is too long")
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = await reader.readexactly(int(length))
    keep_alive = minor == "1" and headers.get("connection", "").lower() != "close"
    path, _, query = target.partition("?")
    return Request(method, path, query, headers, keep_alive, body)
