"""Row locks: the transaction that they need, what ends it, and the refresh under a lock."""

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
async def test_a_lock_needs_a_transaction(store: AuthTokenStore) -> None:
    """Outside one, for_update=True says what to write; the transaction's object is dead after its block."""
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
async def test_an_error_in_the_block_undoes_it(store: AuthTokenStore) -> None:
    """Nothing of the block stays, and the row can be locked again at once."""
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
    """After a lock that was not to be had, the block can only be left; no backend commits what came before."""
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
async def test_the_refresh_of_the_contract_happens_once(store: AuthTokenStore) -> None:
    """Of many that find the token expired, one refreshes under the lock; the others wait and read its tokens."""
    await store.store_tokens("github", "u1", "old", "rt-0", datetime.now(UTC) - HOUR)
    calls = 0

    async def worker() -> str:
        nonlocal calls
        async with store.transaction() as tx:
            record = await tx.load_tokens("github", "u1", for_update=True)
            assert record is not None
            if not store.is_access_token_valid(record):
                calls += 1
                await asyncio.sleep(0)  # the provider answers
                await tx.store_tokens("github", "u1", "new", "rt-1", datetime.now(UTC) + HOUR)
        return str((await load(store))["access_token"])

    assert await asyncio.gather(*(worker() for _ in range(25))) == ["new"] * 25
    assert calls == 1


class Lockless:
    """A backend without the optional ability, over one that has it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        if name in ("transaction", "lock"):
            raise AttributeError(name)
        return getattr(self._backend, name)


def test_a_backend_without_row_locks_says_so(keyring: Keyring) -> None:
    """Everything else works on it; for_update and transaction() name the reason."""

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
