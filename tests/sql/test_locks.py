"""Row locks of database servers: deadlocks."""

from __future__ import annotations

import asyncio

from support.database import Place
from support.matrix import server_rows
from support.tagged_tokens import load_tag, opened, store_tag
from tokenstore import AuthTokenStore, ConflictError, Keyring, open_store


@server_rows
def test_a_deadlock_ends_with_one_commit_and_one_conflict_error(place: Place, keyring: Keyring) -> None:
    """The transaction that gets ConflictError has written nothing."""

    async def main() -> None:
        async with opened(place, keyring) as one, open_store(place.url, keyring=keyring) as two:
            met = asyncio.Barrier(2)

            async def lock_both(store: AuthTokenStore, order: list[str], tag: str) -> str:
                async with store.transaction() as tx:
                    await load_tag(tx, order[0], for_update=True)
                    await met.wait()
                    await load_tag(tx, order[1], for_update=True)
                    for user_id in order:
                        await store_tag(tx, tag, user_id)
                return tag

            outcomes = await asyncio.gather(
                lock_both(one, ["u1", "u2"], "one"), lock_both(two, ["u2", "u1"], "two"), return_exceptions=True
            )
            [winner] = [outcome for outcome in outcomes if isinstance(outcome, str)]
            [loser] = [outcome for outcome in outcomes if not isinstance(outcome, str)]
            assert isinstance(loser, ConflictError)
            assert loser.code in ("40P01", "1213")
            assert [await load_tag(one), await load_tag(one, "u2")] == [winner, winner]

    asyncio.run(main())
