"""The example of ``AuthTokenStore`` on an application's session."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker
from sqlmodel import select
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

from support.contract_example import CountingProvider, app, refresh_as_in_the_contract, seen, store_as_in_the_contract
from support.database import Place, app_engine
from support.matrix import each_database, shared_rows
from tokenstore import AuthTokenStore, Keyring, open_store

# The example passes `datetime.utcnow()`, which is deprecated since Python 3.12.
pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")
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


async def _in_a_session_of_sqlmodel(engine: AsyncEngine, use: Use) -> None:
    async with SQLModelSession(engine) as session:
        await use(session)


async def _in_a_session_of_sqlmodel_that_read(engine: AsyncEngine, use: Use) -> None:
    async with SQLModelSession(engine) as session:
        assert (await session.exec(select(1))).one() == 1
        await use(session)
        await session.commit()


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
    _in_a_session_of_sqlmodel,
    _in_a_session_of_sqlmodel_that_read,
    _in_a_session_without_autobegin,
    _in_a_begun_session,
    _in_an_autobegun_session,
    _in_a_session_on_a_connection,
]


@each_database
@pytest.mark.parametrize("open_session", WAYS)
def test_the_example_works_word_for_word_with_each_kind_of_session(
    place: Place, open_session: Callable[[AsyncEngine, Use], Awaitable[None]], keyring: Keyring
) -> None:
    """Another process reads the stored and refreshed tokens, no lock remains, and the provider is called once."""

    async def main() -> None:
        provider = CountingProvider()
        async with app(place, keyring) as (engine, other):

            async def use(session: Any) -> None:
                store = AuthTokenStore(db_session=session, keyring=keyring, **place.options)
                await store_as_in_the_contract(store)
                await refresh_as_in_the_contract(store, provider)
                await refresh_as_in_the_contract(store, provider)
                record = await store.load_tokens(provider="github", user_id="user-123")
                assert record is not None
                assert record["access_token"] == "gho_1"
                assert store.is_access_token_valid(record)

            await open_session(engine, use)
            assert provider.calls == 1
            assert await seen(other) == "gho_1"
            await place.until_idle()

    asyncio.run(main())


@each_database
def test_a_transaction_that_the_store_began_is_committed_at_once(place: Place, keyring: Keyring) -> None:
    """Another process reads the stored tokens before the session is closed or used again."""

    async def main() -> None:
        async with app(place, keyring) as (engine, other), AsyncSession(engine) as session:
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            await store_as_in_the_contract(store)
            assert await seen(other) == "gho_abc"
            await refresh_as_in_the_contract(store, CountingProvider())
            assert await seen(other) == "gho_1"
            assert not session.in_transaction()

    asyncio.run(main())


@shared_rows
def test_twenty_sessions_at_once_call_the_provider_once(place: Place, keyring: Keyring) -> None:
    """Each session waits for the row's lock, then reads the tokens that the first one stored."""

    async def main() -> None:
        provider = CountingProvider()
        # The application's engine limits the number of connections.
        async with app(place, keyring, pool_size=20) as (engine, other):

            async def worker() -> str:
                async with AsyncSession(engine) as session:
                    store = AuthTokenStore(db_session=session, keyring=keyring, **place.options)
                    await refresh_as_in_the_contract(store, provider)
                    record = await store.load_tokens("github", "user-123")
                    assert record is not None
                    return str(record["access_token"])

            async with AsyncSession(engine) as session:
                await store_as_in_the_contract(AuthTokenStore(session, keyring=keyring, **place.options))
            assert await asyncio.gather(*(worker() for _ in range(20))) == ["gho_1"] * 20
            assert provider.calls == 1
            assert await seen(other) == "gho_1"

    asyncio.run(main())


@each_database
def test_a_second_worker_waits_and_reads_the_first_one_s_tokens(place: Place, keyring: Keyring) -> None:
    """While the first worker calls the provider, the second waits for the row's lock; it does not call the provider."""

    async def main() -> None:
        called, answer = asyncio.Event(), asyncio.Event()

        class Slow(CountingProvider):
            async def refresh(self, refresh_token: str) -> dict[str, Any]:
                called.set()
                await answer.wait()
                return await super().refresh(refresh_token)

        provider = Slow()
        async with app(place, keyring) as (first_engine, other), app_engine(place) as second_engine:
            await store_as_in_the_contract(other)

            async def worker(engine: AsyncEngine) -> None:
                async with AsyncSession(engine) as session:
                    await refresh_as_in_the_contract(
                        AuthTokenStore(session, keyring=keyring, **place.options), provider
                    )

            first = asyncio.create_task(worker(first_engine))
            await called.wait()
            second = asyncio.create_task(worker(second_engine))
            await place.until_waiting(open_store(second_engine, keyring=keyring, **place.options))
            answer.set()
            await asyncio.gather(first, second)
            assert provider.calls == 1
            assert await seen(other) == "gho_1"

    asyncio.run(main())
