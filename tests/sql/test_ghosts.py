"""Statements whose connection is lost are not carried out by the server later on."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from support.connection_faults import faulty
from support.database import Place
from support.matrix import ROWS, Row, params
from tokenstore import AuthTokenStore, BackendUnavailableError, Keyring, open_store

server_rows = pytest.mark.parametrize(
    "row", params(names=[row.name for row in ROWS if row.mark in ("postgres", "mysql")])
)


async def _store(store: AuthTokenStore, token: str, user_id: str = "u1") -> None:
    await store.store_tokens("github", user_id, token, None, datetime.now(UTC) + timedelta(hours=1))


async def _token(store: AuthTokenStore) -> object:
    record = await store.load_tokens("github", "u1")
    return record and record["access_token"]


@server_rows
def test_a_store_whose_connection_is_cut_does_not_overtake_a_later_one(row: Row, url: str, keyring: Keyring) -> None:
    """The store waits in the server for the row's lock when its connection is cut; its error means that it is over."""

    async def main() -> None:
        place = Place(row, url)
        async with open_store(url, keyring=keyring) as direct, faulty(url) as faults:
            await direct.setup()
            await _store(direct, "old")
            async with open_store(faults.url, keyring=keyring) as store:
                await _store(store, "warm", "u2")  # connects
                async with place.held():
                    cut = asyncio.create_task(_store(store, "cut"))
                    await place.until_waiting()
                    faults.cut_all()
                    with pytest.raises(BackendUnavailableError):
                        await cut
                    assert place.waiting() == 0
                await place.until_idle()
                assert await _token(direct) == "old"
                await _store(store, "new")
                assert await _token(direct) == "new"

    asyncio.run(main())
