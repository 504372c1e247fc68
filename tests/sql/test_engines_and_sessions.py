"""A store on an application's engine or session works like a store by URL, and leaves both unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, cast

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from support.database import Place, app_engine
from support.matrix import ROWS, Row, shared_rows
from tokenstore import (
    AuthTokenStore,
    InvalidInputError,
    Keyring,
    TamperedError,
    TokenRecord,
    UnknownKeyError,
    UnsupportedOperationError,
    open_store,
)
from tokenstore.records import SealedRecord, TokenKey
from tokenstore.sealing import Sealer

SOON = datetime(2031, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
LATER = datetime(2032, 5, 6, 7, 8, 9, 654321, tzinfo=UTC)
PAST = datetime(2020, 1, 1)


def _kinds() -> list[object]:
    marked = [(row, getattr(pytest.mark, row.mark)) for row in ROWS if row.shared]
    return [
        pytest.param(row, kind, id=f"{row.name}-{kind}", marks=m) for row, m in marked for kind in ("engine", "session")
    ]


on_engine_and_session = pytest.mark.parametrize(("row", "kind"), _kinds())


@asynccontextmanager
async def opened(row: Row, url: str, kind: str, keyring: Keyring) -> AsyncIterator[AuthTokenStore]:
    place = Place(row, url)
    async with app_engine(place) as engine, AsyncSession(engine) as session:
        if kind == "engine":
            store = open_store(engine, keyring=keyring, **place.options)
        else:
            store = AuthTokenStore(session, keyring=keyring, **place.options)
        async with store:
            await store.setup()
            yield store
        assert not session.in_transaction()


async def load(store: AuthTokenStore, user_id: str = "u") -> TokenRecord:
    record = await store.load_tokens("github", user_id)
    assert record is not None
    return record


@on_engine_and_session
def test_store_load_list_and_delete_on_an_engine_and_on_a_session(
    row: Row, kind: str, url: str, keyring: Keyring
) -> None:
    async def main() -> None:
        async with opened(row, url, kind, keyring) as store:
            assert await store.load_tokens("github", "u") is None
            east = timezone(timedelta(hours=5, minutes=45))
            extra = {"scope": "repo", "nested": {"é": [1, 2.5, None, True, "\0"]}}
            await store.store_tokens(
                "github", "u", "gho_a", "ghr_a", SOON.replace(tzinfo=None), LATER.astimezone(east), extra=extra
            )
            first = await load(store)
            assert (first["access_token"], first["refresh_token"], first["extra"]) == ("gho_a", "ghr_a", extra)
            assert (first["access_token_expires_at"], first["refresh_token_expires_at"]) == (SOON, LATER)
            assert {type(stamp.tzinfo) for stamp in first.values() if isinstance(stamp, datetime)} == {type(UTC)}
            await store.store_tokens("github", "u", "gho_b", None, None)
            second = await load(store)
            assert (second["access_token"], second["refresh_token"], second["extra"]) == ("gho_b", None, {})
            assert (second["generation"], second["created_at"]) == (first["generation"] + 1, first["created_at"])
            for user_id in ("U", "u ", "é", "e\u0301"):
                await store.store_tokens("github", user_id, "other", None, None)
            users = [entry["user_id"] async for entry in store.list_tokens(page_size=2)]
            assert users == ["U", "e\u0301", "u", "u ", "é"]
            assert await store.delete_tokens("github", "u") is True
            assert await store.delete_tokens("github", "u") is False
            assert await store.load_tokens("github", "u") is None
            with pytest.raises(InvalidInputError):
                await store.store_tokens("github", "nul\0", "a", "r", SOON)
            assert (await load(store, "u "))["access_token"] == "other"

    asyncio.run(main())


@on_engine_and_session
def test_resealing_with_a_new_key_and_refusing_a_moved_ciphertext(row: Row, kind: str, url: str) -> None:
    old, new = ("old", bytes(range(32))), ("new", bytes(range(32, 64)))

    async def main() -> None:
        async with opened(row, url, kind, Keyring([old])) as store:
            await store.store_tokens("github", "u", "a", "r", SOON, LATER, extra={"scope": "x"})
            await store.store_tokens("github", "v", "b", "s", SOON)
            before = await load(store)
            store._sealer = Sealer(Keyring([new, old]))
            assert await store.reseal_tokens("github", "u") is True
            assert await store.reseal_tokens("github", "u") is False
            assert await load(store) == before | {"key_id": "new"}
            store._sealer = Sealer(Keyring([new]))
            with pytest.raises(UnknownKeyError):
                await load(store, "v")
            store._sealer = Sealer(Keyring([new, old]))
            rows = [await store._backend.get(TokenKey("github", user_id)) for user_id in "uv"]
            mine, other = [cast(SealedRecord, row).tokens for row in rows]
            for forged in (
                other,
                replace(mine, refresh_token=other.refresh_token),
                replace(mine, extra=mine.access_token),
            ):
                await store._backend.put(TokenKey("github", "u"), forged)
                with pytest.raises(TamperedError):
                    await load(store)

    asyncio.run(main())


@shared_rows
def test_load_for_update_refresh_and_store_without_a_commit_by_the_caller(row: Row, url: str, keyring: Keyring) -> None:
    """The new tokens are stored, and the row is not locked afterwards."""
    used: list[str] = []

    async def three_steps(engine: AsyncEngine, options: dict[str, Any]) -> None:
        async with AsyncSession(engine) as session:
            store = AuthTokenStore(db_session=session, keyring=keyring, **options)
            record = await store.load_tokens(provider="github", user_id="user-123", for_update=True)
            if record and not store.is_access_token_valid(record) and store.is_refresh_token_valid(record):
                used.append(record["refresh_token"])
                await asyncio.sleep(0)  # stands for the provider's call
                await store.store_tokens(
                    provider="github",
                    user_id="user-123",
                    access_token="access-1",
                    refresh_token="refresh-1",
                    access_token_expires_at=SOON,
                )
                assert not session.in_transaction(), "the store did not commit the transaction that it began"

    async def main() -> None:
        place = Place(row, url)
        async with app_engine(place) as engine:
            async with AsyncSession(engine) as session:
                store = AuthTokenStore(db_session=session, keyring=keyring, **place.options)
                await store.setup()
                await store.store_tokens("github", "user-123", "access-0", "refresh-0", access_token_expires_at=PAST)
            await asyncio.gather(*(three_steps(engine, place.options) for _ in range(5)))
            await place.until_idle()
            async with AsyncSession(engine) as session:
                store = AuthTokenStore(db_session=session, keyring=keyring, **place.options)
                record = await load(store, "user-123")
                assert (record["access_token"], record["refresh_token"]) == ("access-1", "refresh-1")
                assert not session.in_transaction(), "a plain read left a transaction open"

    asyncio.run(main())
    assert used == ["refresh-0"]


@shared_rows
def test_a_locking_load_without_a_row_leaves_no_transaction_open(row: Row, url: str, keyring: Keyring) -> None:
    """Without a row the caller has nothing to refresh and makes no further call, which would end the transaction."""

    async def main() -> None:
        async with opened(row, url, "session", keyring) as store:
            assert await store.load_tokens("github", "u", for_update=True) is None
            await Place(row, url).until_idle()

    asyncio.run(main())


@shared_rows
def test_in_the_caller_s_transaction_only_the_caller_commits(row: Row, url: str, keyring: Keyring) -> None:
    """The store's writes are committed or rolled back together with the caller's own."""

    async def main() -> None:
        place = Place(row, url)
        async with app_engine(place) as engine, AsyncSession(engine) as session, AsyncSession(engine) as elsewhere:
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            observer = AuthTokenStore(elsewhere, keyring=keyring, **place.options)
            await store.setup()
            async with session.begin():
                await session.execute(text("SELECT 1"))
                await store.store_tokens("github", "u", "a", "r", SOON)
                assert await store.load_tokens("github", "u", for_update=True) == await load(store)
                assert session.in_transaction()
                assert await observer.load_tokens("github", "u") is None
            assert await observer.load_tokens("github", "u") is not None
            with pytest.raises(KeyError):  # noqa: PT012  # the whole block is needed: it is the transaction
                async with session.begin():
                    await store.delete_tokens("github", "u")
                    await store.store_tokens("github", "v", "a", "r", SOON)
                    raise KeyError
            assert await observer.load_tokens("github", "u") is not None
            assert await observer.load_tokens("github", "v") is None
            with pytest.raises(UnsupportedOperationError):
                async with store.transaction():
                    pass
            await store.aclose()
            assert (await session.execute(text("SELECT 1"))).scalar_one() == 1, (
                "the caller cannot use its session any more"
            )
            await session.rollback()

    asyncio.run(main())
