"""Engines of an application: different ways to begin a transaction, and engines that are refused."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from support.database import Place
from support.tagged_tokens import load_tag, set_up, store_tag
from tokenstore import AuthTokenStore, Keyring, UnsupportedOperationError, open_store

pytestmark = pytest.mark.sqlite


def _with_begin_event(place: Place) -> AsyncEngine:
    """The recipe of SQLAlchemy's documentation: an event hook begins transactions, not the driver."""
    engine = create_async_engine(place.engine_url)

    @event.listens_for(engine.sync_engine, "connect")
    def take_over(dbapi_connection: Any, _record: object) -> None:
        dbapi_connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


def _never_autocommitting(place: Place) -> AsyncEngine:
    """The driver's mode since Python 3.12 in which a transaction is always open."""
    return create_async_engine(place.engine_url, connect_args={"autocommit": False})


def _with_driver_autocommit(place: Place) -> AsyncEngine:
    return create_async_engine(place.engine_url, connect_args={"isolation_level": None})


ENGINES = [_with_begin_event, _with_driver_autocommit]
if sys.version_info >= (3, 12):
    ENGINES.append(_never_autocommitting)


@pytest.mark.parametrize("make", ENGINES)
def test_locks_and_commits_work_however_the_engine_begins_transactions(
    place: Place, make: Any, keyring: Keyring
) -> None:
    """The test uses the engine, and sessions on it."""

    async def refresh(store: Any) -> None:
        count = int(await load_tag(store, for_update=True) or 0)
        await asyncio.sleep(0)
        await store_tag(store, str(count + 1))

    async def in_transaction(store: AuthTokenStore) -> None:
        async with store.transaction() as tx:
            await refresh(tx)

    async def in_session(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            await refresh(AuthTokenStore(session, keyring=keyring))

    async def in_callers(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session, session.begin():
            await refresh(AuthTokenStore(session, keyring=keyring))

    async def main() -> None:
        await set_up(place, keyring)
        engine = make(place)
        try:
            async with open_store(place.url, keyring=keyring) as other, open_store(engine, keyring=keyring) as store:
                await store.setup()
                await store_tag(store, "0")
                await asyncio.gather(
                    *(in_transaction(store) for _ in range(3)),
                    *(in_session(engine) for _ in range(3)),
                    *(in_callers(engine) for _ in range(3)),
                )
                assert await load_tag(other) == "9"
                assert await load_tag(store) == "9"
                assert await store.delete_tokens("github", "u1")
                assert await load_tag(other) is None
            await place.until_idle()
            assert engine.sync_engine.pool.checkedout() == 0
        finally:
            await engine.dispose()

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
@pytest.mark.parametrize(
    "url",
    ["sqlite+aiosqlite://", "sqlite+aiosqlite:///:memory:", "sqlite+aiosqlite:///file:x?mode=memory&uri=true"],
)
def test_memory_is_refused_on_engines_and_sessions(url: str, keyring: Keyring) -> None:
    """A single connection for all tasks cannot work; the error says that, and what to use instead."""
    engine = create_async_engine(url)
    with pytest.raises(UnsupportedOperationError, match=r"one task's rollback .* memory://"):
        open_store(engine, keyring=keyring)
    with pytest.raises(UnsupportedOperationError, match=r"one task's rollback .* memory://"):
        AuthTokenStore(AsyncSession(engine), keyring=keyring)
