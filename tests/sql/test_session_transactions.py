"""Transactions of a store on a session: what the store commits, and what it leaves to its caller."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import String

from support.contract_example import CountingProvider, app, refresh_as_in_the_contract, seen, store_as_in_the_contract
from support.database import Place, app_engine
from support.matrix import each_database, shared_rows
from tokenstore import AuthTokenStore, Keyring, TableMissingError, TokenStoreError, open_store

# The example passes `datetime.utcnow()`, which is deprecated since Python 3.12.
pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")


@shared_rows
def test_in_the_caller_s_transaction_the_store_commits_nothing(place: Place, keyring: Keyring) -> None:
    """Stores, loads and locks use the caller's transaction; another process reads the old row until its commit."""

    async def main() -> None:
        async with app(place, keyring) as (engine, other):
            await store_as_in_the_contract(other)
            async with AsyncSession(engine) as session:
                store = AuthTokenStore(session, keyring=keyring, **place.options)
                async with session.begin():
                    await refresh_as_in_the_contract(store, CountingProvider())
                    await store.store_tokens("github", "new", "t", None, None)
                    await store.load_tokens("github", "user-123")
                    assert await store.delete_tokens("github", "new")
                    await store.store_tokens("github", "new", "t", None, None)
                    assert session.in_transaction()
                    record = await other.load_tokens("github", "user-123")
                    assert record is not None
                    assert record["access_token"] == "gho_abc"
                    assert await other.load_tokens("github", "new") is None
            assert [await seen(other), await seen(other, "new")] == ["gho_1", "t"]

    asyncio.run(main())


@shared_rows
def test_the_caller_s_rollback_undoes_the_store_s_writes(place: Place, keyring: Keyring) -> None:
    """The rollback can come from an exception, rollback(), closing the session, or a savepoint."""

    async def main() -> None:
        async with app(place, keyring) as (engine, other):
            await store_as_in_the_contract(other)
            async with AsyncSession(engine) as session:
                store = AuthTokenStore(session, keyring=keyring, **place.options)
                with pytest.raises(KeyError):  # noqa: PT012
                    async with session.begin():
                        await refresh_as_in_the_contract(store, CountingProvider())
                        raise KeyError
                assert await seen(other) == "gho_abc"
                _ = await session.begin()
                await store.store_tokens("github", "user-123", "undone", None, None)
                await session.rollback()
                assert await seen(other) == "gho_abc"
                async with session.begin():
                    await store.store_tokens("github", "kept", "t", None, None)
                    savepoint = await session.begin_nested()
                    await store.store_tokens("github", "user-123", "undone", None, None)
                    await savepoint.rollback()
                assert [await seen(other), await seen(other, "kept")] == ["gho_abc", "t"]
                _ = await session.begin()
                await store.store_tokens("github", "user-123", "undone", None, None)
            assert await seen(other) == "gho_abc"

    asyncio.run(main())


@each_database
def test_after_a_failed_refresh_the_old_tokens_and_no_lock_remain(place: Place, keyring: Keyring) -> None:
    """The lock ends with the session, and a second attempt refreshes."""

    async def main() -> None:
        async with app(place, keyring) as (engine, other):
            await store_as_in_the_contract(other)
            for fails in (True, False):
                async with AsyncSession(engine) as session:
                    store = AuthTokenStore(session, keyring=keyring, **place.options)
                    try:
                        await refresh_as_in_the_contract(store, CountingProvider(fails=fails))
                    except ConnectionError:
                        assert fails
                assert await seen(other) == ("gho_abc" if fails else "gho_1")
            await place.until_idle()

    asyncio.run(main())


@each_database
def test_two_stores_on_one_session_share_its_transaction(place: Place, keyring: Keyring) -> None:
    """A write of the second store commits and releases the lock that the first one took."""

    async def main() -> None:
        async with app(place, keyring) as (engine, other), AsyncSession(engine) as session:
            one, two = (AuthTokenStore(session, keyring=keyring, **place.options) for _ in range(2))
            await store_as_in_the_contract(one)
            assert await two.load_tokens("github", "user-123", for_update=True)
            assert session.in_transaction()
            await one.store_tokens("github", "user-123", "by the other", None, None)
            assert not session.in_transaction()
            assert await seen(other) == "by the other"
            async with session.begin():
                await one.store_tokens("github", "user-123", "one", None, None)
                await two.store_tokens("github", "user-123", "two", None, None)
                assert session.in_transaction()
            assert await seen(other) == "two"

    asyncio.run(main())


