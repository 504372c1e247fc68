"""Which calls belong to a store's transaction."""

from __future__ import annotations

import asyncio

import pytest

from support.database import Place
from support.matrix import shared_rows
from support.tagged_tokens import load_tag, opened, store_tag
from tokenstore import Keyring


@shared_rows
def test_calls_of_the_store_in_a_transaction_s_block_are_not_part_of_it(place: Place, keyring: Keyring) -> None:
    """Tasks that ``gather`` starts in the block and that use the store do not read the transaction's writes."""

    async def main() -> None:
        async with opened(place, keyring) as store:
            with pytest.raises(KeyError):  # noqa: PT012
                async with store.transaction() as tx:
                    await store_tag(tx, "uncommitted")
                    assert await load_tag(tx) == "uncommitted"
                    assert [*await asyncio.gather(load_tag(store), load_tag(store))] == ["old", "old"]
                    if place.row.mark != "sqlite":  # SQLite has only one writer at a time
                        await asyncio.gather(store_tag(store, "own", "u2"), store_tag(store, "own", "u3"))
                    raise KeyError
            assert await load_tag(store) == "old"
            if place.row.mark != "sqlite":
                assert [await load_tag(store, "u2"), await load_tag(store, "u3")] == ["own", "own"]

    asyncio.run(main())
