"""SQLite's files: permissions, locks, creation and durability."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
from sqlalchemy import text

from support.database import Place, connection_of
from support.tagged_tokens import load_tag, set_up, store_tag
from tokenstore import Keyring, LockTimeoutError, TableMissingError, open_store

pytestmark = pytest.mark.sqlite
ACCESS, REFRESH, SCOPE = (f"{name}-{token_hex(16)}" for name in ("access", "refresh", "scope"))


@pytest.mark.sqlite
def test_a_new_sqlite_file_is_private(tmp_path: Path, keyring: Keyring) -> None:
    """The file and its -wal and -shm have mode 0600 with the most permissive umask; an existing file keeps its mode."""
    old = os.umask(0)
    try:
        modes = asyncio.run(_modes(tmp_path / "new.db", keyring))
        (tmp_path / "shared.db").touch(0o640)
        kept = asyncio.run(_modes(tmp_path / "shared.db", keyring))
    finally:
        os.umask(old)
    assert modes == {"new.db": 0o600, "new.db-shm": 0o600, "new.db-wal": 0o600}
    assert set(kept.values()) == {0o640}


def test_a_file_that_a_link_leads_to_is_private(tmp_path: Path, keyring: Keyring) -> None:
    """Also through several links, of which one is relative; a link that leads to itself is an error."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "next").symlink_to("tokens.db")
    (tmp_path / "link.db").symlink_to(tmp_path / "data" / "next")
    (tmp_path / "loop.db").symlink_to("loop.db")
    old = os.umask(0)
    try:
        asyncio.run(_modes(tmp_path / "link.db", keyring))
        with pytest.raises(TableMissingError, match="check the path"):
            asyncio.run(_modes(tmp_path / "loop.db", keyring))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "data" / "tokens.db").stat().st_mode) == 0o600
    assert {file.name for file in tmp_path.rglob("*")} == {"data", "next", "tokens.db", "link.db", "loop.db"}


async def _modes(path: Path, keyring: Keyring) -> dict[str, int]:
    async with open_store(f"sqlite:///{path}", keyring=keyring) as store:
        await store.setup()
        await store.store_tokens("github", "u", ACCESS, None, None)
        # Only listed, not opened: closing the file would release SQLite's locks in this process.
        return {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.glob(f"{path.name}*")}


def _create(path: Path, barrier: Any) -> str | None:
    async def main() -> str | None:
        async with open_store(f"sqlite:///{path}", keyring=Keyring({"k1": bytes(range(32))})) as store:
            await store.setup()
            await store_tag(store, "new")
            return await load_tag(store)

    barrier.wait(20)
    return asyncio.run(main())


def test_eight_threads_can_create_the_file_at_once(tmp_path: Path) -> None:
    """Eight event loops in eight threads set up one new file, and all can use it; no other file is left."""
    for attempt in range(4):
        path, barrier = tmp_path / f"{attempt}.db", threading.Barrier(8)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _, p=path, b=barrier: _create(p, b), range(8)))
        assert found == ["new"] * 8
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {file.name.split("-")[0] for file in tmp_path.iterdir()} == {f"{n}.db" for n in range(4)}


def test_opening_more_stores_keeps_the_locks_of_the_first(place: Place, path: Path, keyring: Keyring) -> None:
    """Closing any descriptor of a database file releases the process's locks on it, so a store must not open it."""

    async def main() -> None:
        await set_up(place, keyring)
        async with open_store(place.url, keyring=keyring) as store, store.transaction() as tx:
            await load_tag(tx, for_update=True)
            for _ in range(3):
                async with open_store(place.url, keyring=keyring, lock_timeout=0.1) as other:
                    assert await load_tag(other) == "old"
                    with pytest.raises(LockTimeoutError):
                        await store_tag(other, "stolen")
            code = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN IMMEDIATE')"
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, str(path), stderr=asyncio.subprocess.PIPE
            )
            _, stderr = await process.communicate()
            assert b"database is locked" in stderr

    asyncio.run(main())


def test_a_store_s_connections_are_durable_and_in_wal_mode(place: Place, path: Path, keyring: Keyring) -> None:
    """The journal mode is stored in the file; each connection of the store syncs the file at each commit."""

    async def main() -> None:
        await set_up(place, keyring)
        async with open_store(place.url, keyring=keyring) as store, connection_of(store) as connection:
            found = [
                tuple((await connection.run(text(f"PRAGMA {name}"))).rows[0])
                for name in ("journal_mode", "synchronous")
            ]
        assert found == [("wal",), (2,)]

    asyncio.run(main())
