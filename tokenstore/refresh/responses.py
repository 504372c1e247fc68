"""Reads a token response (RFC 6749 section 5.1): its tokens, its times, and the fields that are kept beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from tokenstore.errors import InvalidInputError
from tokenstore.records import MAX_EXTRA_DEPTH, TokenRecord
from tokenstore.refresh.error_codes import error_codes, error_for_codes
from tokenstore.validation import extra_json, optional_epoch_us, plain_text, to_epoch_us, token_text, too_deep

__all__ = [
    "ACCESS_TOKEN_EXPIRY",
    "REFRESH_TOKEN_EXPIRY",
    "ExpiryFields",
    "NewTokens",
    "issued_access_token",
    "lifetime_of",
    "read_expiry",
    "read_response",
]

_US = 1_000_000
_NUMBER = re.compile(r"\d+(\.\d*)?", re.ASCII)
_LONGEST = 1e10  # seconds: over three centuries, as a duration and since the epoch
_MILLISECONDS = 1e11  # a time of this size and above is not in seconds: that would be after the year 5000
_GO_ZERO_TIME: Final = "0001-01-01T00:00:00Z"  # what Go's encoding/json writes for a token that does not expire
_TOKENS: Final = frozenset({"access_token", "refresh_token"})


@dataclass(frozen=True, slots=True)
class ExpiryFields:
    """The fields of a response that say when a token expires. Of several, the first readable one counts.

    Attributes:
        lifetimes: The fields with the lifetime in seconds.
        moments: The fields with the time of expiry.
        zero_is_unknown: Whether a lifetime of zero or less says nothing. Providers send 0 or -1 for refresh tokens that
            do not expire, or whose expiry they do not know.
    """

    lifetimes: tuple[str, ...]
    moments: tuple[str, ...]
    zero_is_unknown: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All of these fields."""
        return self.lifetimes + self.moments


ACCESS_TOKEN_EXPIRY: Final = ExpiryFields(
    ("expires_in",),
    # Besides the usual ones: Microsoft's version 1 endpoints, Google's library for Node.js (milliseconds), Go's oauth2.
    ("expires_at", "access_token_expires_at", "expires_on", "expiry_date", "expiry"),
)
"""The fields with the expiry of the access token."""

REFRESH_TOKEN_EXPIRY: Final = ExpiryFields(
    # Besides the usual one: Keycloak, Intuit.
    ("refresh_token_expires_in", "refresh_expires_in", "x_refresh_token_expires_in"),
    ("refresh_token_expires_at",),
    zero_is_unknown=True,
)
"""The fields with the expiry of the refresh token."""

_EXPIRIES: Final = frozenset(ACCESS_TOKEN_EXPIRY.names + REFRESH_TOKEN_EXPIRY.names)
_LIFETIME: Final = ACCESS_TOKEN_EXPIRY.lifetimes[0]


@dataclass(frozen=True, slots=True, repr=False)
class NewTokens:
    """A token response, checked, and completed from the row that it renews.

    Attributes:
        access_token: The new access token.
        refresh_token: The new refresh token, or the one that was used if the response has none (RFC 6749 section 6).
        extra: The JSON of the row's further fields, as :func:`tokenstore.validation.extra_json` makes it.
        access_token_expires_at: Microseconds since the epoch, or None for "never".
        refresh_token_expires_at: Microseconds since the epoch, or None for "never".
    """

    access_token: str
    refresh_token: str | None
    extra: str | None
    access_token_expires_at: int | None
    refresh_token_expires_at: int | None


def read_response(response: object, record: TokenRecord, issued_at: int) -> NewTokens:
    """Read a refresher's token response. An unreadable field must not lose the tokens, except the access token itself.

    Known fields: ``access_token``; ``refresh_token``; and those of :data:`ACCESS_TOKEN_EXPIRY` and
    :data:`REFRESH_TOKEN_EXPIRY`, which hold seconds or a time (a datetime, ISO 8601, or seconds or milliseconds since
    the epoch). All other fields, and ``expires_in``, are stored in ``extra`` and replace earlier values there. A token
    without an expiry never expires. An access token with an unreadable one counts as expired. A refresh token with an
    unreadable one, or one that has passed already, counts as one without: if it has expired, the provider says so.

    Args:
        response: What a ``refresh`` callable returned.
        record: The record that the callable was called with.
        issued_at: When the provider was called: microseconds since the epoch, by the database's clock.

    Raises:
        InvalidInputError: The response is not a mapping, or has no acceptable access token.
        RefreshError: It has none, but an error code of RFC 6749, as MSAL returns one.
    """
    if not isinstance(response, Mapping):
        raise InvalidInputError(f"a token response must be a mapping, not {type(response).__name__}")
    try:
        access_token = issued_access_token(response)
    except InvalidInputError as unfit:
        raise (error_for_codes(error_codes(response)) or unfit) from None
    refresh_token, refresh_token_expires_at = _refresh_token(response, record, issued_at)
    return NewTokens(
        access_token,
        refresh_token,
        _extra(response, record),
        _access_token_expiry(response, issued_at),
        refresh_token_expires_at,
    )


def issued_access_token(response: Mapping[str, Any]) -> str:
    """A response's access token, without line ends and tabs around it.

    Raises:
        InvalidInputError: There is none that can be sent in a header.
    """
    return token_text("access_token", _trimmed(response.get("access_token")))


