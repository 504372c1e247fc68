"""What is stored: keys, records, their validation and their times.

Every argument is checked here, once, before any backend sees it, so that the verdict is the same on all of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, NamedTuple, TypedDict, TypeGuard

from tokenstore.errors import InvalidInputError, TokenStoreError

__all__ = [
    "CLOCK_SKEW",
    "MAX_PROVIDER_BYTES",
    "MAX_TOKEN_BYTES",
    "MAX_USER_ID_BYTES",
    "Failure",
    "RefreshOutcome",
    "RefreshResult",
    "ScannedRow",
    "SealedRecord",
    "SealedTokens",
    "TokenEntry",
    "TokenKey",
    "TokenRecord",
    "from_epoch_us",
    "has_failed",
    "is_leased",
    "new_generation",
    "to_epoch_us",
]

MAX_PROVIDER_BYTES = 128
"""The longest provider name, in UTF-8 bytes."""

MAX_USER_ID_BYTES = 512
"""The longest user id, in UTF-8 bytes."""

MAX_TOKEN_BYTES = 256 * 1024
"""The longest token, and the longest JSON form of ``extra``, in UTF-8 bytes."""

CLOCK_SKEW: Final = 60.0
"""How long before its expiry an access token counts as expired, in seconds."""

RefreshOutcome = Literal["refreshed", "not_due", "busy", "gone", "failed"]
"""What became of a row that ``refresh_due`` found."""

_encode_json: Final = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_LONGEST_SECONDS = 10**9  # over 31 years; fits every database's integers as microseconds
_MIN_US = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
_MAX_US = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND


class TokenKey(NamedTuple):
    """The identity of a row. Compared byte for byte as UTF-8: no case folding, no normalising, no trimming."""

    provider: str
    user_id: str

    def __str__(self) -> str:
        return f"provider {self.provider!r}, user {self.user_id!r}"


# Nobody changes a field of the next four, whose objects callers may share. They are not frozen because that makes an
# object cost three times as much, and backends make some for each read.


@dataclass(slots=True, unsafe_hash=True)
class Failure:
    """Why the last refresh of this generation failed.

    Attributes:
        code: The OAuth error code (RFC 6749 section 5.2) or another short name; at most 64 ASCII characters.
        retry_in: Seconds until a refresh may be tried again, on the database's clock; None: not before new tokens.
    """

    code: str
    retry_in: float | None = None


@dataclass(slots=True, unsafe_hash=True, repr=False)
class SealedTokens:
    """One write as a backend sees it: sealed bytes, and the plain columns beside them.

    Attributes:
        access_token: The sealed access token.
        refresh_token: The sealed refresh token, or None where none was issued.
        extra: The sealed JSON of further response fields, or None.
        access_token_expires_at: Microseconds since the epoch, or None for "never".
        refresh_token_expires_at: Microseconds since the epoch, or None for "never".
        key_id: The name of the key that sealed every field of this write.
    """

    access_token: bytes
    refresh_token: bytes | None
    extra: bytes | None
    access_token_expires_at: int | None
    refresh_token_expires_at: int | None
    key_id: str

    def __repr__(self) -> str:
        return f"<SealedTokens key_id={self.key_id!r}>"


@dataclass(slots=True, unsafe_hash=True)
class SealedRecord:
    """One stored row as a backend returns it.

    Attributes:
        key: Whose tokens these are.
        tokens: The sealed values.
        generation: The number of this version of the row. Each write adds one; see :func:`new_generation`.
        lease_holder: Who holds the refresh lease, or None. An expired lease may still be shown.
        lease_expires_in: Seconds until the lease expires, on the database's clock (negative: expired), or None.
        failure: The shared outcome of the last refresh of this generation, or None.
        created_at: Microseconds since the epoch, on the database's clock.
        updated_at: Microseconds since the epoch, on the database's clock.
        as_of: The database's clock when the row was read, in microseconds since the epoch.
    """

    key: TokenKey
    tokens: SealedTokens
    generation: int
    lease_holder: str | None
    lease_expires_in: float | None
    failure: Failure | None
    created_at: int
    updated_at: int
    as_of: int


@dataclass(slots=True, unsafe_hash=True)
class ScannedRow:
    """One stored row without its sealed values; the fields are those of :class:`SealedRecord`."""

    key: TokenKey
    has_refresh_token: bool
    access_token_expires_at: int | None
    refresh_token_expires_at: int | None
    key_id: str
    generation: int
    created_at: int
    updated_at: int
    as_of: int


class TokenEntry(TypedDict):
    """A row as ``list_tokens`` shows it: everything but the sealed values, which are neither read nor opened."""

    provider: str
    user_id: str
    access_token_expires_at: datetime | None
    refresh_token_expires_at: datetime | None
    has_refresh_token: bool
    generation: int
    key_id: str
    created_at: datetime
    updated_at: datetime


class TokenRecord(dict[str, Any]):
    """One row's decrypted tokens: a ``dict`` whose ``repr`` and ``str`` show no token.

    Keys: ``provider``, ``user_id``, ``access_token``, ``refresh_token`` (None: none issued),
    ``access_token_expires_at`` and ``refresh_token_expires_at`` (aware UTC datetimes; None: never),
    ``extra`` (a dict of further response fields), ``generation`` (int, changes with every write), ``key_id``,
    ``created_at`` and ``updated_at`` (aware UTC datetimes).
    """

    __slots__ = ()

    _SECRET = frozenset({"access_token", "refresh_token", "extra"})

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{key!r}: {'<redacted>' if key in self._SECRET and value else repr(value)}" for key, value in self.items()
        )
        return f"{{{shown}}}"

    def __rich_repr__(self) -> Iterable[tuple[str, object]]:
        # rich.pretty walks into dicts unless told otherwise.
        for key, value in self.items():
            yield key, "<redacted>" if key in self._SECRET and value else value

    def copy(self) -> TokenRecord:
        """A shallow copy, as redacted as this one."""
        return TokenRecord(self)

    def __or__(self, other: Mapping[str, Any]) -> TokenRecord:  # type: ignore[override]
        return TokenRecord({**self, **other})

    def __ror__(self, other: Mapping[str, Any]) -> TokenRecord:  # type: ignore[override]
        return TokenRecord({**other, **self})


@dataclass(frozen=True, slots=True)
class RefreshResult:
    """What ``refresh_due`` did about one row.

    Attributes:
        provider: The row's provider.
        user_id: The row's user.
        outcome: ``refreshed``; ``not_due`` (somebody else had refreshed it by then); ``busy`` (somebody else is at it);
            ``gone`` (it was deleted); ``failed``.
        error: Why it failed, or None.
    """

    provider: str
    user_id: str
    outcome: RefreshOutcome
    error: TokenStoreError | None = None


def is_leased(row: SealedRecord | None) -> TypeGuard[SealedRecord]:
    """Whether there is a row, and somebody's lease on it is live."""
    return row is not None and row.lease_expires_in is not None and row.lease_expires_in > 0


