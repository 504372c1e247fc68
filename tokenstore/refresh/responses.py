"""What a token response (RFC 6749 section 5.1) means for the row that it renews."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from tokenstore.errors import InvalidInputError
from tokenstore.records import TokenRecord
from tokenstore.validation import extra_json, optional_epoch_us, to_epoch_us, token_text

__all__ = ["NewTokens", "lifetime_of", "read_response"]

_US = 1_000_000
_NUMBER = re.compile(r"\d+(\.\d*)?", re.ASCII)
_LONGEST = 1e10  # seconds: over three centuries, as a duration and since the epoch
_LIFETIME: Final = "expires_in"
_TOKENS: Final = frozenset({"access_token", "refresh_token"})
_EXPIRIES: Final = frozenset(
    {"expires_in", "expires_at", "access_token_expires_at", "refresh_token_expires_in", "refresh_token_expires_at"}
)


@dataclass(frozen=True, slots=True, repr=False)
class NewTokens:
    """A token response, checked and completed from the row that it renews.

    Attributes:
        access_token: The new one.
        refresh_token: The new one, or where the provider sent none, the one that was used (RFC 6749 section 6).
        extra: The JSON of what else is known, as :func:`tokenstore.records.extra_json` makes it.
        access_token_expires_at: Microseconds since the epoch, or None for "never".
        refresh_token_expires_at: Likewise.
    """

    access_token: str
    refresh_token: str | None
    extra: str | None
    access_token_expires_at: int | None
    refresh_token_expires_at: int | None


def read_response(response: object, record: TokenRecord, issued_at: int) -> NewTokens:
    """Read a token response. Without an access token it is none; whatever else is wrong with it must lose no token.

    Known fields: ``access_token``; ``refresh_token``; ``expires_in`` and ``refresh_token_expires_in`` (seconds);
    ``expires_at`` or ``access_token_expires_at``, and ``refresh_token_expires_at`` (a datetime, ISO 8601, or seconds
    since the epoch). Every other field goes to ``extra``, over what is there, as does ``expires_in``. An access token
    that comes without an expiry never expires; one with an unreadable expiry is as good as expired.

    Args:
        response: What a ``refresh`` callable returned.
        record: What it was given.
        issued_at: When the provider was asked: microseconds since the epoch, on the database's clock.

    Raises:
        InvalidInputError: It is no mapping, or has no acceptable access token.
    """
    if not isinstance(response, Mapping):
        raise InvalidInputError(f"a token response must be a mapping, not {type(response).__name__}")
    access_token = token_text("access_token", response.get("access_token"))
    refresh_token, refresh_token_expires_at = _refresh_token(response, record, issued_at)
    expires_at = response.get("expires_at")
    if expires_at is None:
        expires_at = response.get("access_token_expires_at")
    return NewTokens(
        access_token,
        refresh_token,
        _extra(response, record),
        _expiry(response.get(_LIFETIME), expires_at, issued_at),
        refresh_token_expires_at,
    )


def lifetime_of(record: TokenRecord) -> float | None:
    """How long a record's access token lives in all, in seconds, where a token response has told; else None."""
    return _lifetime(record["extra"].get(_LIFETIME))


def _refresh_token(response: Mapping[str, Any], record: TokenRecord, issued_at: int) -> tuple[str | None, int | None]:
    expires_in, expires_at = response.get("refresh_token_expires_in"), response.get("refresh_token_expires_at")
    try:
        token = token_text("refresh_token", response.get("refresh_token"))
    except InvalidInputError:
        token = record["refresh_token"]
        if expires_in is None and expires_at is None:
            return token, optional_epoch_us("refresh_token_expires_at", record["refresh_token_expires_at"])
    return token, _expiry(expires_in, expires_at, issued_at)


def _expiry(expires_in: object, expires_at: object, issued_at: int) -> int | None:
    try:
        if expires_in is not None:
            return issued_at + round(_number(expires_in) * _US)
        if expires_at is None:
            return None
        if isinstance(expires_at, str) and not _NUMBER.fullmatch(expires_at):
            expires_at = datetime.fromisoformat(expires_at)
        elif not isinstance(expires_at, datetime):
            expires_at = datetime.fromtimestamp(_number(expires_at), UTC)
        return to_epoch_us("expires_at", expires_at)
    except (InvalidInputError, OverflowError, ValueError, OSError):
        return issued_at


def _lifetime(value: object) -> float | None:
    try:
        return None if value is None else _number(value)
    except (InvalidInputError, OverflowError, ValueError):
        return None


def _number(value: object) -> float:
    """A number of seconds; some providers send text, against the RFC."""
    if isinstance(value, str):
        value = float(value)  # ValueError
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise InvalidInputError("not a number of seconds")
    return min(max(float(value), 0.0), _LONGEST)


def _extra(response: Mapping[str, Any], record: TokenRecord) -> str | None:
    known = {name: value for name, value in record["extra"].items() if name not in _EXPIRIES}
    lifetime = {} if (told := _lifetime(response.get(_LIFETIME))) is None else {_LIFETIME: told}
    news = {name: value for name, value in response.items() if name not in _TOKENS | _EXPIRIES}
    for extra in ({**known, **news, **lifetime}, {**known, **lifetime}, known):
        try:
            return extra_json(extra)
        except InvalidInputError:
            continue
    return None
