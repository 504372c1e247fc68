"""Waiting for another refresh's lease, for no longer than the lease can last."""

from __future__ import annotations

import time
from contextlib import suppress

from tokenstore.errors import BackendError
from tokenstore.leases import wait_for_lease
from tokenstore.records import SealedRecord, TokenKey
from tokenstore.refresh.rows import lease_of
from tokenstore.refresh.settings import Settings

__all__ = ["LeaseWatch"]


class LeaseWatch:
    """Watches the leases of other refreshes on one row.

    If the database's clock is set back by an hour, a lease that a dead process has left behind lasts an hour longer. So
    a lease is ended after it has been seen for its whole duration, by this machine's monotonic clock. Its holder's call
    of the provider has ended by then.

    Args:
        settings: The store's settings.
        key: The row.
    """

    def __init__(self, settings: Settings, key: TokenKey) -> None:
        self._settings = settings
        self._key = key
        self._lease: tuple[str | None, int] | None = None
        self._seen_at = 0.0

    async def wait(self, row: SealedRecord) -> None:
        """Wait until the row, which has a live lease, is worth reading again."""
        lease, now = (row.lease_holder, row.generation), time.monotonic()
        if lease != self._lease:
            self._lease, self._seen_at = lease, now
        if row.lease_holder is None or now - self._seen_at < lease_of(row.lease_holder):
            await wait_for_lease(self._settings.backend, row)
            return
        self._settings.telemetry.problem(
            self._key, "lease_outlasted", "a lease outlasted its duration: the database's clock was set back"
        )
        self._seen_at = now  # if the lease cannot be ended, the next try comes after another duration
        with suppress(BackendError):
            _ = await self._settings.backend.release_lease(
                self._key, generation=row.generation, holder=row.lease_holder
            )
