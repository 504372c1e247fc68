"""The statements of one refresh on its row, sent so that a dead connection or a lost answer does not stop it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Final, TypeVar

from tokenstore.errors import BackendError, BackendUnavailableError, ConflictError, LockTimeoutError
from tokenstore.records import EMPTY_ROW_LIFETIME, Failure, SealedTokens, TokenKey, empty_tokens
from tokenstore.refresh.backoff import Backoff
from tokenstore.refresh.protected_task import Protection
from tokenstore.refresh.settings import Settings
from tokenstore.validation import RequestedRow, requested_row

__all__ = ["TRANSIENT_ERRORS", "RowStatements"]

T = TypeVar("T")

_US = 1_000_000

TRANSIENT_ERRORS: Final[tuple[type[BackendError], ...]] = (BackendUnavailableError, ConflictError, LockTimeoutError)
"""After these a statement may succeed on the next try."""


class RowStatements:
    """One row, and the statements on it that a refresh needs.

    A statement without an answer within ``refresh_timeout`` raises ``BackendUnavailableError``: its connection may be
    dead, and another one of the pool alive.

    Args:
        settings: The store's settings.
        key: The row.
        protection: The protection of the task that sends the statements.
    """

    def __init__(self, settings: Settings, key: TokenKey, protection: Protection) -> None:
        self._settings = settings
        self._backend = settings.backend
        self._key = key
        self._protection = protection

    async def get(self) -> RequestedRow | None:
        """Read the row."""
        return requested_row(self._key, await self._answer(self._backend.get(self._key)), empty=True)

    async def insert_empty(self) -> None:
        """Insert an empty row, if there is no row."""
        deleted_at = await self._answer(self._backend.clock()) + round(EMPTY_ROW_LIFETIME * _US)
        _ = await self._answer(self._backend.insert(self._key, empty_tokens(deleted_at)))

    async def claim(self, generation: int, holder: str) -> bool:
        """Claim the lease. Returns whether it was granted."""
        duration = self._settings.lease
        return await self._answer(
            self._backend.claim_lease(self._key, generation=generation, holder=holder, duration=duration)
        )

    async def complete(self, tokens: SealedTokens, generation: int, holder: str, limit: float) -> bool:
        """Write new tokens, with an answer within ``limit`` seconds. Returns whether they were written."""
        return await self._answer(
            self._backend.complete_lease(self._key, tokens, generation=generation, holder=holder), limit
        )

    async def release(self, generation: int, holder: str, failure: Failure | None) -> bool:
        """End the lease, and store the failure for later callers if there is one; try again after a transient error.

        Returns:
            Whether the lease was this holder's and was ended.
        """
        backoff = Backoff()
        answer_lost = False
        while True:
            try:
                released = await self._answer(
                    self._backend.release_lease(self._key, generation=generation, holder=holder, failure=failure)
                )
                if released or not answer_lost or failure is None:
                    return released
                return await self._is_stored(failure, generation)
            except TRANSIENT_ERRORS as error:
                answer_lost = True
                await backoff.pause(error)

    async def _is_stored(self, failure: Failure, generation: int) -> bool:
        """Whether the row has the failure: an earlier release was carried out, and its answer was lost."""
        row = await self.get()
        if row is None or row.generation != generation or row.lease_holder is not None:
            return False
        return row.failure is not None and row.failure.code == failure.code

    async def _answer(self, call: Awaitable[T], limit: float | None = None) -> T:
        limit = limit or self._settings.timeout
        scope = asyncio.timeout(limit)
        try:
            async with scope:
                return await call
        except TimeoutError:
            if not scope.expired():
                raise
        except asyncio.CancelledError:
            if not self._protection.holds:
                raise
            # The end of the event loop has not cancelled this task, which is protected, but a task of the backend's.
            raise BackendUnavailableError(f"{self._key}: the event loop has cancelled the statement") from None
        raise BackendUnavailableError(f"{self._key}: no answer of the database within {limit:g} s")
