"""Each URL scheme of a database server connects to it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from support import servers
from support.error_text import assert_silent
from tokenstore import ConfigurationError, Keyring, open_store


@pytest.mark.parametrize(
    "scheme", ["postgres", "postgresql", "postgresql+asyncpg", "postgresql+psycopg", "postgresql+psycopg2"]
)
@pytest.mark.postgres
def test_each_postgresql_scheme_stores_and_loads(scheme: str, keyring: Keyring) -> None:
    """Each scheme connects to the server, with options in the URL's query."""
    asyncio.run(_round_trip(_with_scheme(scheme, servers.postgres().url()), keyring))


@pytest.mark.parametrize(
    "scheme",
    [
        *("mysql", "mysql+aiomysql", "mysql+asyncmy", "mysql+pymysql"),
        *("mariadb", "mariadb+aiomysql", "mariadb+asyncmy", "mariadb+mariadbconnector"),
    ],
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


@pytest.mark.parametrize("scheme", ["postgresql+asyncpg", "postgresql+psycopg", "mysql+aiomysql", "mysql+asyncmy"])
@pytest.mark.parametrize(
    "rest",
    ["hunter@2tail@h/db", "hunter@h@2tail:1/db", "hun@ter/2tail@h/db", "hun@ter/db@2tail", "hun@ter?2tail@h=1"],
)
def test_an_unencoded_at_in_a_password_is_refused(scheme: str, rest: str, keyring: Keyring) -> None:
    """The part behind it would be taken for a host or a database, which messages show."""
    with pytest.raises(ConfigurationError, match="write %40 for an @") as caught:
        open_store(f"{scheme}://someone:{rest}", keyring=keyring)
    assert_silent(caught.value, "2tail")
    store = open_store(f"{scheme}://some%40one:hunter%402tail@h/db", keyring=keyring)
    assert "2tail" not in repr(store)


def test_an_at_in_a_path_is_no_password(tmp_path: Path, keyring: Keyring) -> None:
    """Of an SQLite file; and an engine's host cannot have one either."""
    assert "home.db" in repr(open_store(f"sqlite:///{tmp_path}/me@home.db", keyring=keyring))
    engine = create_async_engine("postgresql+asyncpg://someone:hunter@2tail@h/db")
    with pytest.raises(ConfigurationError, match="write %40 for an @") as caught:
        open_store(engine, keyring=keyring)
    assert_silent(caught.value, "2tail")
