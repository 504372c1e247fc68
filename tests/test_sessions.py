"""A store on an application's own session: the contract's example, and whose transaction it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import String

from matrix import Row, params, shared_rows
from tokenstore import (
    AuthTokenStore,
    ConflictError,
    Keyring,
    LockTimeoutError,
    TableMissingError,
    TokenStoreError,
    UnsupportedOperationError,
    open_store,
)
from tokenstore.records import TokenKey
from tokenstore.sealing import seal_tokens
from tokenstore.validation import to_epoch_us
from watch import Place, app_engine

three_rows = pytest.mark.parametrize("row", params(names=["sqlite", "postgresql+asyncpg", "mariadb+asyncmy"]))
"""One row of each database."""

# `datetime.utcnow()` is what the contract's users write, and deprecated since Python 3.12.
pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")


@pytest.fixture
def place(row: Row, url: str) -> Place:
    return Place(row, url)


class _Provider:
    """Counts its refreshes; whoever uses an old refresh token fails."""

    def __init__(self, *, fails: bool = False) -> None:
        self.current = "ghr_xyz"
        self.calls = 0
        self.fails = fails

    async def refresh(self, refresh_token: str) -> dict[str, Any]:
        self.calls += 1
        assert refresh_token == self.current, "a refresh token was used twice"
        await asyncio.sleep(0)
        if self.fails:
            raise ConnectionError("the provider is down")
        self.current = f"ghr_{token_hex(4)}"
        return {
            "access_token": f"gho_{self.calls}",
            "refresh_token": self.current,
            "expires_at": datetime.utcnow() + timedelta(hours=8),
        }


async def _refresh_as_in_the_contract(store: AuthTokenStore, provider: _Provider) -> None:
    """The three steps, word for word."""
    record = await store.load_tokens(provider="github", user_id="user-123", for_update=True)
    if record and not store.is_access_token_valid(record) and store.is_refresh_token_valid(record):
        assert record["refresh_token"] is not None
        new = await provider.refresh(record["refresh_token"])
        await store.store_tokens(
            provider="github",
            user_id="user-123",
            access_token=new["access_token"],
            refresh_token=new["refresh_token"],
            access_token_expires_at=new["expires_at"],
        )


async def _store_as_in_the_contract(store: AuthTokenStore, *, expired: bool = True) -> None:
    await store.store_tokens(
        provider="github",
        user_id="user-123",
        access_token="gho_abc",
        refresh_token="ghr_xyz",
        access_token_expires_at=datetime.utcnow() + timedelta(hours=-1 if expired else 8),
        refresh_token_expires_at=datetime.utcnow() + timedelta(days=180),
    )


@asynccontextmanager
async def _app(place: Place, keyring: Keyring, **arguments: Any) -> AsyncIterator[tuple[AsyncEngine, AuthTokenStore]]:
    """An application's engine, and another process's store to look with; the table exists."""
    async with (
        open_store(place.url, keyring=keyring, lock_timeout=2) as other,
        app_engine(place, **arguments) as engine,
    ):
        await other.setup()
        yield engine, other


async def _seen(other: AuthTokenStore, user_id: str = "user-123") -> str | None:
    """What another process sees; it also shows that no lock remains."""
    async with other.transaction() as tx:
        record = await tx.load_tokens("github", user_id, for_update=True)
    return None if record is None else str(record["access_token"])


# ---- The contract's example

Use = Callable[[Any], Awaitable[None]]


async def _in_a_session(engine: AsyncEngine, use: Use) -> None:
    async with AsyncSession(engine) as session:
        await use(session)


async def _in_a_session_that_keeps_objects(engine: AsyncEngine, use: Use) -> None:
    async with async_sessionmaker(engine, expire_on_commit=False)() as session:
        await use(session)


async def _in_a_scoped_session(engine: AsyncEngine, use: Use) -> None:
    scoped = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
    try:
        await use(scoped)
    finally:
        await scoped.remove()


async def _in_a_session_without_autobegin(engine: AsyncEngine, use: Use) -> None:
    async with AsyncSession(engine, autobegin=False) as session, session.begin():
        await use(session)


async def _in_a_begun_session(engine: AsyncEngine, use: Use) -> None:
    async with AsyncSession(engine) as session, session.begin():
        await use(session)


async def _in_an_autobegun_session(engine: AsyncEngine, use: Use) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(text("SELECT 1"))
        await use(session)
        await session.commit()


async def _in_a_session_on_a_connection(engine: AsyncEngine, use: Use) -> None:
    async with engine.connect() as connection:
        async with AsyncSession(connection) as session:
            await use(session)
        await connection.commit()


WAYS = [
    _in_a_session,
    _in_a_session_that_keeps_objects,
    _in_a_scoped_session,
    _in_a_session_without_autobegin,
    _in_a_begun_session,
    _in_an_autobegun_session,
    _in_a_session_on_a_connection,
]


@three_rows
@pytest.mark.parametrize("way", WAYS)
def test_the_contract_s_example_word_for_word(
    place: Place, way: Callable[[AsyncEngine, Use], Awaitable[None]], keyring: Keyring
) -> None:
    """Stored and refreshed tokens are there for another process, no lock remains, and the provider is called once."""

    async def main() -> None:
        provider = _Provider()
        async with _app(place, keyring) as (engine, other):

            async def use(session: Any) -> None:
                store = AuthTokenStore(db_session=session, keyring=keyring, **place.options)
                await _store_as_in_the_contract(store)
                await _refresh_as_in_the_contract(store, provider)
                await _refresh_as_in_the_contract(store, provider)
                record = await store.load_tokens(provider="github", user_id="user-123")
                assert record is not None
                assert record["access_token"] == "gho_1"
                assert store.is_access_token_valid(record)

            await way(engine, use)
            assert provider.calls == 1
            assert await _seen(other) == "gho_1"
            await place.until_idle()

    asyncio.run(main())


@three_rows
def test_a_store_s_own_transaction_is_committed_at_once(place: Place, keyring: Keyring) -> None:
    """Before the session is closed, or anything else is called, another process sees what was stored."""

    async def main() -> None:
        async with _app(place, keyring) as (engine, other), AsyncSession(engine) as session:
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            await _store_as_in_the_contract(store)
            assert await _seen(other) == "gho_abc"
            await _refresh_as_in_the_contract(store, _Provider())
            assert await _seen(other) == "gho_1"
            assert not session.in_transaction()

    asyncio.run(main())


@shared_rows
def test_twenty_sessions_at_once_call_the_provider_once(place: Place, keyring: Keyring) -> None:
    """Each waits for the row, then reads the tokens that the first one stored."""

    async def main() -> None:
        provider = _Provider()
        # The limit on connections is the application's own.
        async with _app(place, keyring, pool_size=20) as (engine, other):

            async def worker() -> str:
                async with AsyncSession(engine) as session:
                    store = AuthTokenStore(db_session=session, keyring=keyring, **place.options)
                    await _refresh_as_in_the_contract(store, provider)
                    record = await store.load_tokens("github", "user-123")
                    assert record is not None
                    return str(record["access_token"])

            async with AsyncSession(engine) as session:
                await _store_as_in_the_contract(AuthTokenStore(session, keyring=keyring, **place.options))
            assert await asyncio.gather(*(worker() for _ in range(20))) == ["gho_1"] * 20
            assert provider.calls == 1
            assert await _seen(other) == "gho_1"

    asyncio.run(main())


@three_rows
def test_a_second_worker_waits_and_reads_the_first_one_s_tokens(place: Place, keyring: Keyring) -> None:
    """While the first is at the provider the second waits in the database; it makes no call of its own."""

    async def main() -> None:
        called, answer = asyncio.Event(), asyncio.Event()

        class Slow(_Provider):
            async def refresh(self, refresh_token: str) -> dict[str, Any]:
                called.set()
                await answer.wait()
                return await super().refresh(refresh_token)

        provider = Slow()
        async with _app(place, keyring) as (first_engine, other), app_engine(place) as second_engine:
            await _store_as_in_the_contract(other)

            async def worker(engine: AsyncEngine) -> None:
                async with AsyncSession(engine) as session:
                    await _refresh_as_in_the_contract(
                        AuthTokenStore(session, keyring=keyring, **place.options), provider
                    )

            first = asyncio.create_task(worker(first_engine))
            await called.wait()
            second = asyncio.create_task(worker(second_engine))
            await place.until_waiting(open_store(second_engine, keyring=keyring, **place.options))
            answer.set()
            await asyncio.gather(first, second)
            assert provider.calls == 1
            assert await _seen(other) == "gho_1"

    asyncio.run(main())


# ---- Whose transaction


@shared_rows
def test_in_a_caller_s_transaction_nothing_is_committed_before_the_caller_does(place: Place, keyring: Keyring) -> None:
    """Stores, loads and locks take part; another process sees the old row until the caller's commit."""

    async def main() -> None:
        async with _app(place, keyring) as (engine, other):
            await _store_as_in_the_contract(other)
            async with AsyncSession(engine) as session:
                store = AuthTokenStore(session, keyring=keyring, **place.options)
                async with session.begin():
                    await _refresh_as_in_the_contract(store, _Provider())
                    await store.store_tokens("github", "new", "t", None, None)
                    await store.load_tokens("github", "user-123")
                    assert await store.delete_tokens("github", "new")
                    await store.store_tokens("github", "new", "t", None, None)
                    assert session.in_transaction()
                    record = await other.load_tokens("github", "user-123")
                    assert record is not None
                    assert record["access_token"] == "gho_abc"
                    assert await other.load_tokens("github", "new") is None
            assert [await _seen(other), await _seen(other, "new")] == ["gho_1", "t"]

    asyncio.run(main())


