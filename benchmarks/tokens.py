"""The rows that everybody reads and writes: their keys, their tokens, and how they are sealed."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from tokenstore import Keyring
from tokenstore.records import TokenKey

__all__ = ["ACCESS", "EXPIRES", "EXTENT", "KEYRING", "REFRESH", "SealedRow", "key", "sealed_row", "sealed_rows"]

KEYRING: Final = Keyring({"bench": bytes(range(32))})
ACCESS: Final = "gho_" + "a" * 36
REFRESH: Final = "ghr_" + "r" * 76
EXPIRES: Final = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
EXTENT: Final = 4096
"""How many rows writers write to, at most: floors need their sealed values ready."""

_PROVIDERS: Final = ("github", "google", "linear", "slack")
_EXPIRES_US: Final = int(EXPIRES.timestamp()) * 1_000_000


def key(number: int, prefix: str = "user") -> TokenKey:
    """The key of one row; the rows are spread over some providers."""
    return TokenKey(_PROVIDERS[number % len(_PROVIDERS)], f"{prefix}-{number:07d}")


class SealedRow(NamedTuple):
    """What a row is made of, in the order of the statements of :mod:`benchmarks.floors`; times in microseconds."""

    provider: str
    user_id: str
    access_token: bytes
    refresh_token: bytes
    access_token_expires_at: int
    key_id: str
    generation: int
    created_at: int
    updated_at: int


def sealed_row(place: TokenKey) -> SealedRow:
    """A row that opens."""
    return SealedRow(
        *place,
        KEYRING.seal(place, "access_token", ACCESS),
        KEYRING.seal(place, "refresh_token", REFRESH),
        _EXPIRES_US,
        KEYRING.primary,
        1,
        _EXPIRES_US,
        _EXPIRES_US,
    )


def sealed_rows(count: int) -> Iterator[SealedRow]:
    """The first rows, ready to be written."""
    return (sealed_row(key(number)) for number in range(count))
