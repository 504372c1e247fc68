"""Prepared statements whose plans become invalid through another process's DDL."""

from __future__ import annotations

import asyncio

from support.database import Place
from support.matrix import postgres_rows
from support.tagged_tokens import load_tag, store_tag
from tokenstore import Keyring, open_store


@postgres_rows
def test_calls_succeed_after_another_process_changed_the_table(place: Place, keyring: Keyring) -> None:
    """A new column makes the cached plans of pooled connections invalid; the next calls must still succeed."""

    async def main() -> None:
        async with open_store(place.url, keyring=keyring, pool_size=2) as store:
            await store.setup()
            for change in ("ADD COLUMN more text", "ALTER COLUMN more TYPE varchar(9)", "DROP COLUMN more"):
                for _ in range(8):  # psycopg prepares a statement when it is executed for the fifth time
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
