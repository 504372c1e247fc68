"""`update_metadata` on an application's session."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from support.contract_example import app
from support.database import Place
from support.matrix import each_database, params
from tokenstore import AuthTokenStore, ConflictError, Keyring
from tokenstore.records import TokenKey

ME = ("github", "u1")
KEY = TokenKey(*ME)
LEVELS = ["AUTOCOMMIT", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]


@each_database
def test_an_update_in_a_borrowed_session(place: Place, keyring: Keyring) -> None:
    """Alone it commits, in the application's transaction it takes part, it waits for no lease, and leaves no lock."""

    async def main() -> None:
        async with app(place, keyring) as (engine, outside), AsyncSession(engine) as session:
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            assert await store.update_metadata(*ME, {"a": 1}) is None
            assert not session.in_transaction()
            await store.store_tokens(*ME, "at", "rt", None, metadata={"a": 1})
            record = await outside.load_tokens(*ME)
            assert record is not None
            assert record["metadata"] == {"a": 1}
            claim = outside._backend.claim_lease
            assert await claim(KEY, generation=record["generation"], holder="h", duration=60)
            assert await store.update_metadata(*ME, {"b": 2}) == {"a": 1, "b": 2}
            assert not session.in_transaction()
            async with session.begin():
                assert await store.update_metadata(*ME, {"c": 3}) == {"a": 1, "b": 2, "c": 3}
                assert await store.update_metadata("github", "nobody", {"c": 3}) is None
                await session.rollback()
            assert await outside.update_metadata(*ME, {}) == {"a": 1, "b": 2}
            async with session.begin():
                assert await store.update_metadata(*ME, {"c": 3}) == {"a": 1, "b": 2, "c": 3}
                assert await store.update_metadata(*ME, {"a": None}) == {"b": 2, "c": 3}
            assert await outside.update_metadata(*ME, {"d": 4}) == {"b": 2, "c": 3, "d": 4}

    asyncio.run(main())


@each_database
def test_an_update_under_a_lock_of_the_same_session_commits_as_storing_does(place: Place, keyring: Keyring) -> None:
    """``load_tokens(for_update=True)`` begins a transaction of the store's, which the next write ends."""

    async def main() -> None:
        async with app(place, keyring) as (engine, outside), AsyncSession(engine) as session:
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            await store.store_tokens(*ME, "at", "rt", None)
            for _ in range(2):  # the second update changes nothing
                assert await store.load_tokens(*ME, for_update=True) is not None
                assert await store.update_metadata(*ME, {"a": 1}) == {"a": 1}
                assert not session.in_transaction()
            assert await store.load_tokens("github", "nobody", for_update=True) is None
            assert await store.update_metadata("github", "nobody", {"a": 1}) is None
            assert not session.in_transaction()
            assert await outside.update_metadata(*ME, {"b": 2}) == {"a": 1, "b": 2}

    asyncio.run(main())


@pytest.mark.parametrize("row", params(names=["postgresql+asyncpg", "mariadb+asyncmy"]))
@pytest.mark.parametrize("level", LEVELS)
def test_an_update_in_a_transaction_that_reads_from_a_snapshot_loses_nothing(
    place: Place, level: str, keyring: Keyring
) -> None:
    """The session has read the row before another process changed it. The update keeps that change, or raises."""

    async def main() -> None:
        async with app(place, keyring, isolation_level=level) as (engine, outside), AsyncSession(engine) as session:
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            await outside.store_tokens(*ME, "at", "rt", None)
            others = {"theirs": 1}
            try:
                async with session.begin():
                    assert await store.load_tokens(*ME) is not None
                    if (place.row.mark, level) == ("mysql", "SERIALIZABLE"):  # where a plain read takes a lock
                        others = {}
                    else:
                        await outside.update_metadata(*ME, others)
                    assert await store.update_metadata(*ME, {"ours": 2}) == {**others, "ours": 2}
            except ConflictError:
                assert place.row.mark == "postgres"
                assert level in ("REPEATABLE READ", "SERIALIZABLE")
                assert await store.update_metadata(*ME, {"ours": 2}) == {"theirs": 1, "ours": 2}
            assert await outside.update_metadata(*ME, {}) == {**others, "ours": 2}

    asyncio.run(main())