@shared_rows
def test_the_caller_s_rollback_undoes_the_store_s_part(place: Place, keyring: Keyring) -> None:
    """By an exception, by rollback() or by closing the session; in a savepoint, too."""

    async def main() -> None:
        async with _app(place, keyring) as (engine, other):
            await _store_as_in_the_contract(other)
            async with AsyncSession(engine) as session:
                store = AuthTokenStore(session, keyring=keyring, **place.options)
                with pytest.raises(KeyError):  # noqa: PT012
                    async with session.begin():
                        await _refresh_as_in_the_contract(store, _Provider())
                        raise KeyError
                assert await _seen(other) == "gho_abc"
                _ = await session.begin()
                await store.store_tokens("github", "user-123", "undone", None, None)
                await session.rollback()
                assert await _seen(other) == "gho_abc"
                async with session.begin():
                    await store.store_tokens("github", "kept", "t", None, None)
                    savepoint = await session.begin_nested()
                    await store.store_tokens("github", "user-123", "undone", None, None)
                    await savepoint.rollback()
                assert [await _seen(other), await _seen(other, "kept")] == ["gho_abc", "t"]
                _ = await session.begin()
                await store.store_tokens("github", "user-123", "undone", None, None)
            assert await _seen(other) == "gho_abc"

    asyncio.run(main())


