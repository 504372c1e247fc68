"""The rows that all contenders read and write: keys, tokens and sealed values."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from tokenstore import Keyring
from tokenstore.records import TokenKey

__all__ = [
    "ACCESS",
    "EXPIRES",
    "EXTENT",
    "KEYRING",
    "REFRESH",
    "Place",
    "SealedRow",
    "key",
    "sealed_row",
    "sealed_rows",
]

KEYRING: Final = Keyring({"bench": bytes(range(32))})
ACCESS: Final = "gho_" + "a" * 36
REFRESH: Final = "ghr_" + "r" * 76
EXPIRES: Final = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
EXTENT: Final = 4096
"""The maximum number of rows that are written to. Floors prepare the sealed values of these rows."""

_PROVIDERS: Final = ("github", "google", "linear", "slack")
_EXPIRES_US: Final = int(EXPIRES.timestamp()) * 1_000_000


Place = tuple[str, str]
"""The provider and the user of a row. All rows have the empty account."""


def key(number: int, prefix: str = "user") -> Place:
    """The key of one row; successive rows have different providers."""
    return _PROVIDERS[number % len(_PROVIDERS)], f"{prefix}-{number:07d}"


class SealedRow(NamedTuple):
    """The values of a row, in the order of the parameters in :mod:`benchmarks.sql`; times in microseconds."""

    provider: str
    user_id: str
    account: str
    access_token: bytes
    refresh_token: bytes
    access_token_expires_at: int
    access_token_expiry_known: int
    due_at: int
    key_id: str
    generation: int
    created_at: int
    updated_at: int


def sealed_row(place: Place) -> SealedRow:
    """Seal a row's tokens with the benchmarks' key."""
    row = TokenKey(*place)
    return SealedRow(
        *row,
        KEYRING.seal(row, "access_token", ACCESS),
        KEYRING.seal(row, "refresh_token", REFRESH),
        _EXPIRES_US,
        1,
        _EXPIRES_US,
        KEYRING.primary,
        1,
        _EXPIRES_US,
        _EXPIRES_US,
    )


def sealed_rows(count: int) -> Iterator[SealedRow]:
    """The first ``count`` rows."""
    return (sealed_row(key(number)) for number in range(count))
