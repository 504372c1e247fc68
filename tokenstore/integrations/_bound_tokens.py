"""Which access tokens are bound to a DPoP key (RFC 9449)."""

from __future__ import annotations

from tokenstore.errors import ConfigurationError
from tokenstore.records import TokenRecord

__all__ = ["is_bound", "refuse_bound"]


def is_bound(record: TokenRecord) -> bool:
    """Whether the record's access token is bound to a DPoP key: its ``token_type`` is ``DPoP`` (RFC 9449 section 5)."""
    kind = record["extra"].get("token_type")
    return isinstance(kind, str) and kind.lower() == "dpop"


def refuse_bound(record: TokenRecord, remedy: str) -> None:
    """Raise ConfigurationError if the record's access token is bound to a key: it must not be sent as a Bearer token.

    Args:
        record: The record.
        remedy: What to do.
    """
    if is_bound(record):
        raise ConfigurationError(
            f"provider {record['provider']!r}, user {record['user_id']!r}: the access token is bound to a DPoP key"
            f" (RFC 9449), so it cannot be sent as a Bearer token: {remedy}"
        )
