"""A store on a session waits for a lease without holding the row's lock, which the lease holder needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from support.contract_example import CountingProvider, app, refresh_as_in_the_contract, seen, store_as_in_the_contract
from support.database import Place, app_engine
from support.matrix import each_database
from tokenstore import AuthTokenStore, ConflictError, Keyring, LockTimeoutError, UnsupportedOperationError, open_store
from tokenstore.records import TokenKey
from tokenstore.sealing import Sealer
from tokenstore.validation import to_epoch_us

# The example passes `datetime.utcnow()`, which is deprecated since Python 3.12.
pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")


@dataclass
class _Refresh:
    """Another process's refresh, which holds the row's lease and no row lock."""

    backend: Any
    keyring: Keyring
    generation: int = 0

    async def begin(self, duration: float = 60.0) -> None:
        row = await self.backend.get(_KEY)
        assert row is not None
        self.generation = row.generation
        assert await self.backend.claim_lease(_KEY, generation=row.generation, holder="engine", duration=duration)

    async def complete(self) -> None:
        tokens = Sealer(self.keyring).seal(
            _KEY,
            access_token="gho_1",
            refresh_token="ghr_1",
            extra=None,
            access_token_expires_at=to_epoch_us("", datetime.now(UTC) + timedelta(hours=8)),
            refresh_token_expires_at=None,
        )
        async with asyncio.timeout(1):  # callers that wait for the lease must not hold the row's lock
            assert await self.backend.complete_lease(_KEY, tokens, generation=self.generation, holder="engine")


_KEY = TokenKey("github", "user-123")


@asynccontextmanager
async def _no_transaction(session: AsyncSession) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def _begun(session: AsyncSession) -> AsyncIterator[None]:
    async with session.begin():
        yield


@asynccontextmanager
async def _begun_and_used(session: AsyncSession) -> AsyncIterator[None]:
    """The transaction has read the row, so at some isolation levels it would read the old row again."""
    async with session.begin():
        await session.execute(text("SELECT 1"))
        yield


_TRANSACTIONS = [_no_transaction, _begun, _begun_and_used]
Transaction = Callable[[AsyncSession], AbstractAsyncContextManager[None]]


@each_database
@pytest.mark.parametrize("pool_size", [1, 5])
@pytest.mark.parametrize("transaction", _TRANSACTIONS)
def test_a_locking_load_waits_for_a_lease_and_returns_the_refreshed_tokens(
    place: Place, transaction: Transaction, pool_size: int, keyring: Keyring
) -> None:
    """It holds no lock while it waits and has the lock afterwards; the provider is not called again."""

    async def main() -> None:
        async with app(place, keyring, pool_size=pool_size, max_overflow=0) as (engine, other):
            await store_as_in_the_contract(other)
            refresh = _Refresh(other._backend, keyring)
            await refresh.begin()
            provider = CountingProvider()

            async def use() -> None:
                async with AsyncSession(engine) as session, transaction(session):
                    store = AuthTokenStore(session, keyring=keyring, **place.options)
                    record = await store.load_tokens(**_KEY._asdict(), for_update=True)
                    assert record is not None
                    assert record["access_token"] == "gho_1"
                    assert session.in_transaction()
                    with pytest.raises(LockTimeoutError):
                        await _seen_at_once(place, keyring)
                    await refresh_as_in_the_contract(store, provider)

            user = asyncio.create_task(use())
            await asyncio.sleep(0.15)
            assert not user.done()
            await refresh.complete()
            completed = asyncio.get_running_loop().time()
            await user
            assert asyncio.get_running_loop().time() - completed < 2
            assert provider.calls == 0
            assert await seen(other) == "gho_1"
            await place.until_idle()

    asyncio.run(main())


async def _seen_at_once(place: Place, keyring: Keyring) -> str | None:
    async with open_store(place.url, keyring=keyring, lock_timeout=0.2) as impatient:
        return await seen(impatient)


@each_database
@pytest.mark.parametrize("transaction", _TRANSACTIONS)
def test_a_locking_load_waits_until_a_dead_holder_s_lease_expires(
    place: Place, transaction: Transaction, keyring: Keyring
) -> None:
    """After the lease has expired, the waiting caller gets the lock and refreshes."""

    async def main() -> None:
        async with app(place, keyring) as (engine, other):
            await store_as_in_the_contract(other)
            await _Refresh(other._backend, keyring).begin(duration=0.3)
            provider = CountingProvider()
            started = asyncio.get_running_loop().time()
            async with AsyncSession(engine) as session, transaction(session):
                store = AuthTokenStore(session, keyring=keyring, **place.options)
                await refresh_as_in_the_contract(store, provider)
            assert 0.25 < asyncio.get_running_loop().time() - started < 5
            assert provider.calls == 1
            assert await seen(other) == "gho_1"

    asyncio.run(main())


@each_database
@pytest.mark.parametrize("transaction", _TRANSACTIONS)
def test_lock_timeout_and_cancellation_end_a_locking_load_that_waits_for_a_lease(
    place: Place, transaction: Transaction, keyring: Keyring
) -> None:
    """The transaction also ends if the store began it."""

    async def main() -> None:
        async with app(place, keyring, pool_size=2, max_overflow=0) as (engine, other):
            pool: Any = engine.sync_engine.pool
            await store_as_in_the_contract(other)
            refresh = _Refresh(other._backend, keyring)
            await refresh.begin()

            entered = asyncio.Event()

            async def use(lock_timeout: float) -> None:
                async with AsyncSession(engine) as session:
                    store = AuthTokenStore(session, keyring=keyring, lock_timeout=lock_timeout, **place.options)
                    async with transaction(session):
                        entered.set()
                        try:
                            await store.load_tokens(**_KEY._asdict(), for_update=True)
                        finally:
                            assert session.in_transaction() is (transaction is not _no_transaction)

            started = asyncio.get_running_loop().time()
            with pytest.raises(LockTimeoutError, match="a refresh held the row's lease for longer than 1 s"):
                await use(1.0)
            assert 0.9 < asyncio.get_running_loop().time() - started < 2.5
            for delay in (0.01, 0.05, 0.2):
                entered.clear()
                user = asyncio.create_task(use(60.0))
                # Only the store's own call is cancelled: the test's SELECT may have to connect first,
                # and aiosqlite leaves a connection open whose connect is cancelled.
                await entered.wait()
                await asyncio.sleep(delay)
                user.cancel()
                await asyncio.wait([user], timeout=1)
                assert user.cancelled()
            assert pool.checkedout() == 0
            await refresh.complete()
            await place.until_idle()

    asyncio.run(main())


@each_database
def test_a_lease_claimed_just_before_the_lock_is_a_conflict_in_the_caller_s_transaction(
    place: Place, keyring: Keyring
) -> None:
    """The store must not roll back the caller's transaction, so it raises ConflictError; in its own it waits."""

    async def main() -> None:
        async with app(place, keyring) as (engine, other), app_engine(place) as holder:
            await store_as_in_the_contract(other)
            for transaction, expected in ((_begun, ConflictError), (_no_transaction, LockTimeoutError)):

                async def use(transaction: Transaction = transaction) -> None:
                    async with AsyncSession(engine) as session:
                        store = AuthTokenStore(session, keyring=keyring, lock_timeout=2, **place.options)
                        async with transaction(session):
                            await store.load_tokens(**_KEY._asdict(), for_update=True)

                async with holder.connect() as connection:
                    if place.row.mark == "sqlite":
                        await connection.exec_driver_sql("PRAGMA busy_timeout = 1000")
                    claim = f"UPDATE {place.table} SET lease_holder = 'engine', lease_expires_at = 2400000000000000"
                    await connection.execute(text(claim))
                    user = asyncio.create_task(use())
                    await place.until_waiting(open_store(engine, keyring=keyring, **place.options))
                    if place.row.mark == "sqlite":
                        await asyncio.sleep(0.1)  # by now the call has a connection and waits for the lock
                    await connection.commit()
                with pytest.raises(expected, match="refresh"):
                    await user
                await place.until_idle()
                await other.store_tokens(
                    **_KEY._asdict(), access_token="gho_abc", refresh_token="ghr_xyz", access_token_expires_at=None
                )

    asyncio.run(main())


