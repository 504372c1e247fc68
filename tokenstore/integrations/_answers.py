"""Reads the response of a token endpoint. The endpoint is not trusted: everything has a limit."""

from __future__ import annotations

import re
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tokenstore.integrations._bodies import json_object, parsed
from tokenstore.integrations._codings import decompressed, unread

if TYPE_CHECKING:
    import httpx

MAX_BYTES: Final = 1024 * 1024
"""The longest response, decompressed. Usual responses have a few KiB, and a JWT may have 64."""

_MAX_RETRY_AFTER: Final = 3600.0


class Answer(NamedTuple):
    """A response.

    Attributes:
        status: The HTTP status.
        headers: The headers.
        value: The value of the body: JSON's, a form's fields, or None.
        unread: What to say of a body whose compression could not be undone; empty for any other body.
    """

    status: int
    headers: httpx.Headers
    value: Any
    unread: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the body; none if it is neither a JSON object nor a form."""
        return self.value if isinstance(self.value, dict) else {}


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


class Arrival:
    """What has arrived of one response."""

    def __init__(self) -> None:
        self._response: httpx.Response | None = None
        self._body = bytearray()

    async def read(self, response: httpx.Response) -> Answer | NoAnswer:
        """Read a streamed response of at most :data:`MAX_BYTES`, whatever its headers say about its length."""
        self._response = response
        raw: Any = response.aiter_raw()  # a generator, although httpx's types do not say so
        async with aclosing(raw) as chunks:
            async for chunk in chunks:
                self._body += chunk
                if len(self._body) > MAX_BYTES:
                    return _TOO_LONG
        return self._answer(response, whole=True)

    def salvaged(self) -> Answer | None:
        """The response if its body is complete, although the endpoint announced more of it and never sent it."""
        if self._response is None or not json_object(bytes(self._body[: MAX_BYTES + 1])):
            return None
        answer = self._answer(self._response, whole=False)
        return answer if isinstance(answer, Answer) else None

    def _answer(self, response: httpx.Response, *, whole: bool) -> Answer | NoAnswer:
        coding = response.headers.get("Content-Encoding", "")
        body, ended = decompressed(bytes(self._body), coding, MAX_BYTES)
        if len(body) > MAX_BYTES:
            return _TOO_LONG
        value = parsed(body, response.headers.get("Content-Type", ""), whole=whole and ended)
        illegible = unread(coding) if self._body and value is None else ""
        return Answer(response.status_code, response.headers, value, illegible)


_TOO_LONG: Final = NoAnswer("invalid_response", f"answered with more than {MAX_BYTES} bytes")


def retry_after(headers: httpx.Headers) -> float | None:
    """The seconds of Retry-After (RFC 9110 section 10.2.3), at most an hour; None if missing or unreadable."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", value):  # some providers send fractions, against the RFC
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
