"""The option ``schema``: a schema that does not exist."""

from __future__ import annotations

import asyncio
import re
from secrets import token_hex

import pytest

from support.database import Place
from support.matrix import postgres_rows, server_rows
from support.tagged_tokens import load_tag, store_tag
from tokenstore import BackendError, ConfigurationError, Keyring, LoginRefusedError, TableMissingError, open_store


@server_rows
def test_setup_says_how_to_create_a_missing_schema(place: Place, keyring: Keyring) -> None:
    """The statement in the message is the one that helps; nothing is created without it."""
    schema, server = f"S_{token_hex(6)}", place.server()

    async def main() -> None:
        async with open_store(place.url, keyring=keyring, schema=schema) as store:
            # To MySQL, a schema is a database.
            words = "tokenstore init|no such database: check .* the option `schema`"
            with pytest.raises((TableMissingError, LoginRefusedError), match=words):
                await load_tag(store)
            with pytest.raises(ConfigurationError, match=f"there is no schema {schema}") as caught:
                await store.setup()
            [statement] = re.findall(r"CREATE SCHEMA [^\s;]+", str(caught.value))
            await asyncio.to_thread(server.execute, statement)
            await store.setup()
            await store_tag(store, "new")
            assert await load_tag(store) == "new"

    try:
        asyncio.run(main())
    finally:
        quoted, cascade = (f'"{schema}"', "CASCADE") if place.row.mark == "postgres" else (f"`{schema}`", "")
        server.execute(f"DROP SCHEMA IF EXISTS {quoted} {cascade}")


@postgres_rows
def test_setup_says_that_the_search_path_has_no_schema(place: Place, keyring: Keyring) -> None:
    server = place.server()
    server.execute(f"ALTER ROLE {server.user} IN DATABASE {server.database} SET search_path = nowhere")

    async def main() -> None:
        async with open_store(place.url, keyring=keyring) as store:
            with pytest.raises(BackendError, match=r"search_path .* option `schema`"):
                await store.setup()

    try:
        asyncio.run(main())
    finally:
        server.execute(f"ALTER ROLE {server.user} IN DATABASE {server.database} RESET search_path")
