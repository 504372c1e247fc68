"""The backend for a URL, an engine or a session, and errors without passwords."""

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
# SQLAlchemy's name of the driver for each scheme.
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


def test_the_table_of_this_test_has_all_schemes() -> None:
    """The registry has the schemes above and memory://, and no others."""
    assert schemes() == sorted({*(scheme.partition("+")[0] for scheme in DRIVERS), "memory"})


def test_an_unsupported_driver_of_a_supported_database_is_refused() -> None:
    """The error names the supported schemes of the database; an entry point cannot register such a scheme."""
    with pytest.raises(UnknownBackendError, match=r"postgresql\+other://.*postgresql\+asyncpg, postgresql\+psycopg"):
        open_store("postgresql+other://host/db", keyring=Keyring({"k1": bytes(32)}))


@pytest.mark.parametrize(("scheme", "driver"), DRIVERS.items())
def test_the_scheme_selects_the_driver(scheme: str, driver: str, keyring: Keyring) -> None:
    """A scheme without a driver selects asyncpg, aiomysql or aiosqlite; no connection is opened yet."""
    place = "/some.db" if scheme.startswith("sqlite") else f"user:{SECRET}@localhost:1/db"
    store = open_store(f"{scheme}://{place}", keyring=keyring)
    assert f" at {driver}://" in repr(store)
    assert SECRET not in repr(store)


@pytest.mark.parametrize("url", ["", "tokens.db", "sqlite:tokens.db", ":memory:", f"user:{SECRET}@host", "://x"])
def test_a_text_that_is_not_a_url_is_refused(url: str, keyring: Keyring) -> None:
    """The error lists the known schemes, and does not repeat the text, which may contain a password."""
    with pytest.raises(ConfigurationError, match=r"not a URL.*known schemes: mariadb, .*sqlite") as caught:
        open_store(url, keyring=keyring)
    assert SECRET not in str(caught.value)


def test_the_error_for_an_unknown_scheme_lists_the_known_ones(keyring: Keyring) -> None:
    """The error lists all known schemes."""
    with pytest.raises(UnknownBackendError, match=r"no backend for redis://; known schemes: mariadb.*sqlite") as caught:
        open_store(f"redis://user:{SECRET}@host/0", keyring=keyring)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url", [f"postgresql://u:{SECRET}@h:port/db", f"mysql://u:{SECRET}@h:1:2/db", f"mysql://{SECRET}:5 6/db"]
)
def test_the_error_for_a_malformed_url_does_not_contain_it(url: str, keyring: Keyring) -> None:
    """The password of a malformed URL is nowhere in the error."""
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
def test_the_error_for_a_missing_driver_names_the_extra_to_install(
    url: str, package: str, extra: str, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is also an ImportError, and the extra that it names contains the driver."""
    monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
    with pytest.raises(MissingDependencyError, match=rf'pip install "tokenstore\[{extra}\]"') as caught:
        open_store(url, keyring=keyring)
    assert isinstance(caught.value, ImportError)
    requirements = importlib.metadata.requires("tokenstore") or []
    assert any(line.startswith(package) and f'extra == "{extra}"' in line.replace("'", '"') for line in requirements)


def test_entry_points_cannot_replace_a_built_in_scheme(keyring: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    """A built-in scheme has priority over an entry point; two packages with the same scheme are refused."""

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


def test_a_store_accepts_only_a_url_an_async_engine_a_backend_or_a_session(keyring: Keyring, tmp_path: Path) -> None:
    """``open_store`` accepts a URL, an AsyncEngine or a backend; the constructor accepts a session."""
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


def test_without_keys_no_store_is_opened(tmp_path: Path) -> None:
    """No file is created, and no key is generated silently."""
    with pytest.raises(ConfigurationError, match="TOKENSTORE_KEYS is not set; `tokenstore keygen`"):
        open_store(f"sqlite:///{tmp_path / 'x.db'}")
    assert list(tmp_path.iterdir()) == []


def test_the_error_for_an_unsupported_database_names_it_and_the_supported_ones(keyring: Keyring) -> None:
    """The test passes an engine of another database."""

    class Stranger:
        name = "oracle"

    engine = create_async_engine("sqlite+aiosqlite:///x.db")
    engine.sync_engine.dialect = Stranger()  # type: ignore[assignment]
    with pytest.raises(UnsupportedOperationError, match="no backend for oracle; there is one for mariadb, mysql"):
        open_store(engine, keyring=keyring)
