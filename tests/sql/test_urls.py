"""Each URL scheme of a database server connects to it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from support import servers
from tokenstore import Keyring, open_store


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg", "postgresql+psycopg"])
@pytest.mark.postgres
def test_each_postgresql_scheme_stores_and_loads(scheme: str, keyring: Keyring) -> None:
    """Each scheme connects to the server, with options in the URL's query."""
    asyncio.run(_round_trip(_with_scheme(scheme, servers.postgres().url()), keyring))


@pytest.mark.parametrize(
    "scheme", ["mysql", "mysql+aiomysql", "mysql+asyncmy", "mariadb", "mariadb+aiomysql", "mariadb+asyncmy"]
)
@pytest.mark.mysql
def test_each_mysql_scheme_stores_and_loads(scheme: str, keyring: Keyring) -> None:
    """Each scheme connects to the server, with options in the URL's query."""
    asyncio.run(_round_trip(_with_scheme(scheme, servers.mariadb().url()), keyring))


def _with_scheme(scheme: str, url: str) -> str:
    table = "t_" + scheme.replace("+", "_")
    return f"{scheme}://{url.partition('://')[2]}?table={table}&pool_size=2&lock_timeout=2.5&connect_timeout=5"


async def _round_trip(url: str, keyring: Keyring) -> None:
    async with open_store(url, keyring=keyring) as store:
        await store.setup()
        await store.store_tokens("github", "u1", "gho_1", None, datetime.now(UTC) + timedelta(hours=1))
        record = await store.load_tokens("github", "u1")
        assert record is not None
        assert record["access_token"] == "gho_1"
