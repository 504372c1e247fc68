"""A job of another process, which ends with new tokens that could not be stored."""

from __future__ import annotations

from tokenstore import TokenRecord, TokensNotStoredError

RECORD = TokenRecord(provider="github", user_id="u1", access_token="at", refresh_token="rt", extra={"scope": "read"})


def fail_to_store() -> None:
    """Raise the error that carries the only copy of new tokens."""
    error = TokensNotStoredError("not stored", records=[RECORD, RECORD])
    error.provider = "github"
    raise error
