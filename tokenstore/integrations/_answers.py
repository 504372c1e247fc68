"""Reads and parses the response of a token endpoint. The endpoint is not trusted: everything has a limit."""

from __future__ import annotations

import json
import re
import zlib
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import parse_qsl

if TYPE_CHECKING:
    import httpx

FORM: Final = "application/x-www-form-urlencoded"
MAX_BYTES: Final = 1024 * 1024
"""The longest response, decompressed. Usual responses have a few KiB, and a JWT may have 64."""

_MAX_RETRY_AFTER: Final = 3600.0


class Answer(NamedTuple):
    """A response, decompressed."""

    status: int
    headers: httpx.Headers
    body: bytes


class NoAnswer(NamedTuple):
    """Why there is no response.

    Attributes:
        code: A short name.
        why: Completes a sentence about the endpoint.
        sent: Whether the request may have reached the endpoint.
        repeatable: Whether a second attempt may succeed.
    """

    code: str
    why: str
    sent: bool = True
    repeatable: bool = False


async def read_answer(response: httpx.Response) -> Answer | NoAnswer:
    """Read a streamed response of at most :data:`MAX_BYTES`, whatever its headers say about its length."""
    too_long = NoAnswer("invalid_response", f"answered with more than {MAX_BYTES} bytes")
    unreadable = NoAnswer("invalid_response", "answered in a coding that was not asked for")
    body = bytearray()
    raw: Any = response.aiter_raw()  # a generator, although httpx's types do not say so
    async with aclosing(raw) as chunks:
        async for chunk in chunks:
            body += chunk
            if len(body) > MAX_BYTES:
                return too_long
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if coding in ("gzip", "x-gzip", "deflate"):
        inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # recognizes both formats by their header
        try:
            body = bytearray(inflater.decompress(body, MAX_BYTES + 1))
        except zlib.error:
            return unreadable
        if len(body) > MAX_BYTES:
            return too_long
    elif coding not in ("", "identity"):
        return unreadable
    return Answer(response.status_code, response.headers, bytes(body))


def fields_of(answer: Answer) -> dict[str, Any]:
    """The fields of a response that is a JSON object or a form; otherwise none."""
    with suppress(ValueError, RecursionError):
        value = json.loads(answer.body)
        return value if isinstance(value, dict) else {}
    if answer.headers.get("Content-Type", "").partition(";")[0].strip().lower() == FORM:
        with suppress(ValueError):
            return dict(parse_qsl(answer.body.decode(), errors="strict", max_num_fields=1000))
    return {}


def retry_after(headers: httpx.Headers) -> float | None:
    """The seconds of Retry-After (RFC 9110 section 10.2.3), at most an hour; None if missing or unreadable."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+", value):
        return min(float(value), _MAX_RETRY_AFTER)
    if (due := _http_date(value)) is None:
        return None
    # By the server's clock, if the response states it.
    now = _http_date(headers.get("Date", "")) or datetime.now(UTC)
    return min(max((due - now).total_seconds(), 0.0), _MAX_RETRY_AFTER)


def _http_date(value: str) -> datetime | None:
    with suppress(ValueError, TypeError, IndexError, OverflowError):
        date = parsedate_to_datetime(value)
        return date if date.tzinfo else date.replace(tzinfo=UTC)
    return None