@each_database
def test_locking_a_second_row_waits_for_its_lease_and_keeps_the_first_row_s_lock(
    place: Place, keyring: Keyring
) -> None:
    """The transaction was begun by an earlier call of the store, which locked the first row: it is not rolled back."""

    async def main() -> None:
        async with app(place, keyring) as (engine, other), AsyncSession(engine) as session:
            await store_as_in_the_contract(other)
            await other.store_tokens("github", "first", "t", None, None)
            await _Refresh(other._backend, keyring).begin(duration=0.3)
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            if place.row.mark == "sqlite":  # on SQLite the first lock covers all rows
                assert await store.load_tokens(**_KEY._asdict(), for_update=True)
            else:
                assert await store.load_tokens("github", "first", for_update=True)
                assert await store.load_tokens(**_KEY._asdict(), for_update=True)
                with pytest.raises(LockTimeoutError):
                    async with open_store(place.url, keyring=keyring, lock_timeout=0.2) as impatient:
                        await seen(impatient, "first")

    asyncio.run(main())


@each_database
def test_rollback_on_a_session_ends_only_a_transaction_that_the_store_began(place: Place, keyring: Keyring) -> None:
    """In the caller's own transaction, ``rollback()`` is refused."""

    async def main() -> None:
        async with app(place, keyring) as (engine, other), AsyncSession(engine) as session:
            await store_as_in_the_contract(other)
            backend: Any = AuthTokenStore(session, keyring=keyring, **place.options)._backend
            await backend.rollback()
            assert await backend.lock(_KEY)
            assert session.in_transaction()
            await backend.rollback()
            assert not session.in_transaction()
            assert await seen(other) == "gho_abc"
            async with session.begin():
                with pytest.raises(UnsupportedOperationError, match="application"):
                    await backend.rollback()
                assert session.in_transaction()

    asyncio.run(main())