@three_rows
def test_a_provider_that_fails_leaves_the_old_tokens(place: Place, keyring: Keyring) -> None:
    """The lock ends with the session; a second attempt refreshes."""

    async def main() -> None:
        async with _app(place, keyring) as (engine, other):
            await _store_as_in_the_contract(other)
            for fails in (True, False):
                async with AsyncSession(engine) as session:
                    store = AuthTokenStore(session, keyring=keyring, **place.options)
                    try:
                        await _refresh_as_in_the_contract(store, _Provider(fails=fails))
                    except ConnectionError:
                        assert fails
                assert await _seen(other) == ("gho_abc" if fails else "gho_1")
            await place.until_idle()

    asyncio.run(main())


@three_rows
def test_two_stores_on_one_session(place: Place, keyring: Keyring) -> None:
    """A lock that one took is the other's, too: its write commits and ends it."""

    async def main() -> None:
        async with _app(place, keyring) as (engine, other), AsyncSession(engine) as session:
            one, two = (AuthTokenStore(session, keyring=keyring, **place.options) for _ in range(2))
            await _store_as_in_the_contract(one)
            assert await two.load_tokens("github", "user-123", for_update=True)
            assert session.in_transaction()
            await one.store_tokens("github", "user-123", "by the other", None, None)
            assert not session.in_transaction()
            assert await _seen(other) == "by the other"
            async with session.begin():
                await one.store_tokens("github", "user-123", "one", None, None)
                await two.store_tokens("github", "user-123", "two", None, None)
                assert session.in_transaction()
            assert await _seen(other) == "two"

    asyncio.run(main())


@three_rows
def test_reads_that_begin_the_transaction_give_the_connection_back(place: Place, keyring: Keyring) -> None:
    """A plain load, a listing and a lock on no row leave nothing open; a lock on a row keeps it until the write."""

    async def main() -> None:
        async with (
            _app(place, keyring, pool_size=1, max_overflow=0) as (engine, other),
            AsyncSession(engine) as session,
        ):
            pool: Any = engine.sync_engine.pool
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            await _store_as_in_the_contract(store)
            assert pool.checkedout() == 0
            await store.load_tokens("github", "user-123")
            assert [entry["user_id"] async for entry in store.list_tokens()] == ["user-123"]
            assert await store.load_tokens("github", "nobody", for_update=True) is None
            assert (pool.checkedout(), session.in_transaction()) == (0, False)
            await store.load_tokens("github", "user-123", for_update=True)
            assert pool.checkedout() == 1
            # Reading under the lock does not end it.
            await store.load_tokens("github", "user-123")
            assert pool.checkedout() == 1
            await store.delete_tokens("github", "user-123")
            assert pool.checkedout() == 0
            assert await _seen(other) is None

    asyncio.run(main())


