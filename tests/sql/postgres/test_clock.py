"""The server's clock: a lease begins after the wait for the row's lock."""

from __future__ import annotations

import asyncio
from typing import Any

from support.database import Place
from support.matrix import postgres_rows
from support.tagged_tokens import store_tag
from tokenstore import Keyring, open_store
from tokenstore.records import TokenKey

KEY = TokenKey("github", "u1")


@postgres_rows
def test_a_lease_begins_after_the_wait_for_the_lock(place: Place, keyring: Keyring) -> None:
    """A claim that waited 0.6 s for the row's lock gets its full duration from the end of that wait."""

    async def main() -> None:
        async with open_store(place.url, keyring=keyring) as store:
            await store.setup()
            await store_tag(store, "old")
            backend: Any = store._backend
            generation = (await backend.get(KEY)).generation
            async with place.held():
                claim = asyncio.create_task(backend.claim_lease(KEY, generation=generation, holder="h", duration=10))
                await place.until_waiting()
                await asyncio.sleep(0.6)  # this time must not shorten the lease
            assert await claim
            assert 9.7 < (await backend.get(KEY)).lease_expires_in <= 10

    asyncio.run(main())
