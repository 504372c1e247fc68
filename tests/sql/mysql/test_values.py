"""Keys and tokens are stored byte for byte, for all session settings and sizes."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from support.database import Place, app_engine, on_connect
from support.matrix import mysql_rows
from support.tagged_tokens import load_tag, set_up, store_tag
from tokenstore import AuthTokenStore, Keyring, open_store

BIG = 256 * 1024


@mysql_rows
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["SET sql_mode = ''"], id="lenient"),
        pytest.param(["SET NAMES latin1"], id="latin1"),
        pytest.param(["SET collation_connection = utf8mb4_general_ci"], id="general_ci"),
    ],
)
def test_keys_are_compared_byte_for_byte_with_all_session_settings(
    place: Place, settings: list[str], keyring: Keyring
) -> None:
    """User ids that differ in case, accents, blanks or normal form are different; none is truncated or converted."""
    users = ["alice", "Alice", "alice ", " alice", "\u00e9", "e\u0301", "e", "\u00df", "ss", "\U0001f600", "%", "a\\"]
    users.append("\u00e9" * 256)  # the maximum length of a user's id

    async def main() -> None:
        await set_up(place, keyring)
        async with app_engine(place) as engine, open_store(place.url, keyring=keyring) as other:
            on_connect(engine, *settings)
            store = open_store(engine, keyring=keyring, **place.options)
            for number, user_id in enumerate(users):
                await store_tag(store, f"token {number}", user_id)
            for number, user_id in enumerate(users):
                assert await load_tag(store, user_id) == f"token {number}"
                assert await load_tag(other, user_id) == f"token {number}"
            listed = [entry["user_id"] async for entry in store.list_tokens(provider="github")]
            assert listed == sorted([*users, "u1"], key=str.encode)

    asyncio.run(main())


@mysql_rows
def test_tokens_of_the_maximum_size_are_stored(place: Place, keyring: Keyring) -> None:
    """Three fields of 256 KiB each are read back unchanged, on the store's own connections and on a session."""
    access, refresh, claim = (letter * BIG for letter in "arc")
    extra = {"id_token": claim[: BIG - 100]}

    async def main() -> None:
        await set_up(place, keyring)
        async with (
            open_store(place.url, keyring=keyring) as store,
            app_engine(place) as engine,
            AsyncSession(engine) as session,
        ):
            for each in (store, AuthTokenStore(session, keyring=keyring, **place.options)):
                await each.store_tokens("github", "big", access, refresh, None, extra=extra)
                record = await each.load_tokens("github", "big")
                assert record is not None
                assert (record["access_token"], record["refresh_token"]) == (access, refresh)
                assert record["extra"] == extra
                await each.delete_tokens("github", "big")

    asyncio.run(main())