class _Base(DeclarativeBase):
    pass


class _Account(_Base):
    __tablename__ = "accounts_of_the_app"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))


@three_rows
@pytest.mark.parametrize("expire", [True, False], ids=["expiring", "keeping"])
def test_the_application_s_objects_in_the_same_session(place: Place, expire: bool, keyring: Keyring) -> None:
    """Changes of the application's own are committed with the store's in its transaction, and not by the store alone.

    With `expire_on_commit=False` objects can still be read after a commit of the store's, without I/O.
    """

    async def main() -> None:
        async with _app(place, keyring) as (engine, other):
            async with engine.begin() as connection:
                await connection.run_sync(_Base.metadata.drop_all)
                await connection.run_sync(_Base.metadata.create_all)
            async with AsyncSession(engine, expire_on_commit=expire) as session:
                store = AuthTokenStore(session, keyring=keyring, **place.options)
                async with session.begin():
                    account = _Account(id=1, name="before")
                    session.add(account)
                    await _store_as_in_the_contract(store)
                # Here the store's call begins and commits a transaction of its own.
                await store.store_tokens("github", "user-123", "new", None, None)
                if not expire:
                    assert account.name == "before"
                await session.refresh(account)
                assert account.name == "before"
                await session.rollback()
            async with AsyncSession(engine) as session:
                assert (await session.get_one(_Account, 1)).name == "before"
            async with engine.begin() as connection:
                await connection.run_sync(_Base.metadata.drop_all)
            assert await _seen(other) == "new"

    asyncio.run(main())


@shared_rows
def test_cancelled_in_the_middle_of_the_three_steps(place: Place, keyring: Keyring) -> None:
    """At points all over them: what another process sees is the old tokens or the new, and no lock remains."""

    async def main() -> None:
        async with _app(place, keyring, pool_size=2, max_overflow=0) as (engine, other):
            pool: Any = engine.sync_engine.pool

            async def worker(provider: _Provider) -> None:
                async with AsyncSession(engine) as session:
                    store = AuthTokenStore(session, keyring=keyring, **place.options)
                    await _refresh_as_in_the_contract(store, provider)

            loop = asyncio.get_running_loop()
            await _store_as_in_the_contract(other)
            started = loop.time()
            await worker(_Provider())
            took = loop.time() - started
            for point in range(15):
                await _store_as_in_the_contract(other)
                task = asyncio.create_task(worker(_Provider()))
                await asyncio.sleep(took * point / 12)
                task.cancel()
                await asyncio.wait([task])
                assert await _seen(other) in ("gho_abc", "gho_1")
            await place.until_idle()
            assert pool.checkedout() == 0

    asyncio.run(main())


@three_rows
def test_setup_on_a_session(place: Place, keyring: Keyring) -> None:
    """Creates the table and commits; until then its absence is a clear error that leaves the session usable."""

    async def main() -> None:
        async with app_engine(place) as engine, AsyncSession(engine) as session:
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            with pytest.raises(TableMissingError, match="tokenstore init"):
                await _store_as_in_the_contract(store)
            assert not session.in_transaction()
            await store.setup()
            await store.setup()
            await _store_as_in_the_contract(store)
            async with open_store(place.url, keyring=keyring) as other:
                assert await _seen(other) == "gho_abc"

    asyncio.run(main())


@three_rows
def test_a_store_does_not_close_its_session(place: Place, keyring: Keyring) -> None:
    """After `aclose` the store is closed, and the session goes on."""

    async def main() -> None:
        async with _app(place, keyring) as (engine, _), AsyncSession(engine) as session:
            async with AuthTokenStore(session, keyring=keyring, **place.options) as store:
                await _store_as_in_the_contract(store, expired=False)
            with pytest.raises(TokenStoreError, match="closed"):
                await store.load_tokens("github", "user-123")
            again = AuthTokenStore(session, keyring=keyring, **place.options)
            record = await again.load_tokens("github", "user-123")
            assert record is not None
            assert again.is_access_token_valid(record)
            assert record["access_token_expires_at"] is not None
            assert record["access_token_expires_at"] > datetime.now(UTC)

    asyncio.run(main())


