"""Rows as a refresh reads them, and the names under which it holds their leases."""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf

from tokenstore.errors import BackendUnavailableError, ConflictError
from tokenstore.protocol import Backend, SupportsRowLocks
from tokenstore.records import SealedTokens, TokenKey
from tokenstore.validation import RequestedRow, requested_row

__all__ = ["SeenRow", "delete_version", "lease_of", "new_holder", "read_row"]

_US = 1_000_000


@dataclass(frozen=True, slots=True)
class SeenRow:
    """A row as it was read, and when: seconds of :func:`time.monotonic`."""

    row: RequestedRow
    at: float

    def now(self) -> int:
        """The database's clock, computed from ``as_of`` and the time since the read. It is never ahead."""
        return self.row.as_of + int((time.monotonic() - self.at) * _US)

    def renewed(self, tokens: SealedTokens) -> RequestedRow:
        """The row as it is, or will be, stored with its next tokens. Only ``updated_at`` may differ by a moment."""
        stored = replace(
            self.row,
            tokens=tokens,
            generation=self.row.generation + 1,
            lease_holder=None,
            lease_expires_in=None,
            failure=None,
            updated_at=self.now(),
        )
        return RequestedRow(stored)


async def read_row(backend: Backend, key: TokenKey, *, empty: bool = False) -> RequestedRow | None:
    """Read a row, twice if the first read fails: one dead connection of a pool does not mean an outage.

    Args:
        backend: The rows.
        key: The row's key.
        empty: Whether an empty row is returned, too. Default: it counts as no row.

    Raises:
        TamperedError: The database answered with another row.
        BackendError: The database refused or failed.
    """
    try:
        row = await backend.get(key)
    except (BackendUnavailableError, ConflictError):
        row = await backend.get(key)
    return requested_row(key, row, empty=empty)


async def delete_version(backend: Backend, key: TokenKey, generation: int) -> bool:
    """Delete a row if it still has this generation, and not tokens that were written meanwhile.

    Without row locks, a write between the check and the deletion is lost.

    Returns:
        Whether it was deleted.
    """
    if isinstance(backend, SupportsRowLocks):
        async with backend.transaction() as transaction:
            row = requested_row(key, await transaction.lock(key), empty=True)
            return row is not None and row.generation == generation and await transaction.delete(key)
    row = await read_row(backend, key, empty=True)
    return row is not None and row.generation == generation and await backend.delete(key)


def new_holder(lease: float) -> str:
    """A lease holder's name that no other refresh has.

    Args:
        lease: How long its leases last, in seconds. The name tells this to the processes that wait for a lease.
    """
    return f"{secrets.token_hex(16)}/{lease:g}"


def lease_of(holder: str | None) -> float:
    """How long a holder's leases last, in seconds, by its name; infinite if the name does not tell."""
    with suppress(ValueError):
        return float((holder or "").partition("/")[2])
    return inf
