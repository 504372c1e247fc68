"""Reads a token response (RFC 6749 section 5.1): its tokens, its times, and the fields that are kept beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from tokenstore.errors import InvalidInputError
from tokenstore.records import MAX_EXTRA_DEPTH, TokenRecord
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
_TOKENS: Final = frozenset({"access_token", "refresh_token"})


@dataclass(frozen=True, slots=True)
class ExpiryFields:
    """The fields of a response that say when a token expires.

    Attributes:
        lifetime: The field with the lifetime in seconds.
        moments: The fields with the time of expiry; the first one that is present counts.
    """

    lifetime: str
    moments: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of these fields."""
        return (self.lifetime, *self.moments)


ACCESS_TOKEN_EXPIRY: Final = ExpiryFields("expires_in", ("expires_at", "access_token_expires_at"))
"""The fields with the expiry of the access token."""

REFRESH_TOKEN_EXPIRY: Final = ExpiryFields("refresh_token_expires_in", ("refresh_token_expires_at",))
"""The fields with the expiry of the refresh token."""

_EXPIRIES: Final = frozenset(ACCESS_TOKEN_EXPIRY.names + REFRESH_TOKEN_EXPIRY.names)


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

    Known fields: ``access_token``; ``refresh_token``; ``expires_in`` and ``refresh_token_expires_in`` (seconds);
    ``expires_at`` or ``access_token_expires_at``, and ``refresh_token_expires_at`` (a datetime, ISO 8601, or seconds
    since the epoch). All other fields, and ``expires_in``, are stored in ``extra`` and replace earlier values there. A
    token without an expiry never expires; a token with an unreadable one counts as expired.

    Args:
        response: What a ``refresh`` callable returned.
        record: The record that the callable was called with.
        issued_at: When the provider was called: microseconds since the epoch, by the database's clock.

    Raises:
        InvalidInputError: The response is not a mapping, or has no acceptable access token.
    """
    if not isinstance(response, Mapping):
        raise InvalidInputError(f"a token response must be a mapping, not {type(response).__name__}")
    access_token = issued_access_token(response)
    refresh_token, refresh_token_expires_at = _refresh_token(response, record, issued_at)
    return NewTokens(
        access_token,
        refresh_token,
        _extra(response, record),
        _expiry(response, ACCESS_TOKEN_EXPIRY, issued_at),
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
            depend on another machine's clock; and numbers that are too small or too large are cut to the nearest
            possible one. A response that may be older, such as one from a file, has a lifetime that began at an unknown
            time: then the time of expiry is read first, and such numbers are refused.

    Returns:
        Microseconds since the epoch, or None for "never".

    Raises:
        InvalidInputError: The field is not readable.
    """
    lifetime = response.get(fields.lifetime)
    name, moment = next(
        ((name, response[name]) for name in fields.moments if response.get(name) is not None), (fields.moments[0], None)
    )
    if lifetime is not None and (fresh or moment is None):
        try:
            return issued_at + round(_number(lifetime, clamp=fresh) * _US)
        except (InvalidInputError, OverflowError, ValueError):
            problem = f"{fields.lifetime} must be a number of seconds"
    elif moment is None:
        return None
    else:
        try:
            if isinstance(moment, str) and not _NUMBER.fullmatch(moment):
                moment = datetime.fromisoformat(moment)
            elif not isinstance(moment, datetime):
                moment = datetime.fromtimestamp(_number(moment, clamp=fresh), UTC)
            return to_epoch_us(name, moment)
        except (InvalidInputError, OverflowError, ValueError, OSError):
            problem = f"{name} must be ISO 8601 or Unix time"
    raise InvalidInputError(problem)  # outside the handlers: the context could show a token in the wrong field


def lifetime_of(record: TokenRecord) -> float | None:
    """The lifetime of a record's access token when it was issued, in seconds; None if no response has stated it."""
    return _lifetime(record["extra"].get(ACCESS_TOKEN_EXPIRY.lifetime))


def _refresh_token(response: Mapping[str, Any], record: TokenRecord, issued_at: int) -> tuple[str | None, int | None]:
    token: str | None
    try:
        # With any characters: it is sent in a form, which can carry them, and the old one may no longer work.
        token = plain_text("refresh_token", _trimmed(response.get("refresh_token")))
    except InvalidInputError:
        token = record["refresh_token"]
        if all(response.get(name) is None for name in REFRESH_TOKEN_EXPIRY.names):
            return token, optional_epoch_us("refresh_token_expires_at", record["refresh_token_expires_at"])
    return token, _expiry(response, REFRESH_TOKEN_EXPIRY, issued_at)


def _trimmed(token: object) -> object:
    """A token without line ends and tabs around it, which no token has, but the last field of a text response may."""
    return token.strip("\t\r\n") if isinstance(token, str) else token


def _expiry(response: Mapping[str, Any], fields: ExpiryFields, issued_at: int) -> int | None:
    try:
        return read_expiry(response, fields, issued_at, fresh=True)
    except InvalidInputError:
        return issued_at


def _lifetime(value: object) -> float | None:
    try:
        return None if value is None else _number(value, clamp=True)
    except (InvalidInputError, OverflowError, ValueError):
        return None


def _number(value: object, *, clamp: bool) -> float:
    """A number of seconds; some providers send text, against the RFC."""
    if isinstance(value, str):
        value = float(value)  # may raise ValueError
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise InvalidInputError("not a number of seconds")
    number = min(max(float(value), 0.0), _LONGEST)
    if number != value and not clamp:
        raise InvalidInputError("not a possible number of seconds")
    return number


def _extra(response: Mapping[str, Any], record: TokenRecord) -> str | None:
    """The further fields of response and record. Where they cannot be stored together, fewer of them."""
    known = {name: value for name, value in record["extra"].items() if name not in _EXPIRIES}
    stated = _lifetime(response.get(ACCESS_TOKEN_EXPIRY.lifetime))
    lifetime = {} if stated is None else {ACCESS_TOKEN_EXPIRY.lifetime: stated}
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
