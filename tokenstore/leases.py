"""What one statement does to a row's lease, as functions without a database.

A row's *lease* is a claim on the row by one refresh, the lease holder. A row's *generation* is a number that changes
with every write of tokens. The memory backend runs these functions as they are, and the tests compare every other
backend with them. They do not wait or read a clock, so that tests can search every interleaving of several refreshes.

Times are whole numbers by the database's clock, in the caller's unit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

__all__ = ["Row", "claimed", "completed", "released", "written"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row(Generic[T]):
    """The parts of a stored row that the refresh protocol uses."""

    tokens: T
    generation: int
    lease_holder: str | None = None
    lease_expires_at: int | None = None
    failure_code: str | None = None
    retry_at: int | None = None

    def is_leased(self, now: int) -> bool:
        """Whether the row has a lease that has not expired."""
        return self.lease_expires_at is not None and self.lease_expires_at > now

    def has_failed(self, now: int) -> bool:
        """Whether the row has a failure that still forbids a refresh, permanently or until its retry time."""
        return self.failure_code is not None and (self.retry_at is None or self.retry_at > now)


def written(row: Row[T], tokens: T) -> Row[T]:
    """Write new tokens: the row gets the next generation, and loses its lease and failure."""
    return Row(tokens, row.generation + 1)


def claimed(row: Row[T], *, generation: int, holder: str, now: int, duration: int) -> Row[T] | None:
    """Claim the lease. None (refused): another generation, a live lease, or a failure that forbids a refresh."""
    if row.generation != generation or row.is_leased(now) or row.has_failed(now):
        return None
    return replace(row, lease_holder=holder, lease_expires_at=now + duration)


def completed(row: Row[T], tokens: T, *, generation: int, holder: str, now: int) -> Row[T] | None:
    """Write the tokens that a refresh of this generation got. None (refused): another generation or live lease.

    A holder whose lease has expired is not refused: if the row still has the generation that it refreshed, its tokens
    may be the only copy of what the provider issued last.
    """
    if row.generation != generation or (row.is_leased(now) and row.lease_holder != holder):
        return None
    return written(row, tokens)


def released(
    row: Row[T], *, generation: int, holder: str, failure: tuple[str, int | None] | None = None
) -> Row[T] | None:
    """End this holder's lease. None (refused): another generation or holder.

    Args:
        row: The row.
        generation: The generation that was claimed.
        holder: The lease holder.
        failure: The code and the retry time (None: permanent) that later callers get, or None for no failure.
    """
    if row.generation != generation or row.lease_holder != holder:
        return None
    code, retry_at = failure or (None, None)
    return replace(row, lease_holder=None, lease_expires_at=None, failure_code=code, retry_at=retry_at)
