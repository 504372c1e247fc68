"""One transaction of a store with connections of its own, or over an application's engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TypeVar

from tokenstore.cancellation import finish
from tokenstore.errors import BackendError, UnsupportedOperationError
from tokenstore.records import SealedMetadata, SealedRecord, SealedTokens, TokenKey
from tokenstore_sql.calls import Calls, Checkout, Operation, StoreCalls
from tokenstore_sql.connections.alchemy import AlchemyConnection
from tokenstore_sql.errors import mapped
from tokenstore_sql.rows import Rows

__all__ = ["SQLTransaction"]

T = TypeVar("T")


class _TransactionCalls(Calls):
    """Calls on one connection, which the first call takes from the pool and the end of the transaction gives back."""

    def __init__(self, calls: StoreCalls) -> None:
        super().__init__(calls.statements, calls.dialect, calls.statement_timeout)
        self._calls = calls
        self._held = AsyncExitStack()
        self._rows: Rows | None = None
        self._has_local_lock = False
        self._one_at_a_time = asyncio.Lock()

    async def run(self, keys: Sequence[Hashable], operation: Operation[T], *, write: bool) -> T:
        """Carry out an operation in the transaction."""
        self._calls.check_open()
        # A connection serves one statement at a time, whatever the tasks in the block do.
        async with self._one_at_a_time:
            return await self.once(keys, operation, write=write)

    async def commit(self) -> None:
        """Commit, if there was a call."""
        if self._rows is not None:
            await self.once([], _commit, write=False)

    async def rollback(self) -> None:
        """Undo everything so far. The next call begins anew."""
        async with self._one_at_a_time:
            await finish(self.end())

    async def end(self) -> None:
        """Give back the connection and the local lock. What was not committed is rolled back."""
        held, self._rows, self._has_local_lock = self._held.pop_all(), None, False
        # If the roll-back fails, the connection is closed, and the server rolls back.
        with suppress(BackendError):
            await mapped(self.dialect.errors, lambda: self.about([]), held.aclose)

    @asynccontextmanager
    async def _connected(self, keys: Sequence[Hashable], *, write: bool) -> AsyncIterator[Rows]:
        if write and not self._has_local_lock:
            # Only for the first lock: the database cannot detect a dead-lock with a task that holds a row's lock and
            # waits for a local one.
            self._has_local_lock = True
            await self._held.enter_async_context(self._calls.local_lock(keys))
        if self._rows is None:
            checkout = Checkout(self._calls, transactional=True, write=True)
            self._rows = await self._held.enter_async_context(checkout)
        yield self._rows


async def _commit(rows: Rows) -> None:
    if rows.connection.in_transaction:
        await finish(rows.connection.commit())


class SQLTransaction:
    """See :class:`tokenstore.protocol.BackendTransaction`.

    Args:
        calls: The store's calls, which lend the connection.
    """

    def __init__(self, calls: StoreCalls) -> None:
        self._calls = _TransactionCalls(calls)

    async def get(self, key: TokenKey) -> SealedRecord | None:
        return await self._calls.run([key], lambda rows: rows.get(key), write=False)

    async def lock(self, key: TokenKey) -> SealedRecord | None:
        async def lock(rows: Rows) -> SealedRecord | None:
            connection = rows.connection
            if isinstance(connection, AlchemyConnection) and not await self._calls.dialect.holds_locks(
                connection.alchemy
            ):
                raise UnsupportedOperationError(
                    "the engine's connections are in autocommit mode, in which no row lock outlives its statement"
                )
            return await rows.lock(key)

        return await self._calls.run([key], lock, write=True)

    async def put(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> None:
        await self._calls.run([key], lambda rows: rows.put(key, tokens, metadata), write=True)

    async def insert(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> bool:
        return await self._calls.run([key], lambda rows: rows.insert(key, tokens, metadata), write=True)

    async def set_metadata(self, key: TokenKey, metadata: SealedMetadata, *, replacing: bytes | None) -> bool:
        return await self._calls.run(
            [key], lambda rows: rows.set_metadata(key, metadata, replacing=replacing), write=True
        )

    async def delete(self, key: TokenKey) -> bool:
        return await self._calls.run([key], lambda rows: rows.delete(key), write=True)

    async def clock(self) -> int:
        return await self._calls.run([], lambda rows: rows.clock(), write=False)

    async def rollback(self) -> None:
        await self._calls.rollback()

    async def commit(self) -> None:
        """Commit what the calls have written."""
        await self._calls.commit()

    async def end(self) -> None:
        """Give back the connection and all locks. What was not committed is rolled back."""
        await self._calls.end()
