"""The versions of SQLite that are supported, and the strict table."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from support.database import Place
from support.tagged_tokens import set_up
from tokenstore import Keyring, UnsupportedOperationError
from tokenstore_sql.sqlite.files import require_version

pytestmark = pytest.mark.sqlite


@pytest.mark.parametrize("version", [(3, 6, 0), (3, 24, 0), (3, 35, 5), (3, 36, 0)])
def test_old_sqlite_is_refused(version: tuple[int, int, int]) -> None:
    """The store needs STRICT tables; the message names the version found and the version needed."""
    with pytest.raises(UnsupportedOperationError, match=rf"SQLite {'.'.join(map(str, version))}; 3\.37\.0 or later"):
        require_version(version)


def test_recent_sqlite_is_accepted() -> None:
    """The oldest supported version, and the version of this Python."""
    require_version((3, 37, 0))
    require_version(sqlite3.sqlite_version_info)


def test_the_table_is_strict(place: Place, path: Path, keyring: Keyring) -> None:
    """The database refuses a value of another type and does not convert it."""
    asyncio.run(set_up(place, keyring))
    connection = sqlite3.connect(path)
    try:
        for column, value in (("access_token", "text"), ("generation", "one"), ("access_token_expires_at", b"1")):
            with pytest.raises(sqlite3.IntegrityError, match="cannot store"):
                connection.execute(f"UPDATE oauth_tokens SET {column} = ?", (value,))
    finally:
        connection.close()
