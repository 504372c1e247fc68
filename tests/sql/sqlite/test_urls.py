"""URLs of SQLite that are refused, with the reason."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tokenstore import ConfigurationError, Keyring, TokenStoreError, open_store


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite+aiosqlite://"])
def test_sqlite_in_memory_is_refused_with_the_reason(url: str, keyring: Keyring) -> None:
    """All tasks would share one connection and its transaction; the error says what to use instead."""
    with pytest.raises(ConfigurationError, match=r"memory"):
        open_store(url, keyring=keyring)


def test_sqlite_urls_that_cannot_be_a_file(keyring: Keyring) -> None:
    """URLs with a host, a schema or SQLite's own URI options are refused."""
    for url, error in (("sqlite://tokens.db", ConfigurationError), ("sqlite:///x.db?mode=ro", ConfigurationError)):
        with pytest.raises(error):
            open_store(url, keyring=keyring)
    with pytest.raises(ConfigurationError, match="no schemas"):
        open_store("sqlite:///x.db", schema="main", keyring=keyring)


@pytest.mark.sqlite
def test_a_missing_folder_or_a_file_that_is_no_database_is_a_clear_error(tmp_path: Path, keyring: Keyring) -> None:
    """Both raise an error of tokenstore."""
    (tmp_path / "text.db").write_text("no database " * 100)

    async def main() -> None:
        for path in (tmp_path / "missing" / "x.db", tmp_path / "text.db", tmp_path):
            async with open_store(f"sqlite:///{path}", keyring=keyring) as store:
                with pytest.raises(TokenStoreError):
                    await store.setup()

    asyncio.run(main())
