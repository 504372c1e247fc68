"""A server that accepts no more writes."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text

from support.database import Place, app_engine
from support.matrix import postgres_rows
from support.tagged_tokens import load_tag, store_tag
from tokenstore import BackendUnavailableError, Keyring, open_store


@postgres_rows
def test_a_write_to_a_server_that_became_read_only_discards_the_connection(place: Place, keyring: Keyring) -> None:
    """A write raises BackendUnavailableError; the next one connects again and may reach a new primary."""
    server = place.server()

    async def read_only(value: str) -> None:
        async with app_engine(place, isolation_level="AUTOCOMMIT") as engine, engine.connect() as connection:
            await connection.execute(text("SET default_transaction_read_only = off"))
            await connection.execute(
                text(f'ALTER DATABASE "{server.database}" SET default_transaction_read_only = {value}')
            )

    async def main() -> None:
        async with open_store(place.url, keyring=keyring, pool_size=1) as store:
            await store.setup()
            await store_tag(store, "old")
        await read_only("on")
        try:
            async with open_store(place.url, keyring=keyring, pool_size=1) as store:
                assert await load_tag(store) == "old"
                with pytest.raises(BackendUnavailableError, match="accepts no writes") as caught:
                    await store_tag(store, "new")
                assert caught.value.code == "25006"
                with pytest.raises(BackendUnavailableError):
                    async with store.transaction() as tx:
                        await load_tag(tx, for_update=True)
                await read_only("off")
                await store_tag(store, "new")
                assert await load_tag(store) == "new"
        finally:
            await read_only("off")

    asyncio.run(main())
