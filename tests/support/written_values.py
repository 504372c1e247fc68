"""Writes that carry an id in each of their parts, so that a read shows whose it is, or that it is a mixture."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from zlib import crc32

from tokenstore import Keyring
from tokenstore.records import SealedTokens, TokenKey, TokenRecord
from tokenstore.testing.history import Mixture, Version
from tokenstore.validation import to_epoch_us

_EPOCH = datetime(2100, 1, 1, tzinfo=UTC)


def tokens(value: str) -> dict[str, Any]:
    """The arguments of one write: its id in each."""
    return {
        "access_token": f"access {value}",
        "refresh_token": f"refresh {value}",
        "access_token_expires_at": stamp(value),
        "refresh_token_expires_at": stamp(value) + timedelta(days=1),
        "extra": {"write": value},
    }


def sealed(keyring: Keyring, key: TokenKey, value: str) -> SealedTokens:
    """The same write, as a backend gets it."""
    return SealedTokens(
        access_token=keyring.seal(key, "access_token", f"access {value}"),
        refresh_token=keyring.seal(key, "refresh_token", f"refresh {value}"),
        extra=keyring.seal(key, "extra", json.dumps({"write": value})),
        access_token_expires_at=to_epoch_us("", stamp(value)),
        refresh_token_expires_at=to_epoch_us("", stamp(value) + timedelta(days=1)),
        key_id=keyring.primary,
    )


def version(record: TokenRecord | None) -> Version | None:
    """Which write a record came from, or the mixture that it is."""
    if record is None:
        return None
    value = record["access_token"].removeprefix("access ")
    refresh_token = (record["refresh_token"] or "").removeprefix("refresh ")
    parts = (value, refresh_token, record["extra"].get("write"))
    expiries = (record["access_token_expires_at"], record["refresh_token_expires_at"])
    if set(parts) != {value} or expiries != (stamp(value), stamp(value) + timedelta(days=1)):
        return Version(Mixture((*parts, *map(str, expiries))), record["generation"])
    return Version(value, record["generation"])


def stamp(value: str) -> datetime:
    """A time that stands for a write."""
    return _EPOCH + timedelta(seconds=crc32(value.encode()))