def read_expiry(response: Mapping[str, Any], fields: ExpiryFields, issued_at: int, *, fresh: bool) -> int | None:
    """Read when a token of a response expires.

    Args:
        response: The token response.
        fields: The fields to read.
        issued_at: The start of the lifetime: microseconds since the epoch.
        fresh: Whether the response was received at ``issued_at``. Then the lifetime is read first, because it does not
            depend on another machine's clock, and a negative one is zero. A response that may be older, such as one
            from a file, has a lifetime that began at an unknown time: then the time of expiry is read first, and a
            negative lifetime is refused. Numbers that are too large are cut to the largest possible one.

    Returns:
        Microseconds since the epoch, or None for "never". With nothing but blank fields an access token has expired.

    Raises:
        InvalidInputError: There are fields, and none is readable.
    """
    blank, problem = False, None
    for name in fields.names if fresh else fields.moments + fields.lifetimes:
        value = response.get(name)
        if isinstance(value, str) and not value.strip():
            blank = True
            continue
        if value is None or (isinstance(value, str) and value == _GO_ZERO_TIME):
            continue
        is_lifetime = name in fields.lifetimes
        try:
            if is_lifetime:
                expires_at = issued_at + round(_number(value, negative=fresh or fields.zero_is_unknown) * _US)
            else:
                expires_at = _moment(name, value)
        except (InvalidInputError, OverflowError, ValueError, OSError):
            problem = problem or f"{name} must be {'a number of seconds' if is_lifetime else 'ISO 8601 or Unix time'}"
            continue
        # A time that has passed does say something if the response may be old, unless it is the epoch itself.
        if not fields.zero_is_unknown or expires_at > (issued_at if fresh or is_lifetime else 0):
            return expires_at
    if problem is not None:
        raise InvalidInputError(problem)  # outside the handlers: the context could show a token in the wrong field
    return issued_at if blank and not fields.zero_is_unknown else None


def lifetime_of(record: TokenRecord) -> float | None:
    """The lifetime of a record's access token when it was issued, in seconds; None if no response has stated it."""
    return _lifetime(record["extra"].get(_LIFETIME))


def _refresh_token(response: Mapping[str, Any], record: TokenRecord, issued_at: int) -> tuple[str | None, int | None]:
    expires_at = None
    with suppress(InvalidInputError):
        expires_at = read_expiry(response, REFRESH_TOKEN_EXPIRY, issued_at, fresh=True)
    with suppress(InvalidInputError):
        # With any characters: it is sent in a form, which can carry them, and the old one may no longer work.
        return plain_text("refresh_token", _trimmed(response.get("refresh_token"))), expires_at
    if expires_at is None:
        expires_at = optional_epoch_us("refresh_token_expires_at", record["refresh_token_expires_at"])
    return record["refresh_token"], expires_at


def _trimmed(token: object) -> object:
    """A token without line ends and tabs around it, which no token has, but the last field of a text response may."""
    return token.strip("\t\r\n") if isinstance(token, str) else token


def _access_token_expiry(response: Mapping[str, Any], issued_at: int) -> int | None:
    try:
        return read_expiry(response, ACCESS_TOKEN_EXPIRY, issued_at, fresh=True)
    except InvalidInputError:
        return issued_at


def _lifetime(value: object) -> float | None:
    try:
        return None if value is None else _number(value, negative=True)
    except (InvalidInputError, ValueError):
        return None


def _moment(name: str, value: object) -> int:
    """A time of expiry in microseconds since the epoch."""
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        value = datetime.fromisoformat(value.strip())
    if isinstance(value, datetime):
        return to_epoch_us(name, value)
    number = _finite(value)
    for _ in range(3):  # milliseconds, microseconds, nanoseconds
        if number >= _MILLISECONDS:
            number /= 1000
    return to_epoch_us(name, datetime.fromtimestamp(min(max(number, 0.0), _LONGEST), UTC))


def _number(value: object, *, negative: bool) -> float:
    """A number of seconds; ``negative``: whether one below zero is zero, and not unreadable."""
    number = _finite(value)
    if number < 0 and not negative:
        raise InvalidInputError("not a possible number of seconds")
    return min(max(number, 0.0), _LONGEST)


def _finite(value: object) -> float:
    """A number; some providers send text, against the RFC."""
    if isinstance(value, str):
        value = float(value)  # may raise ValueError
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or (isinstance(value, float) and math.isnan(value))
    ):
        raise InvalidInputError("not a number")
    return float(min(max(value, -1e30), 1e30))


def _extra(response: Mapping[str, Any], record: TokenRecord) -> str | None:
    """The further fields of response and record. Where they cannot be stored together, fewer of them."""
    known = {name: value for name, value in record["extra"].items() if name not in _EXPIRIES}
    stated = _lifetime(response.get(_LIFETIME))
    lifetime = {} if stated is None else {_LIFETIME: stated}
    new = {
        name: value
        for name, value in response.items()
        if name not in _TOKENS | _EXPIRIES and not too_deep(value, MAX_EXTRA_DEPTH - 1)
    }
    for extra in ({**known, **new, **lifetime}, {**known, **lifetime}, known):
        try:
            return extra_json(extra)
        except InvalidInputError:
            continue
    return None
