"""The encoding of the database."""

from __future__ import annotations

import asyncio
from secrets import token_hex

import pytest
from sqlalchemy import make_url

from support.database import Place
from support.matrix import postgres_rows
from tokenstore import Keyring, UnsupportedOperationError, open_store


@postgres_rows
def test_a_database_that_is_not_utf8_is_refused(place: Place, keyring: Keyring) -> None:
    """LATIN1 could not hold every user's id: `setup` says so, and creates nothing."""
    name = f"latin1_{token_hex(4)}"
    server = place.server()
    server.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    try:
        url = make_url(place.engine_url).set(database=name).render_as_string(hide_password=False)

        async def main() -> None:
            async with open_store(url, keyring=keyring) as store:
                with pytest.raises(UnsupportedOperationError, match=r"encoding is LATIN1; create one with ENCODING"):
                    await store.setup()

        asyncio.run(main())
        assert server.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", name) == [(0,)]
    finally:
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")
