"""Leases: what one statement does to them, and how to lock a row that has none.

A row's *lease* is a claim on the row by one refresh, the lease holder. A row's *generation* is a number that changes
with every write of tokens.

The functions on :class:`Row` describe each statement without a database. The memory backend runs them as they are, and
the tests compare every other backend with them. They do not wait or read a clock, so that tests can search every
interleaving of several refreshes. Their times are whole numbers by the database's clock, in the caller's unit.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, Generic, TypeVar

from tokenstore.errors import ConflictError, LockTimeoutError
from tokenstore.protocol import SupportsWatching
from tokenstore.records import SealedRecord, TokenKey, is_leased
from tokenstore.validation import requested_row

__all__ = ["Row", "claimed", "cleared", "completed", "lock_unleased", "released", "wait_for_lease", "written"]

T = TypeVar("T")

# Between two reads of a leased row on a backend that cannot watch it, and beyond a lease's end, in seconds.
_POLL_INTERVAL: Final = 0.02
_LONGEST_WAIT: Final = 1.0

# -- what one statement does to a row ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row(Generic[T]):
    """The parts of a stored row that the refresh protocol uses."""

    tokens: T
    generation: int
    lease_holder: str | None = None
    lease_expires_at: int | None = None
    failure_code: str | None = None
    retry_at: int | None = None
    failed_at: int | None = None

    @property
    def is_dead(self) -> bool:
        """Whether the row has a failure that forbids a refresh until new tokens are written."""
        return self.failure_code is not None and self.retry_at is None

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
    row: Row[T], *, generation: int, holder: str, now: int, failure: tuple[str, int | None] | None = None
) -> Row[T] | None:
    """End this holder's lease. None (refused): another generation or holder.

    Args:
        row: The row.
        generation: The generation that was claimed.
        holder: The lease holder.
        now: The time.
        failure: The code and the retry time (None: permanent) that later callers get, or None for no failure.
    """
    if row.generation != generation or row.lease_holder != holder:
        return None
    code, retry_at = failure or (None, None)
    failed_at = None if failure is None else now
    return Row(row.tokens, row.generation, failure_code=code, retry_at=retry_at, failed_at=failed_at)


def cleared(row: Row[T], *, now: int, min_age: int) -> Row[T] | None:
    """Clear the failure. None (refused): there is none, or it is younger than ``min_age``."""
    if row.failed_at is None or row.failed_at > now - min_age:
        return None
    return replace(row, failure_code=None, retry_at=None, failed_at=None)


# -- waiting for the end of a lease -------------------------------------------------------------------


async def wait_for_lease(backend: object, row: SealedRecord, limit: float = _LONGEST_WAIT) -> None:
    """Wait until a row with a live lease is worth reading again, and not beyond the end of the lease.

    Args:
        backend: Watches the row, if it can (:class:`tokenstore.protocol.SupportsWatching`).
        row: The row as it was read.
        limit: The longest wait, in seconds.
    """
    # Imported here: they make up most of the time of `import tokenstore`, and the caller's event loop has loaded both.
    import asyncio
    import random

    if row.lease_expires_in is not None:
        limit = min(limit, max(row.lease_expires_in, 0.0) + _POLL_INTERVAL)
    with suppress(TimeoutError):
        async with asyncio.timeout(min(limit, _LONGEST_WAIT)):
            if isinstance(backend, SupportsWatching):
                # Whatever the watch raised, it must not end the caller, which may hold new tokens that are not stored.
                with suppress(Exception):
                    await backend.watch(row.key)
                    return
            await asyncio.sleep(_POLL_INTERVAL * random.uniform(1.0, 1.5))  # noqa: S311 - spreads a fleet's reads


async def lock_unleased(
    key: TokenKey,
    *,
    lock: Callable[[], Awaitable[SealedRecord | None]],
    read: Callable[[], Awaitable[SealedRecord | None]],
    unlock: Callable[[], Awaitable[None]] | None,
    wait: Callable[[SealedRecord, float], Awaitable[None]],
    lock_timeout: float,
) -> SealedRecord | None:
    """Lock a row that has no live lease; wait for the lease to end without the lock, which its holder needs to end it.

    Args:
        key: The row.
        lock: Takes the row's lock, and reads the row.
        read: Reads the row without its lock. Only called without ``unlock``.
        unlock: Gives the lock up again by a rollback. None if the transaction has other locks or writes, which a
            rollback would lose; then the row is read before it is locked.
        wait: Waits until a leased row is worth reading again, for at most so many seconds: :func:`wait_for_lease`.
        lock_timeout: The longest wait for the end of a lease, in seconds.

    Returns:
        The locked row, or None if there is none.

    Raises:
        TamperedError: The database answered with another row.
        LockTimeoutError: The lease did not end within ``lock_timeout``.
        ConflictError: Without ``unlock``: a lease began between the read and the lock.
        BackendError: The database refused or failed.
    """
    deadline = time.monotonic() + lock_timeout
    while True:
        if unlock is not None:
            row = requested_row(key, await lock(), empty=True)
            if not is_leased(row):
                return row
            await unlock()
        else:
            row = requested_row(key, await read(), empty=True)
            if not is_leased(row):
                row = requested_row(key, await lock(), empty=True)
                if is_leased(row):
                    raise ConflictError(f"{key}: a refresh began at this moment; repeat the transaction")
                return row
        left = deadline - time.monotonic()
        if left <= 0:
            raise LockTimeoutError(
                f"{key}: a refresh held the row's lease for longer than {lock_timeout:g} s; repeat the call"
            )
        await wait(row, left)
