"""What a row keeps of its earlier state when a token response is stored."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Final

from tokenstore.errors import InvalidInputError
from tokenstore.records import CLOCK_SKEW, TokenRecord
from tokenstore.validation import optional_epoch_us

__all__ = [
    "LIFETIME_FIELD",
    "Kept",
    "finite",
    "kept_at_login",
    "kept_at_refresh",
    "lifetime_in",
    "lifetime_of",
    "lifetime_setting",
]

_LONGEST = 1e10  # seconds: over three centuries

LIFETIME_FIELD: Final = "expires_in"
"""The field of a response, and of a row's ``extra``, with the access token's lifetime in seconds."""


@dataclass(frozen=True, slots=True, repr=False)
class Kept:
    """What the new row takes from the stored one where the response has nothing.

    Attributes:
        refresh_token: The stored refresh token.
        refresh_token_expires_at: Its expiry: microseconds since the epoch, or None.
        extra: The further fields that stay where the response does not replace them.
        lifetime: The lifetime of an access token whose response tells none, in seconds; None: it is unknown.
    """

    refresh_token: str | None = None
    refresh_token_expires_at: int | None = None
    extra: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    lifetime: float | None = None


def kept_at_refresh(record: TokenRecord, default_lifetime: float | None) -> Kept:
    """A refresh keeps everything that its response does not replace (RFC 6749 section 6).

    Args:
        record: The record that is refreshed.
        default_lifetime: The lifetime, in seconds, of an access token if neither its response nor the stored row tells
            one.
    """
    return Kept(
        record["refresh_token"],
        optional_epoch_us("refresh_token_expires_at", record["refresh_token_expires_at"]),
        record["extra"],
        _previous_lifetime(record, default_lifetime),
    )


def kept_at_login(
    record: TokenRecord | None,
    response: Mapping[str, Any],
    default_lifetime: float | None,
    *,
    keep_refresh_token: bool,
) -> Kept:
    """A login keeps the refresh token, as a provider may issue one at a user's first login alone.

    It is not kept if the user has logged in to another account of the provider.

    Args:
        record: The stored record, or None.
        response: The fields of the login's response.
        default_lifetime: As for :func:`kept_at_refresh`.
        keep_refresh_token: Whether a stored refresh token is kept.
    """
    if record is None:
        return Kept(lifetime=default_lifetime)
    lifetime = _previous_lifetime(record, default_lifetime)
    if not keep_refresh_token or _is_another_account(record["extra"], response):
        return Kept(lifetime=lifetime)
    expires_at = optional_epoch_us("refresh_token_expires_at", record["refresh_token_expires_at"])
    return Kept(record["refresh_token"], expires_at, lifetime=lifetime)


def lifetime_setting(refresher: object, name: str) -> float | None:
    """A refresher's setting of a lifetime in seconds: ``default_lifetime`` or ``max_lifetime``; None if it has none."""
    value = getattr(refresher, name, None)
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LONGEST:
        return None  # any callable can be a refresher, and may have attributes of another meaning
    return float(value)


def lifetime_of(record: TokenRecord) -> float | None:
    """The lifetime of a record's access token when it was issued, in seconds; None if no response has stated it."""
    return lifetime_in(record["extra"].get(LIFETIME_FIELD))


def lifetime_in(value: object) -> float | None:
    """A lifetime in seconds, zero or more; None if the value is none."""
    try:
        return min(max(finite(value), 0.0), _LONGEST)
    except (InvalidInputError, ValueError):
        return None


def finite(value: object) -> float:
    """A number; some providers send text, against the RFC.

    Raises:
        InvalidInputError: The value is no number.
        ValueError: The text is no number.
    """
    if isinstance(value, str):
        value = float(value)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or (isinstance(value, float) and math.isnan(value))
    ):
        raise InvalidInputError("not a number")
    return float(min(max(value, -1e30), 1e30))


def _previous_lifetime(record: TokenRecord, default: float | None) -> float | None:
    if stated := lifetime_of(record):
        return stated
    # A row that no response wrote: what was left when it was written, unless that is too little to be a lifetime.
    if (expires_at := record["access_token_expires_at"]) is not None:
        left = float((expires_at - record["updated_at"]).total_seconds())
        if left > CLOCK_SKEW:
            return left
    return default


def _is_another_account(stored: Mapping[str, Any], response: Mapping[str, Any]) -> bool:
    """Whether both name the provider's account, and the names differ."""
    before, now = _names_of_account(stored), _names_of_account(response)
    return any(before[name] != now[name] for name in before.keys() & now.keys())


def _names_of_account(fields: Mapping[str, Any]) -> dict[str, str]:
    """How a response names the account: by ``sub`` or ``id``, or by the claim ``sub`` of an ID token.

    The ID token's signature is not checked: the name is only compared with the one of the stored row.
    """
    claims: object = None
    id_token = fields.get("id_token")
    if isinstance(id_token, str) and id_token.count(".") == 2:
        payload = id_token.split(".")[1]
        try:
            claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        except (binascii.Error, ValueError, RecursionError):
            claims = None
    found = {"sub": claims.get("sub") if isinstance(claims, dict) else None}
    found |= {name: fields[name] for name in ("sub", "id") if fields.get(name) is not None}
    return {name: str(value) for name, value in found.items() if isinstance(value, str | int)}
