"""A server that accepts no writes."""

from __future__ import annotations

import asyncio
from secrets import token_hex

import pytest
from sqlalchemy import make_url

from support.database import Place, connection_of
from support.matrix import mysql_rows
from support.tagged_tokens import load_tag, store_tag
from tokenstore import AuthTokenStore, BackendUnavailableError, Keyring, open_store


@mysql_rows
def test_a_write_to_a_read_only_server_discards_the_connection(place: Place, keyring: Keyring) -> None:
    """With `read_only=1`, as on a replica, a write raises BackendUnavailableError, and the next one connects again."""
    server, user, password = place.server(), f"app_{token_hex(4)}", token_hex(8)
    server.execute(f"CREATE USER {user} IDENTIFIED BY '{password}'")
    server.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE, CREATE, INDEX ON {server.database}.* TO {user}")
    url = make_url(place.url).set(username=user, password=password).render_as_string(hide_password=False)

    async def main() -> None:
        async with open_store(url, keyring=keyring, pool_size=1) as store:
            await store.setup()
            await store_tag(store, "old")
            first = await _thread_of(store)
            server.execute("SET GLOBAL read_only = 1")
            assert await load_tag(store) == "old"
            with pytest.raises(BackendUnavailableError, match="accepts no writes") as caught:
                await store_tag(store, "new")
            assert caught.value.code == "1290"
            assert password not in str(caught.value)
            assert await _thread_of(store) != first
            with pytest.raises(BackendUnavailableError):  # noqa: PT012
                async with store.transaction() as tx:
                    await load_tag(tx)
                    await store_tag(tx, "new")
            server.execute("SET GLOBAL read_only = 0")
            await store_tag(store, "new")
            assert await load_tag(store) == "new"

    try:
        asyncio.run(main())
    finally:
        server.execute("SET GLOBAL read_only = 0")
        server.execute(f"DROP USER {user}")


async def _thread_of(store: AuthTokenStore) -> int:
    async with connection_of(store) as connection:
        return int((await connection.driver_connection()).thread_id())
