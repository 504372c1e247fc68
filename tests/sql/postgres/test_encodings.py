"""The encoding of the database."""

from __future__ import annotations

import asyncio
from secrets import token_hex

import pytest
from sqlalchemy import MetaData, make_url
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from support.database import Place
from support.matrix import postgres_rows
from tokenstore import Keyring, TamperedError, UnsupportedOperationError, open_store
from tokenstore_sql.schema import token_table


@postgres_rows
def test_a_database_that_is_not_utf8_is_refused(place: Place, keyring: Keyring) -> None:
    """LATIN1 cannot represent every user id, so `setup` raises an error and creates nothing."""
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


@postgres_rows
def test_text_that_is_not_utf8_spoils_no_other_load(place: Place, keyring: Keyring) -> None:
    """A database with the encoding SQL_ASCII takes any bytes; `setup` refuses it, an own migration may not."""
    name = f"ascii_{token_hex(4)}"
    server = place.server()
    server.execute(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    try:
        table = CreateTable(token_table(MetaData(), place.table))
        server.execute(str(table.compile(dialect=postgresql.dialect())), name)  # type: ignore[no-untyped-call]
        url = make_url(place.url).set(database=name)

        async def main() -> None:
            async with open_store(url.render_as_string(hide_password=False), keyring=keyring) as store:
                for user in ("alice", "bobby"):
                    await store.store_tokens("github", user, "access", "refresh", None)
                server.execute(f"UPDATE {place.table} SET key_id = chr(255) WHERE user_id = 'bobby'", name)
                users = ["alice", "bobby"] * 8
                answers = await asyncio.gather(
                    *(store.load_tokens("github", user) for user in users), return_exceptions=True
                )
                for user, answer in zip(users, answers, strict=True):
                    assert isinstance(answer, dict if user == "alice" else TamperedError), repr(answer)

        asyncio.run(main())
    finally:
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")
