"""`store_token_response` on an application's session."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from support.contract_example import app
from support.database import Place
from support.matrix import each_database
from tokenstore import AuthTokenStore, Keyring, UnknownKeyError

ME = ("github", "u1")
AT = {"access_token": "at-2"}


@each_database
def test_in_a_borrowed_session(place: Place, keyring: Keyring) -> None:
    """Alone it commits, in the application's transaction it takes part, and no lock is left behind."""

    async def main() -> None:
        async with app(place, keyring) as (engine, outside):
            async with AsyncSession(engine) as session:
                store = AuthTokenStore(session, keyring=keyring, **place.options)
                first = await store.store_token_response(*ME, {"access_token": "at-1", "refresh_token": "rt-1"})
                assert not session.in_transaction()
                second = await store.store_token_response(*ME, AT)
                assert not session.in_transaction()
                assert (first["refresh_token"], second["refresh_token"]) == ("rt-1", "rt-1")
                assert await store.store_token_response(*ME, AT, if_absent=True) == second
                assert not session.in_transaction()
                async with session.begin():
                    third = await store.store_token_response(*ME, {"access_token": "at-3"})
                    await session.rollback()
                assert (third["access_token"], third["refresh_token"]) == ("at-3", "rt-1")
                assert await outside.load_tokens(*ME) == second
            async with AsyncSession(engine) as session:
                stranger = AuthTokenStore(session, keyring=Keyring({"k": bytes(32)}), **place.options)
                with pytest.raises(UnknownKeyError):
                    await stranger.store_token_response(*ME, AT)
                assert not session.in_transaction()
            await outside.store_tokens(*ME, "at-4", None, None)  # waits for no lock

    asyncio.run(main())
