"""``revoke_tokens``: revoke a row's tokens at the provider (RFC 7009), then delete the row."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from contextlib import suppress
from copy import deepcopy
from typing import Any, Protocol, runtime_checkable

from tokenstore.errors import BackendError, RefreshTimeoutError, TokenStoreError
from tokenstore.records import TokenKey, TokenRecord, has_failed, is_leased
from tokenstore.refresh.callables import call_provider
from tokenstore.refresh.failures import not_revoked
from tokenstore.refresh.lease_watch import LeaseWatch
from tokenstore.refresh.loop_end import protect_lease_statement, protect_provider_call
from tokenstore.refresh.protected_task import Protection
from tokenstore.refresh.rows import delete_version, new_holder, read_row
from tokenstore.refresh.settings import Settings
from tokenstore.validation import RequestedRow

__all__ = ["Revocation", "SupportsRevocation"]


@runtime_checkable
class SupportsRevocation(Protocol):
    """A refresher that can be used for ``revoke_tokens``."""

    def revoke(self, record: TokenRecord, /) -> Awaitable[None] | None:
        """Revoke the record's tokens at the provider (RFC 7009). A plain function runs in a thread of its own.

        Tokens that the provider does not know are no error.
        """
        ...


class Revocation:
    """The revocation of one row's tokens.

    Args:
        settings: The store's settings.
        key: The row.
        refresher: Calls the provider.

    Attributes:
        raised: What the refresher raised, or None.
        protection: The protection of the task that runs the revocation. Once the provider is called, the end of the
            event loop waits until the tokens are deleted.
        still_running: A call of the provider that was given up, but goes on in its thread.
    """

    def __init__(self, settings: Settings, key: TokenKey, refresher: SupportsRevocation) -> None:
        self.raised: BaseException | None = None
        self.protection = Protection()
        self.still_running: asyncio.Future[Any] | None = None
        self._settings = settings
        self._backend = settings.backend
        self._key = key
        self._refresher = refresher

    async def run(self) -> bool:
        """Revoke and delete. Returns whether there was a row."""
        key, protection, timeout = self._key, self.protection, self._settings.timeout
        holder = new_holder(self._settings.lease)
        row = await self._keep_from_refreshing(holder)
        if row is None:
            return False
        leased = not has_failed(row)
        record = self._settings.sealer.open(key, row)
        # From here on the provider may have received the request. Tokens that it revokes have to be deleted, too.
        protect_provider_call(protection, timeout)
        failure: TokenStoreError | None = None
        try:
            async with asyncio.timeout(timeout):
                await call_provider(self._refresher.revoke, [deepcopy(record)], self._keep_running)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the row must not stay leased
            # A CancelledError is the refresher's own, such as that of a task that it awaited.
            self.raised, failure = error, not_revoked(key, error, record, self._refresher)
        except BaseException:
            await self._release(row.generation, holder)
            raise
        finally:
            protection.disown()
        if failure is not None:  # raised outside the handler: otherwise its context could show a token
            await self._release(row.generation, holder)
            raise failure
        deleted = await self._delete_surely(row.generation)
        if not deleted and not leased:
            # The row's failure has expired meanwhile, and another process has refreshed: revoke the new tokens, too.
            _ = await self.run()
        return True

    def _keep_running(self, call: asyncio.Future[Any]) -> None:
        self.still_running = call

    async def _keep_from_refreshing(self, holder: str) -> RequestedRow | None:
        """Keep other processes from refreshing the row: by a lease, or by a failure that the row already has."""
        deadline, leases = time.monotonic() + self._settings.wait, LeaseWatch(self._settings, self._key)
        while True:
            self.protection.lift()
            row = await read_row(self._backend, self._key)
            if row is None or has_failed(row):
                return row
            # Not only after the claim: a row that does not open would keep its lease.
            _ = self._settings.sealer.open(self._key, row)
            if not is_leased(row) and await self._claim(row.generation, holder):
                return row
            if time.monotonic() > deadline:
                raise RefreshTimeoutError(f"{self._key}: other refreshes kept the row's lease; repeat the call")
            await leases.wait(row)

    async def _claim(self, generation: int, holder: str) -> bool:
        """Claim the lease; if the event loop is ending, release it again."""
        protection = self.protection
        protect_lease_statement(protection)
        try:
            claimed = await self._backend.claim_lease(
                self._key, generation=generation, holder=holder, duration=self._settings.lease
            )
        except asyncio.CancelledError:
            if not protection.interrupted:
                raise
            claimed = True  # the database may have carried out the statement
        if claimed and protection.interrupted:
            await self._release(generation, holder)
            protection.lift()
        return claimed

    async def _release(self, generation: int, holder: str) -> None:
        protect_lease_statement(self.protection)
        with suppress(BackendError, asyncio.CancelledError):  # the lease expires by itself
            _ = await self._backend.release_lease(self._key, generation=generation, holder=holder)

    async def _delete_surely(self, generation: int) -> bool:
        """Delete the revoked tokens, even if the end of the event loop cancels tasks that the backend waits for."""
        self.protection.guard(grace=self._settings.timeout)
        while True:
            try:
                return await delete_version(self._backend, self._key, generation)
            except asyncio.CancelledError:
                if not (self.protection.interrupted and self.protection.holds):
                    raise
                await asyncio.sleep(0)
