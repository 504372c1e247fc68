"""A store's own transactions."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from tokenstore.errors import BackendError, StoreClosedError
from tokenstore.leases import lock_unleased, wait_for_lease
from tokenstore.operations import Clock, TokenOperations
from tokenstore.protocol import Backend, BackendTransaction
from tokenstore.records import SealedMetadata, SealedRecord, SealedTokens, TokenKey, TokenRecord
from tokenstore.sealing import Sealer

if TYPE_CHECKING:
    from tokenstore.logins import Login

__all__ = ["RowsUntilFailure", "Transaction"]

T = TypeVar("T")


class RowsUntilFailure:
    """The rows of an open transaction, and the first error of a statement on them.

    After an error the transaction is not used any more, because databases differ in what is left of it.

    Args:
        rows: The backend's transaction.
        backend: The backend.
        lock_timeout: The longest wait for the end of a lease, in seconds.

    Attributes:
        failure: The first error, or None.
    """

    def __init__(self, rows: BackendTransaction, backend: Backend, lock_timeout: float) -> None:
        self._rows = rows
        self._backend = backend
        self._lock_timeout = lock_timeout
        self._begun = False
        self.failure: BackendError | None = None

    async def get(self, key: TokenKey) -> SealedRecord | None:
        """Read one row."""
        return await self._note_failure(self._rows.get(key))

    async def lock(self, key: TokenKey) -> SealedRecord | None:
        """Lock and read one row, once no refresh holds its lease."""
        row = await self._note_failure(
            lock_unleased(
                key,
                lock=lambda: self._rows.lock(key),
                read=lambda: self._rows.get(key),
                # A rollback would also give up the locks and writes of earlier calls.
                unlock=None if self._begun else self._rows.rollback,
                wait=partial(wait_for_lease, self._backend),
                lock_timeout=self._lock_timeout,
            )
        )
        self._begun = True
        return row

    async def lock_despite_lease(self, key: TokenKey) -> SealedRecord | None:
        """Lock and read one row, also while a refresh holds its lease, for a write that the refresh does not notice."""
        self._begun = True
        return await self._note_failure(self._rows.lock(key))

    async def put(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> None:
        """Insert or replace one row."""
        self._begun = True
        await self._note_failure(self._rows.put(key, tokens, metadata=metadata))

    async def insert(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> bool:
        """Insert one row if there is none."""
        self._begun = True
        return await self._note_failure(self._rows.insert(key, tokens, metadata=metadata))

    async def set_metadata(self, key: TokenKey, metadata: SealedMetadata, *, replacing: bytes | None) -> bool:
        """Replace one row's metadata, if its sealed value is still this one."""
        self._begun = True
        return await self._note_failure(self._rows.set_metadata(key, metadata, replacing=replacing))

    async def delete(self, key: TokenKey) -> bool:
        """Delete one row."""
        self._begun = True
        return await self._note_failure(self._rows.delete(key))

    async def clock(self) -> int:
        """Read the database's clock."""
        return await self._note_failure(self._rows.clock())

    async def _note_failure(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except BackendError as failure:
            self.failure = failure
            raise


class Transaction(TokenOperations):
    """One open transaction of a store, from ``async with store.transaction() as tx``.

    It is an object and not a context variable, so that tasks that are started inside the block do not take part in it
    by accident. After a :class:`BackendError` the block can only be left: the transaction is rolled back, and leaving
    the block without an exception raises an error.
    """

    def __init__(self, rows: RowsUntilFailure, sealer: Sealer, clock: Clock, refreshers: Mapping[str, object]) -> None:
        self._open_rows: RowsUntilFailure | None = rows
        self._sealer = sealer
        self._clock = clock
        self._refreshers = refreshers

    def _rows(self) -> RowsUntilFailure:
        if self._open_rows is None:
            raise StoreClosedError("this transaction has ended; open another with `async with store.transaction()`")
        self._check()
        return self._open_rows

    def _check(self) -> None:
        if self._open_rows is not None and self._open_rows.failure is not None:
            raise StoreClosedError(
                "a call in this transaction failed, so it is rolled back; start again with a new transaction"
            )

    async def _store_login(self, login: Login) -> TokenRecord:
        rows = self._rows()
        return await login.store_locked(rows, rows.lock)

    async def _lock(self, key: TokenKey) -> SealedRecord | None:
        return await self._rows().lock(key)

    async def _read_for_metadata(self, key: TokenKey) -> SealedRecord | None:
        return await self._rows().lock_despite_lease(key)

    def _end(self) -> None:
        self._open_rows = None
