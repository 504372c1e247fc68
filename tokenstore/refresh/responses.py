"""Reads a token response (RFC 6749 section 5.1): its tokens, its times, and the fields that are kept beside them.

The refresh engine, ``store_token_response`` and the command line read responses here, so that a field means the same to
all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from tokenstore.errors import InvalidInputError
from tokenstore.records import MAX_EXTRA_DEPTH, SealedTokens, TokenKey
from tokenstore.refresh.error_codes import error_codes, error_for_codes
from tokenstore.refresh.kept import LIFETIME_FIELD, Kept, finite, lifetime_in
from tokenstore.sealing import Sealer
from tokenstore.validation import extra_json, plain_text, to_epoch_us, token_text, too_deep

__all__ = [
    "ACCESS_TOKEN_EXPIRY",
    "NEVER",
    "REFRESH_TOKEN_EXPIRY",
    "UNKNOWN",
    "Expiry",
    "ExpiryFields",
    "NewTokens",
    "issued_access_token",
    "read_expiry",
    "read_response",
    "response_fields",
]

_US = 1_000_000
_NUMBER = re.compile(r"\d+(\.\d*)?", re.ASCII)
_LONGEST = 1e10  # seconds: over three centuries, as a duration and since the epoch
_MILLISECONDS = 1e11  # a time of this size and above is not in seconds: that would be after the year 5000
_SHORTEST_MOMENT = 1e9  # a smaller number in the field `expires` is a lifetime: as a time it would be before 2002
_GO_ZERO_TIME: Final = "0001-01-01T00:00:00Z"  # what Go's encoding/json writes for a token that does not expire
_TOKENS: Final = ("access_token", "refresh_token")


class Expiry(NamedTuple):
    """When a token expires, as far as its response tells.

    Attributes:
        at: Microseconds since the epoch, or None.
        known: Whether the response tells it. Without a time, a known expiry means that the token never expires.
    """

    at: int | None
    known: bool


NEVER: Final = Expiry(None, known=True)
"""The token does not expire."""

UNKNOWN: Final = Expiry(None, known=False)
"""The response does not tell."""


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(word.capitalize() for word in others)


@dataclass(frozen=True, slots=True)
class ExpiryFields:
    """The fields of a response that say when a token expires. Of several, the first readable one counts.

    Attributes:
        lifetimes: The fields with the lifetime in seconds.
        moments: The fields with the time of expiry.
        past_is_unknown: Whether a time that has passed says nothing, as for a refresh token that was just issued.
    """

    lifetimes: tuple[str, ...]
    moments: tuple[str, ...]
    past_is_unknown: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All of these fields."""
        return self.lifetimes + self.moments

    @property
    def spellings(self) -> tuple[str, ...]:
        """All of these fields, also in camel case."""
        return (*self.names, *map(_camel, self.names))


ACCESS_TOKEN_EXPIRY: Final = ExpiryFields(
    # The second one, of Microsoft's version 1 endpoints, is as long or longer: it counts if there is no other.
    (LIFETIME_FIELD, "ext_expires_in"),
    # Besides the usual ones: Microsoft's version 1 endpoints, Google's library for Node.js (milliseconds), Go's oauth2,
    # and a field that holds a lifetime or a time.
    ("expires_at", "access_token_expires_at", "expires_on", "expiry_date", "expiry", "expires"),
)
"""The fields with the expiry of the access token."""

REFRESH_TOKEN_EXPIRY: Final = ExpiryFields(
    # Besides the usual one: Keycloak, Intuit.
    ("refresh_token_expires_in", "refresh_expires_in", "x_refresh_token_expires_in"),
    ("refresh_token_expires_at", "refresh_expires_at"),
    past_is_unknown=True,
)
"""The fields with the expiry of the refresh token."""


_CAMEL: Final = {name: _camel(name) for name in (*_TOKENS, *ACCESS_TOKEN_EXPIRY.names, *REFRESH_TOKEN_EXPIRY.names)}
_READ: Final = frozenset({*_CAMEL, *_CAMEL.values()})