# ---- A refresh under a lease


@dataclass
class _Refresh:
    """Somebody else's refresh without a row lock: under a lease of the row."""

    backend: Any
    keyring: Keyring
    generation: int = 0

    async def begin(self, duration: float = 60.0) -> None:
        row = await self.backend.get(_KEY)
        assert row is not None
        self.generation = row.generation
        assert await self.backend.claim_lease(_KEY, generation=row.generation, holder="engine", duration=duration)

    async def complete(self) -> None:
        tokens = seal_tokens(
            self.keyring,
            _KEY,
            access_token="gho_1",
            refresh_token="ghr_1",
            extra=None,
            access_token_expires_at=to_epoch_us("", datetime.now(UTC) + timedelta(hours=8)),
            refresh_token_expires_at=None,
        )
        async with asyncio.timeout(1):  # nobody who waits for the lease is in its way
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
    """The transaction has read what it may go on seeing."""
    async with session.begin():
        await session.execute(text("SELECT 1"))
        yield


_TRANSACTIONS = [_no_transaction, _begun, _begun_and_used]
Transaction = Callable[[AsyncSession], AbstractAsyncContextManager[None]]


@three_rows
@pytest.mark.parametrize("pool_size", [1, 5])
@pytest.mark.parametrize("transaction", _TRANSACTIONS)
def test_a_locking_load_waits_for_a_lease_and_gets_its_tokens(
    place: Place, transaction: Transaction, pool_size: int, keyring: Keyring
) -> None:
    """Without the lock meanwhile, which the holder needs, and then with it; the provider is not called again."""

    async def main() -> None:
        async with _app(place, keyring, pool_size=pool_size, max_overflow=0) as (engine, other):
            await _store_as_in_the_contract(other)
            refresh = _Refresh(other._backend, keyring)
            await refresh.begin()
            provider = _Provider()

            async def use() -> None:
                async with AsyncSession(engine) as session, transaction(session):
                    store = AuthTokenStore(session, keyring=keyring, **place.options)
                    record = await store.load_tokens(*_KEY, for_update=True)
                    assert record is not None
                    assert record["access_token"] == "gho_1"
                    assert session.in_transaction()
                    with pytest.raises(LockTimeoutError):
                        await _seen_at_once(place, keyring)
                    await _refresh_as_in_the_contract(store, provider)

            user = asyncio.create_task(use())
            await asyncio.sleep(0.15)
            assert not user.done()
            await refresh.complete()
            completed = asyncio.get_running_loop().time()
            await user
            assert asyncio.get_running_loop().time() - completed < 2
            assert provider.calls == 0
            assert await _seen(other) == "gho_1"
            await place.until_idle()

    asyncio.run(main())


async def _seen_at_once(place: Place, keyring: Keyring) -> str | None:
    async with open_store(place.url, keyring=keyring, lock_timeout=0.2) as impatient:
        return await _seen(impatient)


@three_rows
@pytest.mark.parametrize("transaction", _TRANSACTIONS)
def test_a_locking_load_waits_for_a_dead_holder_s_lease(
    place: Place, transaction: Transaction, keyring: Keyring
) -> None:
    """It runs out, and who waited refreshes."""

    async def main() -> None:
        async with _app(place, keyring) as (engine, other):
            await _store_as_in_the_contract(other)
            await _Refresh(other._backend, keyring).begin(duration=0.3)
            provider = _Provider()
            started = asyncio.get_running_loop().time()
            async with AsyncSession(engine) as session, transaction(session):
                store = AuthTokenStore(session, keyring=keyring, **place.options)
                await _refresh_as_in_the_contract(store, provider)
            assert 0.25 < asyncio.get_running_loop().time() - started < 5
            assert provider.calls == 1
            assert await _seen(other) == "gho_1"

    asyncio.run(main())