def has_failed(row: SealedRecord) -> bool:
    """Whether a failure forbids a refresh: for good, or for the time being."""
    return row.failure is not None and (row.failure.retry_in is None or row.failure.retry_in > 0)


def new_generation() -> int:
    """The first generation of a new row: random, so that a row deleted and stored again repeats no earlier number.

    A compare-and-set on an old generation therefore fails after a delete, too. Below 2**48: exact in JSON, and far
    from the end of a 64-bit column.
    """
    return int.from_bytes(os.urandom(6), "big") or 1


def token_key(provider: object, user_id: object) -> TokenKey:
    """Check both parts of a key."""
    return TokenKey(
        _key_part("provider", provider, MAX_PROVIDER_BYTES), _key_part("user_id", user_id, MAX_USER_ID_BYTES)
    )


def _key_part(name: str, value: object, limit: int) -> str:
    text = _text(name, value, limit)
    if "\0" in text:
        raise InvalidInputError(f"{name} holds a NUL character, which PostgreSQL cannot store")
    return text


def token_text(name: str, value: object) -> str:
    """Check a token: a non-empty ``str`` of at most :data:`MAX_TOKEN_BYTES`."""
    return _text(name, value, MAX_TOKEN_BYTES)


def _text(name: str, value: object, limit: int) -> str:
    if type(value) is str and value.isascii() and 0 < len(value) <= limit:
        return value  # nearly all are: each character is a byte
    if not isinstance(value, str):
        raise InvalidInputError(f"{name} must be a str, not {type(value).__name__}")
    text = str.__str__(value)  # a str subclass (an enum, say) must reach no driver
    if not text:
        raise InvalidInputError(f"{name} must not be empty")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        # Raised below, outside of this block: as its context, the encoding error would carry the value.
        size = -1
    if size < 0:
        raise InvalidInputError(f"{name} holds a lone surrogate and cannot be encoded as UTF-8")
    if size > limit:
        raise InvalidInputError(f"{name} has {size} bytes as UTF-8; at most {limit} are allowed")
    return text


def to_epoch_us(name: str, value: object) -> int:
    """Check a datetime and convert it to microseconds since the epoch; a naive one is UTC, never local time."""
    if not isinstance(value, datetime):
        raise InvalidInputError(f"{name} must be a datetime or None, not {type(value).__name__}")
    if value.utcoffset() is None:
        value = value.replace(tzinfo=UTC)
    microseconds = (value - _EPOCH) // _MICROSECOND
    if not _MIN_US <= microseconds <= _MAX_US:
        raise InvalidInputError(f"{name} is outside the years 1 to 9999 in UTC")
    return microseconds


def from_epoch_us(microseconds: int) -> datetime:
    """An aware UTC datetime from microseconds since the epoch."""
    return _EPOCH + microseconds * _MICROSECOND


def optional_epoch_us(name: str, value: object) -> int | None:
    return None if value is None else to_epoch_us(name, value)


def optional_datetime(microseconds: int | None) -> datetime | None:
    return None if microseconds is None else from_epoch_us(microseconds)


def extra_json(value: object) -> str | None:
    """Check ``extra`` and serialise it: a mapping with ``str`` keys and JSON values, or None. Empty counts as None."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InvalidInputError(f"extra must be a mapping or None, not {type(value).__name__}")
    if not all(isinstance(key, str) for key in value):
        raise InvalidInputError("extra must have str keys")
    try:
        text = _encode_json(dict(value))
    except (TypeError, ValueError, RecursionError):
        text = ""  # raised below, for the same reason: json's message may carry a value
    if not text:
        raise InvalidInputError("extra must hold JSON values only (no NaN, datetime, bytes or cycles)")
    if len(text) > MAX_TOKEN_BYTES:
        raise InvalidInputError(f"extra has {len(text)} bytes as JSON; at most {MAX_TOKEN_BYTES} are allowed")
    return None if text == "{}" else text


def seconds(name: str, value: object, *, positive: bool = False) -> float:
    """Check a duration in seconds: a number, zero or more (``positive``: more than zero)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInputError(f"{name} must be a number of seconds, not {type(value).__name__}")
    if not 0 <= value <= _LONGEST_SECONDS or (positive and value == 0):  # false for NaN, too
        lower = "more than" if positive else "at least"
        raise InvalidInputError(f"{name} must be {lower} zero and at most {_LONGEST_SECONDS}")
    return float(value)
