"""A lock timeout, and what it rolls back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from support.database import Place, app_engine
from support.matrix import mysql_rows
from support.tagged_tokens import load_tag, set_up, store_tag
from tokenstore import AuthTokenStore, Keyring, LockTimeoutError


async def _ask(connection: AsyncConnection | AsyncSession, query: str) -> Any:
    return (await connection.execute(text(query))).scalar_one()


@mysql_rows
def test_a_lock_timeout_does_not_end_the_caller_s_transaction(place: Place, keyring: Keyring) -> None:
    """Error 1205 rolls back only its statement. A transaction that the store began is rolled back by the store."""

    async def main() -> None:
        await set_up(place, keyring)
        async with app_engine(place, pool_size=1, max_overflow=0) as engine, AsyncSession(engine) as session:
            store = AuthTokenStore(session, keyring=keyring, lock_timeout=1, **place.options)
            await session.execute(text("SET SESSION innodb_lock_wait_timeout = 33"))
            await session.commit()
            async with place.held():
                with pytest.raises(LockTimeoutError) as caught:
                    await load_tag(store, for_update=True)
                assert caught.value.code == "1205"
                assert not session.in_transaction()
                async with session.begin():
                    await store_tag(store, "callers", "u2")
                    with pytest.raises(LockTimeoutError):
                        await store_tag(store, "never")
                    assert await _ask(session, "SELECT @@innodb_lock_wait_timeout") == 33
                    assert await load_tag(store, "u2") == "callers"
            await place.until_idle()
            assert [await load_tag(store), await load_tag(store, "u2")] == ["old", "callers"]
            assert await _ask(session, "SELECT @@innodb_lock_wait_timeout") == 33
            await session.rollback()

    asyncio.run(main())
