"""Row locks: the transaction that they need, how it ends, and a refresh under the lock."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from support.fresh_store import on_every_row
from support.store_calls import load
from tokenstore import (
    AuthTokenStore,
    Keyring,
    LockTimeoutError,
    StoreClosedError,
    TransactionRequiredError,
    UnsupportedOperationError,
    open_store,
)
from tokenstore.protocol import Backend

HOUR = timedelta(hours=1)


@on_every_row
async def test_for_update_outside_a_transaction_is_an_error(store: AuthTokenStore) -> None:
    """The error says what to write. After its block, a transaction object cannot be used any more."""
    with pytest.raises(TransactionRequiredError, match=r"async with store.transaction\(\) as tx"):
        await store.load_tokens("github", "u1", for_update=True)
    async with store.transaction() as tx:
        assert await tx.load_tokens("github", "u1", for_update=True) is None
        await tx.store_tokens("github", "u1", "at", "rt", None)
        assert await store.load_tokens("github", "u1") is None
    assert (await load(store))["access_token"] == "at"
    with pytest.raises(StoreClosedError, match="this transaction has ended"):
        await tx.load_tokens("github", "u1")


@on_every_row
async def test_an_error_in_the_block_rolls_the_transaction_back(store: AuthTokenStore) -> None:
    """Nothing of the block is stored, and the row can be locked again at once."""
    await store.store_tokens("github", "u1", "before", None, None)
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with store.transaction() as tx:
            await tx.load_tokens("github", "u1", for_update=True)
            await tx.store_tokens("github", "u1", "within", None, None)
            await tx.delete_tokens("github", "u1")
            raise ZeroDivisionError
    async with store.transaction() as tx:
        record = await tx.load_tokens("github", "u1", for_update=True)
        assert record is not None
        assert record["access_token"] == "before"


@on_every_row
async def test_a_failed_call_ends_the_transaction(store: AuthTokenStore) -> None:
    """After a lock timeout, further calls in the block raise an error, and no backend commits the earlier writes."""
    await store.store_tokens("github", "u1", "before", None, None)
    async with store.transaction() as holder:
        await holder.load_tokens("github", "u1", for_update=True)
        with pytest.raises(StoreClosedError, match="is rolled back"):  # noqa: PT012
            async with store.transaction() as tx:
                with pytest.raises(LockTimeoutError, match=r"u1|lock was not free"):
                    await tx.load_tokens("github", "u1", for_update=True)
                with pytest.raises(StoreClosedError, match="a call in this transaction failed"):
                    await tx.store_tokens("github", "u2", "lost", None, None)
    assert await store.load_tokens("github", "u2") is None


@on_every_row
async def test_of_many_callers_under_the_lock_one_refreshes(store: AuthTokenStore) -> None:
    """Each caller locks the row; the first one refreshes, and the others read its tokens after their wait."""
    await store.store_tokens("github", "u1", "old", "rt-0", datetime.now(UTC) - HOUR)
    calls = 0

    async def worker() -> str:
        nonlocal calls
        async with store.transaction() as tx:
            record = await tx.load_tokens("github", "u1", for_update=True)
            assert record is not None
            if not store.is_access_token_valid(record):
                calls += 1
                await asyncio.sleep(0)  # stands for the provider's call
                await tx.store_tokens("github", "u1", "new", "rt-1", datetime.now(UTC) + HOUR)
        return str((await load(store))["access_token"])

    assert await asyncio.gather(*(worker() for _ in range(25))) == ["new"] * 25
    assert calls == 1


class Lockless:
    """A backend that hides the row locks of another backend."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        if name in ("transaction", "lock"):
            raise AttributeError(name)
        return getattr(self._backend, name)


def test_without_row_locks_for_update_and_transaction_are_refused(keyring: Keyring) -> None:
    """The error names the reason; all other calls work on such a backend."""

    async def main() -> None:
        inner: Any = Lockless(open_store("memory://", keyring=keyring)._backend)
        async with AuthTokenStore(backend=inner, keyring=keyring) as store:
            await store.store_tokens("github", "u1", "at", None, None)
            assert (await load(store))["access_token"] == "at"
            with pytest.raises(UnsupportedOperationError, match="no row locks"):
                await store.load_tokens("github", "u1", for_update=True)
            with pytest.raises(UnsupportedOperationError, match="no transactions"):
                async with store.transaction():
                    pass

    asyncio.run(main())