@dataclass(frozen=True, slots=True, repr=False)
class NewTokens:
    """A token response, checked, and completed from the row that it replaces.

    Attributes:
        access_token: The new access token.
        refresh_token: The new refresh token, or the stored one if the response has none (RFC 6749 section 6).
        extra: The JSON of the row's further fields, as :func:`tokenstore.validation.extra_json` makes it.
        expiry: When the access token expires.
        refresh_token_expires_at: Microseconds since the epoch, or None: not known to expire.
    """

    access_token: str
    refresh_token: str | None
    extra: str | None
    expiry: Expiry
    refresh_token_expires_at: int | None

    def sealed(self, sealer: Sealer, key: TokenKey) -> SealedTokens:
        """Seal them for a row."""
        return sealer.seal(
            key,
            access_token=self.access_token,
            refresh_token=self.refresh_token,
            extra=self.extra,
            access_token_expires_at=self.expiry.at,
            refresh_token_expires_at=self.refresh_token_expires_at,
            access_token_expiry_known=self.expiry.known,
        )


def read_response(response: object, kept: Kept, issued_at: int) -> NewTokens:
    """Read a token response. An unreadable field must not lose the tokens, except the access token itself.

    Known fields: ``access_token``; ``refresh_token``; and those of :data:`ACCESS_TOKEN_EXPIRY` and
    :data:`REFRESH_TOKEN_EXPIRY`, which hold seconds or a time (a datetime, ISO 8601, or seconds or milliseconds since
    the epoch), each also in camel case (``expiresIn``). All other fields are stored in ``extra`` and replace earlier
    values there; so is the access token's lifetime, as ``expires_in``. If no field tells the access token's expiry, it
    has the lifetime that is kept for this case, or an unknown expiry. A lifetime of zero or less, or an unreadable
    value, tells nothing: providers send them for tokens that do not expire, or whose expiry they do not know. Nor does
    a refresh token's expiry that has passed already: if the token has expired, the provider says so when it is used.

    Args:
        response: The response: a mapping.
        kept: What the new row takes from the stored one where the response has nothing.
        issued_at: When the tokens were issued: microseconds since the epoch, by the database's clock.

    Raises:
        InvalidInputError: The response is not a mapping, or has no acceptable access token.
        RefreshError: It has none, but an error code of RFC 6749, as MSAL returns one.
    """
    fields = response_fields(response)
    expiry = read_expiry(fields, ACCESS_TOKEN_EXPIRY, issued_at, fresh=True)
    lifetime = lifetime_in(_field(fields, LIFETIME_FIELD))
    if expiry.at is not None and not lifetime:
        lifetime = max(expiry.at - issued_at, 0) / _US
    if not expiry.known and kept.lifetime is not None:
        lifetime = kept.lifetime
        expiry = Expiry(issued_at + round(lifetime * _US), known=True)
    refresh_token, refresh_token_expires_at = _refresh_token(fields, kept, issued_at)
    return NewTokens(
        issued_access_token(fields),
        refresh_token,
        _extra(fields, kept, lifetime if expiry.at is not None else None),
        expiry,
        refresh_token_expires_at,
    )


def response_fields(response: object) -> Mapping[str, Any]:
    """The fields of a response, with its tokens at the top level.

    Some providers put the tokens into an object inside, as Slack puts those of a user into ``authed_user``. If exactly
    one object inside has an access token, and the response itself has none, its fields are added to those around it.

    Raises:
        InvalidInputError: The response is not a mapping, or has no acceptable access token.
        RefreshError: It has none, but an error code of RFC 6749.
    """
    if not isinstance(response, Mapping):
        raise InvalidInputError(f"a token response must be a mapping, not {type(response).__name__}")
    try:
        _ = issued_access_token(response)
    except InvalidInputError as unfit:
        refused: Exception | None = error_for_codes(error_codes(response))
        inside = {name: value for name, value in response.items() if _has_token(value)}
        if refused is None and len(inside) == 1:
            ((wrapper, tokens),) = inside.items()
            return {name: value for name, value in response.items() if name != wrapper} | dict(tokens)
        raise (refused or unfit) from None
    return response


def _has_token(value: object) -> bool:
    with suppress(InvalidInputError):
        return isinstance(value, Mapping) and bool(issued_access_token(value))
    return False


def issued_access_token(response: Mapping[str, Any]) -> str:
    """A response's access token, without line ends and tabs around it.

    Raises:
        InvalidInputError: There is none that can be sent in a header.
    """
    return token_text("access_token", _trimmed(_field(response, "access_token")))


