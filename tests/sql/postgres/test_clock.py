"""The server's clock: a lease runs from the end of the wait."""

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
def test_a_lease_runs_from_the_end_of_the_wait(place: Place, keyring: Keyring) -> None:
    """A claim that waited 0.6 s for the row's lock is granted in full from then on, not from its start."""

    async def main() -> None:
        async with open_store(place.url, keyring=keyring) as store:
            await store.setup()
            await store_tag(store, "old")
            backend: Any = store._backend
            generation = (await backend.get(KEY)).generation
            async with place.held():
                claim = asyncio.create_task(backend.claim_lease(KEY, generation=generation, holder="h", duration=10))
                await place.until_waiting()
                await asyncio.sleep(0.6)  # the time that must not be taken off the lease
            assert await claim
            assert 9.7 < (await backend.get(KEY)).lease_expires_in <= 10

    asyncio.run(main())
