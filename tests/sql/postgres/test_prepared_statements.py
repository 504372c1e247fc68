"""Prepared statements whose plans another process voids."""

from __future__ import annotations

import asyncio

from support.database import Place
from support.matrix import postgres_rows
from support.tagged_tokens import load_tag, store_tag
from tokenstore import Keyring, open_store


@postgres_rows
def test_another_process_s_ddl_between_two_calls(place: Place, keyring: Keyring) -> None:
    """A new column voids the plans that pooled connections have cached: the next calls work all the same."""

    async def main() -> None:
        async with open_store(place.url, keyring=keyring, pool_size=2) as store:
            await store.setup()
            for change in ("ADD COLUMN more text", "ALTER COLUMN more TYPE varchar(9)", "DROP COLUMN more"):
                for _ in range(8):  # psycopg prepares at the fifth time
                    await store_tag(store, "old")
                    assert await load_tag(store) == "old"
                await asyncio.to_thread(place.server().execute, f"ALTER TABLE {place.table} {change}")
                assert await load_tag(store) == "old"
                async with store.transaction() as tx:
                    assert await load_tag(tx, for_update=True) == "old"
                    await store_tag(tx, "new")
                await store_tag(store, "newer")
                assert await load_tag(store) == "newer"

    asyncio.run(main())
