"""Which backend a URL, an engine or a session gets, and what an error may say."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from tokenstore import (
    AuthTokenStore,
    ConfigurationError,
    Keyring,
    MissingDependencyError,
    UnknownBackendError,
    UnsupportedOperationError,
    open_store,
)
from tokenstore.registry import ENTRY_POINT_GROUP, schemes

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
    assert schemes() == sorted({*(scheme.partition("+")[0] for scheme in DRIVERS), "memory"})


def test_a_driver_that_no_backend_has() -> None:
    """The error names the schemes of the database; a package cannot claim such a scheme either."""
    with pytest.raises(UnknownBackendError, match=r"postgresql\+pg8000://.*postgresql\+asyncpg, postgresql\+psycopg"):
        open_store("postgresql+pg8000://host/db", keyring=Keyring({"k1": bytes(32)}))


@pytest.mark.parametrize(("scheme", "driver"), DRIVERS.items())
def test_a_scheme_chooses_its_driver(scheme: str, driver: str, keyring: Keyring) -> None:
    """The scheme names the driver, or a plain one asyncpg, aiomysql or aiosqlite; nothing is connected yet."""
    place = "/some.db" if scheme.startswith("sqlite") else f"user:{SECRET}@localhost:1/db"
    store = open_store(f"{scheme}://{place}", keyring=keyring)
    assert f" at {driver}://" in repr(store)
    assert SECRET not in repr(store)


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


def test_unsupported_databases_are_named(keyring: Keyring) -> None:
    """An engine of another database says which ones there are."""

    class Stranger:
        name = "oracle"

    engine = create_async_engine("sqlite+aiosqlite:///x.db")
    engine.sync_engine.dialect = Stranger()  # type: ignore[assignment]
    with pytest.raises(UnsupportedOperationError, match="no backend for oracle; there is one for mariadb, mysql"):
        open_store(engine, keyring=keyring)
