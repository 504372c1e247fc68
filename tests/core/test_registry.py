"""Choosing a backend by URL: schemes, drivers, options, and what an error may say."""

from __future__ import annotations

import asyncio
import importlib.metadata
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from support import servers
from support.matrix import Row, every_row
from tokenstore import (
    AuthTokenStore,
    ConfigurationError,
    Keyring,
    MissingDependencyError,
    TokenStoreError,
    UnknownBackendError,
    UnsupportedOperationError,
    open_store,
)
from tokenstore.options import StoreOptions, TableOptions
from tokenstore.registry import ENTRY_POINT_GROUP, schemes
from tokenstore_sql.base import POOL_OPTIONS, TABLE_OPTIONS, SQLBackend
from tokenstore_sql.mysql import MySQLBackend
from tokenstore_sql.postgres import PostgresBackend
from tokenstore_sql.sqlite import SQLiteBackend

SECRET = "s3cr3t-in-the-url"

# What each scheme connects with, as SQLAlchemy names it.
DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
    "postgresql+psycopg": "postgresql+psycopg",
    "mysql": "mysql+aiomysql",
    "mysql+aiomysql": "mysql+aiomysql",
    "mysql+asyncmy": "mysql+asyncmy",
    "mariadb": "mysql+aiomysql",
    "mariadb+aiomysql": "mysql+aiomysql",
    "mariadb+asyncmy": "mysql+asyncmy",
}


def test_the_table_of_schemes_is_whole() -> None:
    """Every scheme but memory:// has its driver above, and none is known beside them."""
    assert schemes() == sorted([*DRIVERS, "memory"])


def test_type_checkers_know_every_option() -> None:
    """The keyword options that are typed are those that the backends read."""
    backends: list[type[SQLBackend]] = [SQLiteBackend, PostgresBackend, MySQLBackend]
    of_drivers = {name for backend in backends for name in backend.driver_options}
    assert get_type_hints(TableOptions).keys() == TABLE_OPTIONS.keys()
    assert get_type_hints(StoreOptions).keys() == {*TABLE_OPTIONS, *POOL_OPTIONS, *of_drivers}


@pytest.mark.parametrize(("scheme", "driver"), DRIVERS.items())
def test_a_scheme_chooses_its_driver(scheme: str, driver: str, keyring: Keyring) -> None:
    """The scheme names the driver, or a plain one asyncpg, aiomysql or aiosqlite; nothing is connected yet."""
    place = "/some.db" if scheme.startswith("sqlite") else f"user:{SECRET}@localhost:1/db"
    store = open_store(f"{scheme}://{place}", keyring=keyring)
    assert f" at {driver}://" in repr(store)
    assert SECRET not in repr(store)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg", "postgresql+psycopg"])
@pytest.mark.postgres
def test_every_postgresql_scheme_stores_and_loads(scheme: str, keyring: Keyring) -> None:
    """Each scheme reaches the server, with options in the URL's query."""
    asyncio.run(_round_trip(_with_scheme(scheme, servers.postgres().url()), keyring))


@pytest.mark.parametrize(
    "scheme", ["mysql", "mysql+aiomysql", "mysql+asyncmy", "mariadb", "mariadb+aiomysql", "mariadb+asyncmy"]
)
@pytest.mark.mysql
def test_every_mysql_scheme_stores_and_loads(scheme: str, keyring: Keyring) -> None:
    """Each scheme reaches the server, with options in the URL's query."""
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


@every_row
def test_options_by_keyword_or_in_the_url(row: Row, url: str, keyring: Keyring) -> None:
    """An option means the same in both places; given in both, unknown or unacceptable, it is an error."""
    bare = url.partition("?")[0]
    open_store(bare, keyring=keyring, lock_timeout=3)
    open_store(f"{bare}?lock_timeout=3", keyring=keyring)
    refused: list[tuple[str, dict[str, Any], str]] = [
        (f"{bare}?lock_timeout=3", {"lock_timeout": 3}, "both in the URL and by keyword"),
        (f"{bare}?lock_tiemout=3", {}, r"unknown: lock_tiemout; the options of .* are .*lock_timeout"),
        (bare, {"colour": "red"}, "unknown: colour"),
        (bare, {"lock_timeout": 0}, "lock_timeout must be more than zero"),
        (bare, {"lock_timeout": float("nan")}, "lock_timeout must be more than zero"),
        (f"{bare}?lock_timeout=soon", {}, "lock_timeout must be a number of seconds"),
    ]
    if row.name != "memory":
        refused += [
            (f"{bare}?table=a;drop", {}, "table must be an identifier"),
            (bare, {"table": "x" * 49}, "table must be an identifier"),
            (f"{bare}?pool_size=0", {}, "pool_size must be a whole number"),
            (bare, {"pool_size": True}, "pool_size must be a whole number"),
        ]
    for target, options, message in refused:
        with pytest.raises(ConfigurationError, match=message):
            open_store(target, keyring=keyring, **options)


@pytest.mark.parametrize("url", ["", "tokens.db", "sqlite:tokens.db", ":memory:", f"user:{SECRET}@host", "://x"])
def test_what_is_no_url_is_refused(url: str, keyring: Keyring) -> None:
    """The error lists the known schemes, and does not repeat a text that may hold a password."""
    with pytest.raises(ConfigurationError, match=r"not a URL.*known schemes: mariadb, .*sqlite") as caught:
        open_store(url, keyring=keyring)
    assert SECRET not in str(caught.value)


def test_an_unknown_scheme_lists_the_known_ones(keyring: Keyring) -> None:
    """The error says which schemes there are."""
    with pytest.raises(UnknownBackendError, match=r"no backend for redis://; known schemes: mariadb.*sqlite") as caught:
        open_store(f"redis://user:{SECRET}@host/0", keyring=keyring)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite+aiosqlite://"])
