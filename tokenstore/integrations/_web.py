"""What a web application answers when a user has no fresh token: the one rule of the web frameworks' adapters."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from tokenstore.errors import (
    BackendUnavailableError,
    ConflictError,
    InsufficientScopeError,
    LockTimeoutError,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    RefreshError,
    RefreshTimeoutError,
    TokensMissingError,
    TokensNotStoredError,
    TokenStoreError,
)

__all__ = ["LOGIN_ERRORS", "OUTAGE_ERRORS", "Answer", "login_answer", "outage_answer", "shows_a_page"]

_LOGGER = logging.getLogger("tokenstore.web")

LOGIN_ERRORS = (InsufficientScopeError, ReauthorizationRequiredError, TokensMissingError)
"""The errors after which the user has to log in at the provider."""

OUTAGE_ERRORS = (
    BackendUnavailableError,
    ConflictError,
    LockTimeoutError,
    ProviderRefusedError,
    ProviderUnavailableError,
    RefreshTimeoutError,
    TokensNotStoredError,
)
"""The errors that end without the user: the provider, or the database, cannot serve now."""

# Seconds. For an error that does not tell when the next attempt has a chance.
_RETRY_AFTER = 1


class Answer(NamedTuple):
    """An HTTP response, as far as the frameworks do not differ.

    No part of it names the user or has an error's message, which is for operators.
    """

    status: int
    headers: Mapping[str, str]
    body: Mapping[str, str]
    """A JSON object; a redirect sends none. ``error`` is the error's code, ``provider`` the row's provider."""


def shows_a_page(method: str, header: Callable[[str], str | None]) -> bool:
    """Whether a browser shows the response to this request as a page, and follows a redirect to another page.

    The header ``Sec-Fetch-Mode`` tells, which no script can set. Without it, as from old browsers and over plain http,
    the header ``Accept`` tells: browsers list ``text/html`` for a page, and not for a script's request.

    Args:
        method: The request's method. Only GET and HEAD count: a redirect would lose what a posted form contains.
        header: Returns a header of the request, of any case, or None.
    """
    if method not in ("GET", "HEAD"):
        return False
    if (mode := header("Sec-Fetch-Mode")) is not None:
        return mode == "navigate"
    if (header("X-Requested-With") or "").lower() == "xmlhttprequest":
        return False
    accepted = _qualities(header("Accept") or "")
    html = accepted.get("text/html", 0.0)
    return html > 0 and html >= accepted.get("application/json", 0.0)


def _qualities(accept: str) -> dict[str, float]:
    """The media ranges of the header ``Accept`` (RFC 9110 section 12.5.1), in lower case, each with its quality."""
    qualities = {}
    for part in accept.split(","):
        media_range, *parameters = (text.strip().lower() for text in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name == "q":
                # RFC 9110 section 12.4.2. Anything else in its place must not make a type the preferred one.
                quality = float(value) if re.fullmatch(r"[01](\.\d{0,3})?", value, re.ASCII) else 0.0
        qualities[media_range] = quality
    return qualities


def login_answer(error: RefreshError, login_url: str | None, *, redirect: bool) -> Answer:
    """Answer one of :data:`LOGIN_ERRORS`.

    Args:
        error: The error.
        login_url: Where the user logs in at the provider, or None if the application names no place.
        redirect: Whether the client is a browser that shows the response as a page: :func:`shows_a_page`.

    Returns:
        303 (See Other, RFC 9110 section 15.4.4) to ``login_url`` if it is known and ``redirect`` is true. Else 401 with
        the challenge that RFC 9110 section 11.6.1 requires; its scheme is one that no browser asks a password for.
    """
    if login_url is not None and redirect:
        return Answer(303, {"Location": login_url, "Cache-Control": "no-store"}, {})
    body = _body(error, "The user has to log in at the provider again.")
    if login_url is not None:
        body["login_url"] = login_url
    headers = {"WWW-Authenticate": "ProviderLogin", "Cache-Control": "no-store"}
    return Answer(401, headers, body)


def outage_answer(error: TokenStoreError) -> Answer:
    """Answer one of :data:`OUTAGE_ERRORS`: 503, with the whole seconds after which a client may repeat its request.

    The error is logged as a warning: a framework logs no error that has a handler, and the body does not say it.
    """
    _LOGGER.warning("%s: %s", type(error).__name__, error)
    retry_after = getattr(error, "retry_after", None)
    seconds = _RETRY_AFTER if retry_after is None else max(_RETRY_AFTER, math.ceil(retry_after))
    body = _body(error, "The service is not available for a moment.")
    return Answer(503, {"Retry-After": str(seconds), "Cache-Control": "no-store"}, body)


def _body(error: TokenStoreError, detail: str) -> dict[str, str]:
    if not isinstance(error, RefreshError):
        return {"error": "temporarily_unavailable", "detail": detail}
    body = {"error": error.code, "detail": detail}
    if error.provider is not None:
        body["provider"] = error.provider
    return body
