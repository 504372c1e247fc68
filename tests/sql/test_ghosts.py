"""The server does not execute a statement after its connection was lost and its caller got the error."""

from __future__ import annotations

import asyncio

import pytest

from support.connection_faults import faulty
from support.database import Place
from support.matrix import Row, server_rows
from support.tagged_tokens import load_tag, store_tag
from tokenstore import BackendUnavailableError, Keyring, open_store


@server_rows
def test_a_store_whose_connection_was_cut_never_overwrites_a_later_one(row: Row, url: str, keyring: Keyring) -> None:
    """The connection is cut while the statement waits for the row's lock; after the error it has no effect."""

    async def main() -> None:
        place = Place(row, url)
        async with open_store(url, keyring=keyring) as direct, faulty(url) as faults:
            await direct.setup()
            await store_tag(direct, "old")
            async with open_store(faults.url, keyring=keyring) as store:
                await store_tag(store, "warm", "u2")  # opens the connection first
                async with place.held():
                    cut = asyncio.create_task(store_tag(store, "cut"))
                    await place.until_waiting()
                    faults.cut_all()
                    with pytest.raises(BackendUnavailableError):
                        await cut
                    assert place.waiting() == 0
                await place.until_idle()
                assert await load_tag(direct) == "old"
                await store_tag(store, "new")
                assert await load_tag(direct) == "new"

    asyncio.run(main())