@each_database
def test_reads_that_begin_a_transaction_return_the_connection(place: Place, keyring: Keyring) -> None:
    """A load, a listing and a locking load without a row leave no transaction open; a row's lock lasts to the write."""

    async def main() -> None:
        async with (
            app(place, keyring, pool_size=1, max_overflow=0) as (engine, other),
            AsyncSession(engine) as session,
        ):
            pool: Any = engine.sync_engine.pool
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            await store_as_in_the_contract(store)
            assert pool.checkedout() == 0
            await store.load_tokens("github", "user-123")
            assert [entry["user_id"] async for entry in store.list_tokens()] == ["user-123"]
            assert await store.load_tokens("github", "nobody", for_update=True) is None
            assert (pool.checkedout(), session.in_transaction()) == (0, False)
            await store.load_tokens("github", "user-123", for_update=True)
            assert pool.checkedout() == 1
            # A read does not release the lock.
            await store.load_tokens("github", "user-123")
            assert pool.checkedout() == 1
            await store.delete_tokens("github", "user-123")
            assert pool.checkedout() == 0
            assert await seen(other) is None

    asyncio.run(main())


class _Base(DeclarativeBase):
    pass


class _Account(_Base):
    __tablename__ = "accounts_of_the_app"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))


@each_database
@pytest.mark.parametrize("expire", [True, False], ids=["expiring", "keeping"])
def test_the_application_s_objects_are_committed_only_by_the_application(
    place: Place, expire: bool, keyring: Keyring
) -> None:
    """In the application's transaction its own changes and the store's are committed together, and only by it.

    With `expire_on_commit=False`, objects can still be read after a commit by the store, without I/O.
    """

    async def main() -> None:
        async with app(place, keyring) as (engine, other):
            async with engine.begin() as connection:
                await connection.run_sync(_Base.metadata.drop_all)
                await connection.run_sync(_Base.metadata.create_all)
            async with AsyncSession(engine, expire_on_commit=expire) as session:
                store = AuthTokenStore(session, keyring=keyring, **place.options)
                async with session.begin():
                    account = _Account(id=1, name="before")
                    session.add(account)
                    await store_as_in_the_contract(store)
                # Here the store's call begins its own transaction and commits it.
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
            assert await seen(other) == "new"

    asyncio.run(main())


@shared_rows
def test_a_refresh_under_the_lock_cancelled_at_any_point_leaves_no_lock(place: Place, keyring: Keyring) -> None:
    """Another process reads the old tokens or the new ones."""

    async def main() -> None:
        async with app(place, keyring, pool_size=2, max_overflow=0) as (engine, other):
            pool: Any = engine.sync_engine.pool

            async def worker(provider: CountingProvider) -> None:
                async with AsyncSession(engine) as session:
                    store = AuthTokenStore(session, keyring=keyring, **place.options)
                    await refresh_as_in_the_contract(store, provider)

            loop = asyncio.get_running_loop()
            await store_as_in_the_contract(other)
            started = loop.time()
            await worker(CountingProvider())
            took = loop.time() - started
            for point in range(15):
                await store_as_in_the_contract(other)
                task = asyncio.create_task(worker(CountingProvider()))
                await asyncio.sleep(took * point / 12)
                task.cancel()
                await asyncio.wait([task])
                assert await seen(other) in ("gho_abc", "gho_1")
            await place.until_idle()
            assert pool.checkedout() == 0

    asyncio.run(main())


@each_database
def test_setup_on_a_session_creates_and_commits_the_table(place: Place, keyring: Keyring) -> None:
    """Before that, calls raise TableMissingError and the session stays usable."""

    async def main() -> None:
        async with app_engine(place) as engine, AsyncSession(engine) as session:
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            with pytest.raises(TableMissingError, match="tokenstore init"):
                await store_as_in_the_contract(store)
            assert not session.in_transaction()
            await store.setup()
            await store.setup()
            await store_as_in_the_contract(store)
            async with open_store(place.url, keyring=keyring) as other:
                assert await seen(other) == "gho_abc"

    asyncio.run(main())


@each_database
def test_closing_a_store_does_not_close_its_session(place: Place, keyring: Keyring) -> None:
    """After `aclose()` the session can still be used."""

    async def main() -> None:
        async with app(place, keyring) as (engine, _), AsyncSession(engine) as session:
            async with AuthTokenStore(session, keyring=keyring, **place.options) as store:
                await store_as_in_the_contract(store, expired=False)
            with pytest.raises(TokenStoreError, match="closed"):
                await store.load_tokens("github", "user-123")
            again = AuthTokenStore(session, keyring=keyring, **place.options)
            record = await again.load_tokens("github", "user-123")
            assert record is not None
            assert again.is_access_token_valid(record)
            expires_at = record["access_token_expires_at"]
            assert expires_at is not None
            assert expires_at > datetime.now(UTC)

    asyncio.run(main())
