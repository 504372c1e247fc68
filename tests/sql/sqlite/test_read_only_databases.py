"""A database that accepts no writes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import event

from support.database import Place, app_engine
from support.tagged_tokens import load_tag, set_up, store_tag
from tokenstore import BackendUnavailableError, Keyring, open_store

pytestmark = pytest.mark.sqlite


def test_a_read_only_database_is_unavailable_for_writes(place: Place, keyring: Keyring) -> None:
    """Reads succeed; a write raises an error which says that the database accepts no writes."""

    async def main() -> None:
        await set_up(place, keyring)
        async with app_engine(place) as engine:

            @event.listens_for(engine.sync_engine, "connect")
            def no_writes(dbapi_connection: Any, _record: object) -> None:
                dbapi_connection.execute("PRAGMA query_only = 1").close()

            async with open_store(engine, keyring=keyring) as store:
                assert await load_tag(store) == "old"
                with pytest.raises(BackendUnavailableError, match="accepts no writes") as caught:
                    await store_tag(store, "new")
                assert caught.value.code == "SQLITE_READONLY"

    asyncio.run(main())