@three_rows
@pytest.mark.parametrize("transaction", _TRANSACTIONS)
def test_a_locking_load_does_not_wait_for_a_lease_for_ever(
    place: Place, transaction: Transaction, keyring: Keyring
) -> None:
    """`lock_timeout` ends it, and the transaction with it, if the store began that; cancelling does, too."""

    async def main() -> None:
        async with _app(place, keyring, pool_size=2, max_overflow=0) as (engine, other):
            pool: Any = engine.sync_engine.pool
            await _store_as_in_the_contract(other)
            refresh = _Refresh(other._backend, keyring)
            await refresh.begin()

            async def use(lock_timeout: float) -> None:
                async with AsyncSession(engine) as session:
                    store = AuthTokenStore(session, keyring=keyring, lock_timeout=lock_timeout, **place.options)
                    async with transaction(session):
                        try:
                            await store.load_tokens(*_KEY, for_update=True)
                        finally:
                            assert session.in_transaction() is (transaction is not _no_transaction)

            started = asyncio.get_running_loop().time()
            with pytest.raises(LockTimeoutError, match="a refresh held the row's lease for longer than 1 s"):
                await use(1.0)
            assert 0.9 < asyncio.get_running_loop().time() - started < 2.5
            for delay in (0.01, 0.05, 0.2):
                user = asyncio.create_task(use(60.0))
                await asyncio.sleep(delay)
                user.cancel()
                await asyncio.wait([user], timeout=1)
                assert user.cancelled()
            assert pool.checkedout() == 0
            await refresh.complete()
            await place.until_idle()

    asyncio.run(main())


@three_rows
def test_a_lease_that_begins_just_before_a_lock_in_the_caller_s_transaction(place: Place, keyring: Keyring) -> None:
    """The lock is the caller's to give up, so it is a conflict; in a transaction of its own the store waits."""

    async def main() -> None:
        async with _app(place, keyring) as (engine, other), app_engine(place) as holder:
            await _store_as_in_the_contract(other)
            for transaction, expected in ((_begun, ConflictError), (_no_transaction, LockTimeoutError)):

                async def use(transaction: Transaction = transaction) -> None:
                    async with AsyncSession(engine) as session:
                        store = AuthTokenStore(session, keyring=keyring, lock_timeout=2, **place.options)
                        async with transaction(session):
                            await store.load_tokens(*_KEY, for_update=True)

                async with holder.connect() as connection:
                    if place.row.mark == "sqlite":
                        await connection.exec_driver_sql("PRAGMA busy_timeout = 1000")
                    claim = f"UPDATE {place.table} SET lease_holder = 'engine', lease_expires_at = 4000000000000000"
                    await connection.execute(text(claim))
                    user = asyncio.create_task(use())
                    await place.until_waiting(open_store(engine, keyring=keyring, **place.options))
                    if place.row.mark == "sqlite":
                        await asyncio.sleep(0.1)  # it has a connection, and is about to wait
                    await connection.commit()
                with pytest.raises(expected, match="refresh"):
                    await user
                await place.until_idle()
                await other.store_tokens(*_KEY, "gho_abc", "ghr_xyz", None)

    asyncio.run(main())


@three_rows
def test_a_lock_of_a_second_row_waits_for_its_lease_and_keeps_the_first(place: Place, keyring: Keyring) -> None:
    """The transaction is the store's, but an earlier call's, whose lock it holds: it is not undone."""

    async def main() -> None:
        async with _app(place, keyring) as (engine, other), AsyncSession(engine) as session:
            await _store_as_in_the_contract(other)
            await other.store_tokens("github", "first", "t", None, None)
            await _Refresh(other._backend, keyring).begin(duration=0.3)
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            if place.row.mark == "sqlite":  # where the first lock is one of every row
                assert await store.load_tokens(*_KEY, for_update=True)
            else:
                assert await store.load_tokens("github", "first", for_update=True)
                assert await store.load_tokens(*_KEY, for_update=True)
                with pytest.raises(LockTimeoutError):
                    async with open_store(place.url, keyring=keyring, lock_timeout=0.2) as impatient:
                        await _seen(impatient, "first")

    asyncio.run(main())


@three_rows
def test_a_backend_s_rollback_on_a_session(place: Place, keyring: Keyring) -> None:
    """Ends the transaction that a call of the store began; the caller's own is the caller's."""

    async def main() -> None:
        async with _app(place, keyring) as (engine, other), AsyncSession(engine) as session:
            await _store_as_in_the_contract(other)
            backend: Any = AuthTokenStore(session, keyring=keyring, **place.options)._backend
            await backend.rollback()
            assert await backend.lock(_KEY)
            assert session.in_transaction()
            await backend.rollback()
            assert not session.in_transaction()
            assert await _seen(other) == "gho_abc"
            async with session.begin():
                with pytest.raises(UnsupportedOperationError, match="owner"):
                    await backend.rollback()
                assert session.in_transaction()

    asyncio.run(main())
