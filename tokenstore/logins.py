"""Stores the token response of a login, together with what the stored row knows and the response does not tell."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final

from tokenstore.errors import ConflictError, LockTimeoutError, RefreshError, SealingError
from tokenstore.leases import wait_for_lease
from tokenstore.protocol import Backend, RowOperations
from tokenstore.records import SealedMetadata, SealedRecord, SealedTokens, TokenKey, TokenRecord, is_leased
from tokenstore.refresh.kept import Kept, kept_at_login
from tokenstore.refresh.responses import read_response, response_fields
from tokenstore.refresh.rows import new_holder
from tokenstore.sealing import Sealer
from tokenstore.validation import RequestedRow, requested_row

__all__ = ["Login"]

# Compare-and-sets that may fail before the deadline counts: each failure means that another write succeeded.
_TRIES: Final = 20


class Login:
    """One token response of a login.

    Args:
        sealer: The keys and the namespace.
        key: The row.
        response: The token response.
        default_lifetime: The lifetime, in seconds, of an access token whose response and row tell none.
        keep_refresh_token: Whether a response without a refresh token keeps the stored one.
        if_absent: Whether a row that exists stays as it is.
        metadata: Replaces the row's metadata. None: it stays as it is.

    Raises:
        InvalidInputError: The response is not a mapping, or has no acceptable access token.
        RefreshError: The response is an error of RFC 6749.
    """

    def __init__(
        self,
        sealer: Sealer,
        key: TokenKey,
        response: object,
        *,
        default_lifetime: float | None,
        keep_refresh_token: bool,
        if_absent: bool,
        metadata: SealedMetadata | None = None,
    ) -> None:
        refused: RefreshError | None = None
        try:
            self._fields = response_fields(response)
        except RefreshError as error:
            refused = type(error)(
                f"{key}: the token response is an error of the provider ({error.code}); nothing was stored",
                code=error.code,
            )
            refused.provider, refused.user_id, refused.account = key
        if refused is not None:
            raise refused  # outside the handler: no context
        self._sealer = sealer
        self._key = key
        self._default_lifetime = default_lifetime
        self._keep_refresh_token = keep_refresh_token
        self._if_absent = if_absent
        self._metadata = metadata
        issued = read_response(self._fields, Kept(), 0)
        # If not, a refresh that replaces the stored refresh token meanwhile makes no difference to what is written.
        self._needs_stored = keep_refresh_token and issued.refresh_token is None and not if_absent

    async def store_locked(
        self, rows: RowOperations, lock: Callable[[TokenKey], Awaitable[SealedRecord | None]]
    ) -> TokenRecord:
        """Store it in a transaction that can hold the row's lock.

        Args:
            rows: The rows in the transaction.
            lock: Locks and reads a row, once no refresh holds its lease.
        """
        read = lock if self._needs_stored else rows.get

        async def replace(_: SealedRecord, tokens: SealedTokens) -> bool:
            await rows.put(self._key, tokens, metadata=self._metadata)
            return True

        return await self._store(rows, read, replace, time.monotonic())

    async def store(self, backend: Backend, limit: float) -> TokenRecord:
        """Store it by compare-and-set.

        Args:
            backend: The rows.
            limit: The longest wait for the end of another process's refresh, in seconds.

        Raises:
            LockTimeoutError: The refresh did not end within ``limit``.
        """
        deadline = time.monotonic() + limit

        async def replace(row: SealedRecord, tokens: SealedTokens) -> bool:
            if not self._needs_stored:
                await backend.put(self._key, tokens, metadata=self._metadata)
                return True
            if is_leased(row):
                # The lease holder may be about to replace the refresh token that this response leaves as it is.
                if time.monotonic() > deadline:
                    raise LockTimeoutError(
                        f"{self._key}: a refresh held the row's lease for longer than {limit:g} s; repeat the call"
                    )
                await wait_for_lease(backend, row, deadline - time.monotonic())
                return False
            holder = new_holder(limit)
            return await backend.complete_lease(
                self._key, tokens, generation=row.generation, holder=holder, metadata=self._metadata
            )

        return await self._store(backend, backend.get, replace, deadline)

    async def _store(
        self,
        rows: RowOperations,
        read: Callable[[TokenKey], Awaitable[SealedRecord | None]],
        replace: Callable[[SealedRecord, SealedTokens], Awaitable[bool]],
        deadline: float,
    ) -> TokenRecord:
        tries = 0
        while True:
            row = await read(self._key)
            if row is None or row.tokens.is_empty:
                tokens = self._sealed(None, await rows.clock())
                done = await rows.insert(self._key, tokens, metadata=self._metadata)
            elif self._if_absent:
                return self._opened(row)
            else:
                record, now = await self._known(rows, row)
                done = await replace(row, self._sealed(record, now))
            if done:
                break
            tries += 1
            if tries >= _TRIES and time.monotonic() > deadline:
                raise ConflictError(f"{self._key}: other writes of the row came first; repeat the call")
        stored = await rows.get(self._key)
        if stored is None or stored.tokens.is_empty:
            raise ConflictError(f"{self._key}: the row was deleted just after the tokens were stored")
        return self._opened(stored)

    async def _known(self, rows: RowOperations, row: SealedRecord) -> tuple[TokenRecord | None, int]:
        """The stored row's record, and the database's clock.

        A row that was altered, or whose key is lost, knows nothing: the user's new login replaces it. Only if the
        response leaves the refresh token as it is, the error says that there is none that can be read.
        """
        try:
            return self._opened(row), row.as_of
        except SealingError:
            if self._needs_stored:
                raise
        return None, await rows.clock()

    def _opened(self, row: SealedRecord) -> TokenRecord:
        checked: RequestedRow | None = requested_row(self._key, row)
        assert checked is not None  # noqa: S101  # for the type checkers: there is a row
        # No login brings lost metadata back, so they are no reason to refuse one.
        return self._sealer.open(self._key, checked, despite_metadata=True)

    def _sealed(self, record: TokenRecord | None, issued_at: int) -> SealedTokens:
        kept = kept_at_login(record, self._fields, self._default_lifetime, keep_refresh_token=self._keep_refresh_token)
        return read_response(self._fields, kept, issued_at).sealed(self._sealer, self._key)