def test_sqlite_in_memory_is_refused_with_the_reason(url: str, keyring: Keyring) -> None:
    """One connection for all tasks cannot keep their transactions apart; the error says what to use instead."""
    with pytest.raises(ConfigurationError, match=r"memory"):
        open_store(url, keyring=keyring)


@pytest.mark.parametrize(
    "url", [f"postgresql://u:{SECRET}@h:port/db", f"mysql://u:{SECRET}@h:1:2/db", f"mysql://{SECRET}:5 6/db"]
)
def test_a_url_that_cannot_be_read_is_not_repeated(url: str, keyring: Keyring) -> None:
    """The password of a malformed URL shows up nowhere in the error."""
    with pytest.raises(ConfigurationError) as caught:
        open_store(url, keyring=keyring)
    assert SECRET not in f"{caught.value!r} {caught.value.__cause__!r}"


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [
        ("postgresql://h/db", "asyncpg", "postgres"),
        ("postgresql+psycopg://h/db", "psycopg", "psycopg"),
        ("mysql://h/db", "aiomysql", "mysql"),
        ("mariadb+asyncmy://h/db", "asyncmy", "asyncmy"),
    ],
)
def test_a_missing_driver_names_its_extra(
    url: str, package: str, extra: str, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is an ImportError, too, and says what to install; that extra really brings the driver."""
    monkeypatch.setitem(sys.modules, package, None)  # what makes an import fail
    with pytest.raises(MissingDependencyError, match=rf'pip install "tokenstore\[{extra}\]"') as caught:
        open_store(url, keyring=keyring)
    assert isinstance(caught.value, ImportError)
    requirements = importlib.metadata.requires("tokenstore") or []
    assert any(line.startswith(package) and f'extra == "{extra}"' in line.replace("'", '"') for line in requirements)


def test_entry_points_cannot_shadow_a_built_in(keyring: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    """A built-in scheme wins over an installed package's; two packages with one scheme are refused."""

    def found(*, group: str) -> list[importlib.metadata.EntryPoint]:
        assert group == ENTRY_POINT_GROUP
        return [
            importlib.metadata.EntryPoint("memory", "thief:Backend", group),
            importlib.metadata.EntryPoint("twice", "one:Backend", group),
            importlib.metadata.EntryPoint("twice", "two:Backend", group),
        ]

    monkeypatch.setattr("importlib.metadata.entry_points", found)
    assert "MemoryBackend" in repr(open_store("memory://", keyring=keyring))
    with pytest.raises(
        ConfigurationError, match=r"several installed packages claim twice://: one:Backend, two:Backend"
    ):
        open_store("twice://", keyring=keyring)


def test_only_engines_and_sessions_of_sqlalchemy_are_taken(keyring: Keyring, tmp_path: Path) -> None:
    """A store is opened over a URL, an AsyncEngine or a backend; a session goes to the constructor."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'x.db'}")
    wrong: Any = object()
    session: Any = AsyncSession(engine)
    with pytest.raises(ConfigurationError, match="takes a URL, an AsyncEngine or a backend, not object"):
        open_store(wrong, keyring=keyring)
    with pytest.raises(ConfigurationError, match="not AsyncSession"):
        open_store(session, keyring=keyring)
    with pytest.raises(ConfigurationError, match="must be a SQLAlchemy AsyncSession, not AsyncEngine"):
        AuthTokenStore(engine, keyring=keyring)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="bound to no engine"):
        AuthTokenStore(AsyncSession(), keyring=keyring)
    with pytest.raises(ConfigurationError, match="either db_session or backend"):
        AuthTokenStore(keyring=keyring)
    with pytest.raises(ConfigurationError, match="unknown: pool_size"):
        open_store(engine, keyring=keyring, pool_size=3)


def test_keys_are_needed_before_anything_is_opened(tmp_path: Path) -> None:
    """Without keys there is no store and no file; none is made up."""
    with pytest.raises(ConfigurationError, match="TOKENSTORE_KEYS is not set; `tokenstore keygen`"):
        open_store(f"sqlite:///{tmp_path / 'x.db'}")
    assert list(tmp_path.iterdir()) == []


def test_sqlite_urls_that_cannot_be_a_file(keyring: Keyring) -> None:
    """A host, a schema or SQLite's own URI options are refused."""
    for url, error in (("sqlite://tokens.db", ConfigurationError), ("sqlite:///x.db?mode=ro", ConfigurationError)):
        with pytest.raises(error):
            open_store(url, keyring=keyring)
    with pytest.raises(ConfigurationError, match="no schemas"):
        open_store("sqlite:///x.db", schema="main", keyring=keyring)


@pytest.mark.sqlite
def test_an_unreachable_file_is_a_clear_error(tmp_path: Path, keyring: Keyring) -> None:
    """A folder that is missing, or a file that is no database, is one of our errors."""
    (tmp_path / "text.db").write_text("no database " * 100)

    async def main() -> None:
        for path in (tmp_path / "missing" / "x.db", tmp_path / "text.db", tmp_path):
            async with open_store(f"sqlite:///{path}", keyring=keyring) as store:
                with pytest.raises(TokenStoreError):
                    await store.setup()

    asyncio.run(main())


def test_unsupported_databases_are_named(keyring: Keyring) -> None:
    """An engine of another database says which ones there are."""

    class Stranger:
        name = "oracle"

    engine = create_async_engine("sqlite+aiosqlite:///x.db")
    engine.sync_engine.dialect = Stranger()  # type: ignore[assignment]
    with pytest.raises(UnsupportedOperationError, match="no backend for oracle; there is one for mariadb, mysql"):
        open_store(engine, keyring=keyring)
