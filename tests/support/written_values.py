"""Values of writes. Each has its write's id in all parts, so that a read shows the write, or a mixture of writes."""

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
    """Return the arguments of `store_tokens` for a write; each contains the write's id."""
    return {
        "access_token": f"access {value}",
        "refresh_token": f"refresh {value}",
        "access_token_expires_at": stamp(value),
        "refresh_token_expires_at": stamp(value) + timedelta(days=1),
        "extra": {"write": value},
    }


def sealed(keyring: Keyring, key: TokenKey, value: str) -> SealedTokens:
    """Return the same write as sealed tokens for a backend."""
    return SealedTokens(
        access_token=keyring.seal(key, "access_token", f"access {value}"),
        refresh_token=keyring.seal(key, "refresh_token", f"refresh {value}"),
        extra=keyring.seal(key, "extra", json.dumps({"write": value})),
        access_token_expires_at=to_epoch_us("", stamp(value)),
        refresh_token_expires_at=to_epoch_us("", stamp(value) + timedelta(days=1)),
        key_id=keyring.primary,
    )


def version(record: TokenRecord | None) -> Version | None:
    """Return the write that a record comes from, or a mixture of several writes."""
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
    """Derive a time from a write's id."""
    return _EPOCH + timedelta(seconds=crc32(value.encode()))
