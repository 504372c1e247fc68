"""Database sessions that an administrator or a restart of the server ends while the connections are idle."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from support.database import Place, app_engine, source_of
from support.matrix import Row, params
from tokenstore import AuthTokenStore, BackendUnavailableError, Keyring, open_store

server_rows = pytest.mark.parametrize("row", params(names=["postgresql+asyncpg", "postgresql+psycopg"]))
Call = Callable[[AuthTokenStore], Awaitable[Any]]

_ROUNDS = 10


async def _store(store: AuthTokenStore) -> None:
    await store.store_tokens("github", "u1", "access", "refresh", datetime.now(UTC) + timedelta(hours=1))


async def _load(store: AuthTokenStore) -> None:
    assert await store.load_tokens("github", "u1") is not None


async def _list(store: AuthTokenStore) -> None:
    assert len([entry async for entry in store.list_tokens()]) == 1


async def _delete(store: AuthTokenStore) -> None:
    assert await store.delete_tokens("github", "u1")
    await _store(store)


async def _fresh(store: AuthTokenStore) -> None:
    async def refresh(_: object) -> dict[str, object]:
        return {"access_token": "access", "refresh_token": "refresh", "expires_in": 3600}

    assert await store.load_fresh_tokens("github", "u1", refresh=refresh, force=True, force_min_age=0) is not None


async def _transaction(store: AuthTokenStore) -> None:
    async with store.transaction() as tx:
        assert await tx.load_tokens("github", "u1", for_update=True) is not None
        await tx.store_tokens("github", "u1", "access", "refresh", None)


async def _terminate(place: Place) -> None:
    """Terminate all sessions of the store. Some may not have ended yet when this returns."""
    query = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() "
        f"AND pid <> pg_backend_pid() AND query LIKE '%{place.table}%'"
    )
    await asyncio.to_thread(place.server().execute, query)


async def _after_termination(store: AuthTokenStore, place: Place, call: Call) -> None:
    """Make a call whose connections were just used, and whose sessions are being terminated."""
    _ = await asyncio.gather(*(store.load_tokens("github", "u1") for _ in range(5)), return_exceptions=True)
    await _terminate(place)
    await call(store)


@pytest.mark.parametrize("call", [_load, _store, _list, _delete, _fresh])
@server_rows
def test_a_call_succeeds_although_its_idle_connection_was_terminated(
    row: Row, url: str, call: Call, keyring: Keyring
) -> None:
    """The statement was not executed, as the server or the driver reports, so it is sent again."""
    place = Place(row, url)

    async def main() -> None:
        async with open_store(url, keyring=keyring, pool_size=5) as store:
            await store.setup()
            await _store(store)
            for _ in range(_ROUNDS):
                await _after_termination(store, place, call)
            assert source_of(store).in_use == 0

    asyncio.run(main())


@server_rows
def test_a_transaction_on_a_terminated_connection_succeeds_or_raises_backend_unavailable_error(
    row: Row, url: str, keyring: Keyring
) -> None:
    place = Place(row, url)

    async def main() -> None:
        async with open_store(url, keyring=keyring, pool_size=5) as store:
            await store.setup()
            await _store(store)
            for _ in range(_ROUNDS):
                try:
                    await _after_termination(store, place, _transaction)
                except BackendUnavailableError:
                    continue
            await _transaction(store)

    asyncio.run(main())


@pytest.mark.parametrize("call", [_load, _store, _list, _delete])
@server_rows
def test_a_terminated_connection_of_an_application_s_engine_is_discarded(
    row: Row, url: str, call: Call, keyring: Keyring
) -> None:
    """The caller gets an error of tokenstore, and the engine's pool does not keep the connection."""
    place = Place(row, url)

    async def main() -> None:
        async with (
            app_engine(place, pool_size=1, max_overflow=0) as engine,
            open_store(engine, keyring=keyring, **place.options) as store,
        ):
            await store.setup()
            for _ in range(_ROUNDS):
                await _store(store)
                await _terminate(place)
                try:
                    await call(store)
                except BackendUnavailableError:
                    await call(store)

    asyncio.run(main())