def read_expiry(response: Mapping[str, Any], fields: ExpiryFields, issued_at: int, *, fresh: bool) -> Expiry:
    """Read when a token of a response expires.

    Args:
        response: The token response.
        fields: The fields to read.
        issued_at: The start of the lifetime: microseconds since the epoch.
        fresh: Whether the response was received at ``issued_at``. Then the lifetime is read first, because it does not
            depend on another machine's clock, and a value that cannot be read tells nothing. A response that may be
            older, such as one from a file, has a lifetime that began at an unknown time: then the time of expiry is
            read first, and an unreadable value is an error. Numbers that are too large are cut to the largest possible
            one.

    Raises:
        InvalidInputError: Without ``fresh``: there are fields, and none is readable.
    """
    never, problem = False, None
    for name in fields.names if fresh else fields.moments + fields.lifetimes:
        value = _field(response, name)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if isinstance(value, str) and value == _GO_ZERO_TIME:
            never = True
            continue
        is_lifetime = name in fields.lifetimes
        try:
            expires_at = _after(issued_at, value) if is_lifetime else _moment(name, value, issued_at)
        except (InvalidInputError, OverflowError, ValueError, OSError):
            problem = problem or f"{name} must be {'a number of seconds' if is_lifetime else 'ISO 8601 or Unix time'}"
            continue
        if expires_at is None:
            continue
        # A time that has passed does say something if the response may be old, unless it is the epoch itself.
        if not fields.past_is_unknown or expires_at > (issued_at if fresh or is_lifetime else 0):
            return Expiry(expires_at, known=True)
    if problem is not None and not fresh:
        raise InvalidInputError(problem)  # outside the handlers: the context could show a token in the wrong field
    return NEVER if never else UNKNOWN


def _field(response: Mapping[str, Any], name: str) -> object:
    """The value of a known field, by its name or by the same name in camel case."""
    value = response.get(name)
    return response.get(_CAMEL[name]) if value is None else value


def _refresh_token(response: Mapping[str, Any], kept: Kept, issued_at: int) -> tuple[str | None, int | None]:
    expires_at = read_expiry(response, REFRESH_TOKEN_EXPIRY, issued_at, fresh=True).at
    refresh_token = kept.refresh_token
    with suppress(InvalidInputError):
        # With any characters: it is sent in a form, which can carry them, and the old one may no longer work.
        refresh_token = plain_text("refresh_token", _trimmed(_field(response, "refresh_token")))
    if expires_at is None and refresh_token == kept.refresh_token:
        expires_at = kept.refresh_token_expires_at
    return refresh_token, expires_at


def _trimmed(token: object) -> object:
    """A token without line ends and tabs around it, which no token has, but the last field of a text response may."""
    return token.strip("\t\r\n") if isinstance(token, str) else token


def _after(issued_at: int, lifetime: object) -> int | None:
    """The end of a lifetime in seconds; None for one of zero or less, which tells nothing."""
    number = finite(lifetime)
    return issued_at + round(min(number, _LONGEST) * _US) if number > 0 else None


def _moment(name: str, value: object, issued_at: int) -> int | None:
    """A time of expiry in microseconds since the epoch."""
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        value = datetime.fromisoformat(value.strip())
    if isinstance(value, datetime):
        return to_epoch_us(name, value)
    number = finite(value)
    if name == "expires" and number < _SHORTEST_MOMENT:
        return _after(issued_at, number)
    for _ in range(3):  # milliseconds, microseconds, nanoseconds
        if number >= _MILLISECONDS:
            number /= 1000
    return to_epoch_us(name, datetime.fromtimestamp(min(max(number, 0.0), _LONGEST), UTC))


def _extra(response: Mapping[str, Any], kept: Kept, lifetime: float | None) -> str | None:
    """The further fields of response and stored row. Where they cannot be stored together, fewer of them."""
    known = {name: value for name, value in kept.extra.items() if name not in _READ}
    stated = {LIFETIME_FIELD: lifetime} if lifetime else {}
    new = {
        name: value
        for name, value in response.items()
        if name not in _READ and not too_deep(value, MAX_EXTRA_DEPTH - 1)
    }
    for extra in ({**known, **new, **stated}, {**known, **stated}, known):
        try:
            return extra_json(extra)
        except InvalidInputError:
            continue
    return None
