"""The state of a connection as an operator sees it, and the filters by which rows are searched."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, TypedDict, get_args

from tokenstore.records import ScannedRow, TokenKey

__all__ = [
    "REFUSED",
    "STATUSES",
    "RowFilter",
    "SearchPage",
    "Status",
    "TokenEntry",
    "TokenEntryWithMetadata",
    "after_prefix",
    "status_of",
]

_US = 1_000_000

Status = Literal["valid", "expiring", "expired", "refreshing", "retrying", "reauthorization_required", "refused"]
"""The state of a connection:

- ``reauthorization_required``: the user has to log in again. The provider refuses the refresh token; or the access
  token has expired, there is no refresh token that has not, and the provider does not issue such tokens without one.
- ``refused``: the provider refuses the client; an operator has to act.
- ``refreshing``: a refresh holds the row's lease.
- ``retrying``: the last refresh failed; the provider is not called again before the row's retry time.
- ``expired``: the access token has expired, and the next load refreshes it.
- ``expiring``: the access token expires within the store's ``refresh_margin``.
- ``valid``: none of these.

Of several that apply, the first one counts.
"""

STATUSES: Final[frozenset[str]] = frozenset(get_args(Status))
"""All of them."""

REFUSED: Final = "refused/"
"""Marks the stored code of a refusal of the client, so that later callers get that kind of error.

No code of a provider has a slash.
"""

_LAST_CODE_POINT: Final = 0x10FFFF
_SURROGATES: Final = range(0xD800, 0xE000)


class TokenEntry(TypedDict):
    """A row as ``list_tokens`` shows it: everything but the sealed values, which are neither read nor opened."""

    provider: str
    user_id: str
    account: str
    access_token_expires_at: datetime | None
    refresh_token_expires_at: datetime | None
    access_token_expiry_known: bool
    has_refresh_token: bool
    generation: int
    key_id: str
    metadata_key_id: str | None
    created_at: datetime
    updated_at: datetime
    status: Status
    failure_code: str | None
    failed_at: datetime | None
    retry_at: datetime | None


class TokenEntryWithMetadata(TokenEntry):
    """A row as ``list_tokens(with_metadata=True)`` shows it. Its ``repr`` and ``str`` do not show the metadata."""

    metadata: dict[str, Any]


@dataclass(slots=True, unsafe_hash=True)
class RowFilter:
    """Which rows a search finds: those to which every condition applies.

    Attributes:
        status: Rows with this :data:`Status`.
        margin: How long before its expiry a token is ``expiring``, in seconds.
        expiring_within: Rows whose access token expires within so many seconds, or has expired.
        user_prefix: Rows whose user id begins with this text.
    """

    status: str | None = None
    margin: float = 0.0
    expiring_within: float | None = None
    user_prefix: str | None = None

    def matches(self, row: ScannedRow) -> bool:
        """Whether a row is found."""
        expires_at = row.access_token_expires_at
        return (
            (self.status is None or status_of(row, self.margin) == self.status)
            and (self.user_prefix is None or row.key.user_id.startswith(self.user_prefix))
            and (
                self.expiring_within is None
                or (expires_at is not None and expires_at <= row.as_of + round(self.expiring_within * _US))
            )
        )


@dataclass(frozen=True, slots=True)
class SearchPage:
    """One page of a search.

    Attributes:
        rows: The rows that were found.
        end: The key of the last row that was read, where the next page begins; None if there are no more rows. It may
            be set although no row follows.
    """

    rows: list[ScannedRow]
    end: TokenKey | None


def status_of(row: ScannedRow, margin: float) -> Status:
    """The status of a row.

    Args:
        row: The row.
        margin: How long before its expiry a token is ``expiring``, in seconds.
    """
    now, expires_at = row.as_of, row.access_token_expires_at
    expired = expires_at is not None and expires_at <= now
    renewable = row.issued or (row.has_refresh_token and not _has_passed(row.refresh_token_expires_at, now))
    failed = row.failure_code is not None and not _has_passed(row.retry_at, now)
    if (failed and row.retry_at is None) or (expired and not renewable):
        return "reauthorization_required"
    if failed and row.failure_code is not None and row.failure_code.startswith(REFUSED):
        return "refused"
    if row.lease_expires_at is not None and row.lease_expires_at > now:
        return "refreshing"
    if failed:
        return "retrying"
    if expired:
        return "expired"
    return "expiring" if expires_at is not None and expires_at <= now + round(margin * _US) else "valid"


def _has_passed(moment: int | None, now: int) -> bool:
    return moment is not None and moment <= now


def after_prefix(prefix: str) -> str | None:
    """The first text behind all texts with this prefix, in the order of code points; None if there is none."""
    for length in range(len(prefix), 0, -1):
        last = ord(prefix[length - 1])
        if last < _LAST_CODE_POINT:
            following = _SURROGATES.stop if last + 1 in _SURROGATES else last + 1
            return prefix[: length - 1] + chr(following)
    return None
