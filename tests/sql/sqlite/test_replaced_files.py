"""A database file that is moved, deleted or replaced while a store has it open."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from support.database import Place
from support.tagged_tokens import load_tag, opened, set_up, store_tag
from tokenstore import AuthTokenStore, BackendUnavailableError, Keyring, TokenRecord, open_store
from tokenstore_sql.sqlite.connections import SQLiteConnection
from tokenstore_sql.sqlite.database_file import DatabaseFile

pytestmark = pytest.mark.sqlite
ENDS = ("", "-wal", "-shm")


@asynccontextmanager
async def _open(place: Place, path: Path, keyring: Keyring) -> AsyncIterator[tuple[AuthTokenStore, Path]]:
    """A store whose row is "old" in a backup and "newer" in the file that the store has open."""
    await set_up(place, keyring)
    backup = path.with_name("backup.db")
    shutil.copy(path, backup)  # closed, the database is this one file
    async with open_store(place.url, keyring=keyring) as store:
        await store_tag(store, "newer")
        yield store, backup


def _move_away(path: Path) -> None:
    for end in ENDS:
        with suppress(FileNotFoundError):  # a database that no connection has open is one file
            Path(f"{path}{end}").rename(f"{path}.away{end}")


def _move_back(path: Path) -> None:
    assert not path.exists()
    for end in ENDS:
        Path(f"{path}.away{end}").rename(f"{path}{end}")


def _delete_log(path: Path, content: bytes) -> None:
    """Delete what is left of the old database, beside a new file that must still have this content."""
    assert path.read_bytes() == content
    for end in ENDS[1:]:
        Path(f"{path}{end}").unlink()


async def _seen_by_others(place: Place, keyring: Keyring) -> str | None:
    """What a store that is opened now finds at the path."""
    async with open_store(place.url, keyring=keyring) as other:
        return await load_tag(other)


def test_a_file_that_is_gone_is_told_and_nothing_is_acknowledged(place: Place, path: Path, keyring: Keyring) -> None:
    """Once it is back, the store goes on with it."""

    async def main() -> None:
        async with _open(place, path, keyring) as (store, _):
            _move_away(path)
            for call in (store_tag(store, "lost"), load_tag(store), store.delete_tokens("github", "u1")):
                with pytest.raises(BackendUnavailableError, match=f"{path} was moved or deleted") as caught:
                    await call
                assert caught.value.code == "SQLITE_READONLY_DBMOVED"
            _move_back(path)
            assert await load_tag(store) == "newer"
            await store_tag(store, "newest")
            assert await _seen_by_others(place, keyring) == "newest"

    asyncio.run(main())


def test_no_pop_is_acknowledged_in_a_file_that_is_gone(
    place: Place, path: Path, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file goes away after the connection was taken: a DELETE that returns rows is a write, too."""

    async def main() -> None:
        async with _open(place, path, keyring) as (store, _):
            await store.put_value("login", "state", "value")
            with monkeypatch.context() as patch:
                patch.setattr(SQLiteConnection, "is_alive", lambda *_: True)
                _move_away(path)
                with pytest.raises(BackendUnavailableError) as caught:
                    await store.pop_value("login", "state")
                assert caught.value.code == "SQLITE_READONLY_DBMOVED"

    asyncio.run(main())


def test_a_restored_backup_is_opened(place: Place, path: Path, keyring: Keyring) -> None:
    """Reads find the backup's rows, however often they come, and writes go into it."""

    async def main() -> None:
        async with _open(place, path, keyring) as (store, backup):
            assert await load_tag(store) == "newer"
            _move_away(path)
            backup.rename(path)
            assert [await load_tag(store) for _ in range(3)] == ["old"] * 3
            await store_tag(store, "newest")
            assert await _seen_by_others(place, keyring) == "newest"

    asyncio.run(main())


def test_a_first_write_after_the_restore_goes_into_the_new_file(place: Place, path: Path, keyring: Keyring) -> None:
    async def main() -> None:
        async with _open(place, path, keyring) as (store, backup):
            _move_away(path)
            backup.rename(path)
            await store_tag(store, "newest")
            assert await _seen_by_others(place, keyring) == "newest"

    asyncio.run(main())


def test_a_new_file_is_never_opened_beside_the_old_log(place: Place, path: Path, keyring: Keyring) -> None:
    """The log would replay commits of the old file over the new one."""

    async def main() -> None:
        async with _open(place, path, keyring) as (store, backup):
            content = backup.read_bytes()
            backup.replace(path)
            for call in (load_tag(store), store_tag(store, "lost"), store.setup()):
                with pytest.raises(BackendUnavailableError, match=r"delete tokens\.db-wal and tokens\.db-shm"):
                    await call
            _delete_log(path, content)
            assert await load_tag(store) == "old"
            await store_tag(store, "newest")
            assert await _seen_by_others(place, keyring) == "newest"
        with closing(sqlite3.connect(path)) as found:
            assert found.execute("PRAGMA integrity_check").fetchall() == [("ok",)]

    asyncio.run(main())


def test_a_transaction_over_the_restore_fails_as_a_whole(place: Place, path: Path, keyring: Keyring) -> None:
    """Whether the file is replaced before the write or before the commit, the block raises."""

    async def main() -> None:
        async with _open(place, path, keyring) as (store, backup):
            with pytest.raises(BackendUnavailableError, match="moved, deleted or replaced"):  # noqa: PT012
                async with store.transaction() as tx:
                    assert await load_tag(tx, for_update=True) == "newer"
                    _move_away(path)
                    shutil.copy(backup, path)
                    await store_tag(tx, "lost")
            _move_away(path)
            shutil.copy(backup, path)
            with pytest.raises(BackendUnavailableError, match="moved, deleted or replaced"):  # noqa: PT012
                async with store.transaction() as tx:
                    await store_tag(tx, "lost")
                    _move_away(path)
                    backup.rename(path)
            assert await _seen_by_others(place, keyring) == "old"
            await store_tag(store, "newest")
            assert await _seen_by_others(place, keyring) == "newest"

    asyncio.run(main())


def test_a_write_that_waits_during_the_restore_goes_into_the_new_file(
    place: Place, path: Path, keyring: Keyring
) -> None:
    """It has its connection already, and would be carried out in the old file when the lock there is free."""

    async def main() -> None:
        async with _open(place, path, keyring) as (store, backup):
            async with place.held():
                writing = asyncio.create_task(store_tag(store, "newest"))
                await place.until_waiting(store)
                _move_away(path)
                backup.rename(path)
            await writing
            assert await _seen_by_others(place, keyring) == "newest"

    asyncio.run(main())


def test_a_refresh_over_the_restore_keeps_the_new_tokens(place: Place, path: Path, keyring: Keyring) -> None:
    """The backup has the same generation of the row, without the lease: the new tokens are written into it."""

    async def main() -> None:
        expired = datetime.now(UTC) - timedelta(hours=1)
        async with opened(place, keyring) as store:
            await store.store_tokens("github", "u1", "expired", "ghr_1", expired)
        backup = path.with_name("backup.db")
        shutil.copy(path, backup)

        async def refresh(record: TokenRecord) -> dict[str, Any]:
            _move_away(path)
            backup.rename(path)
            return {"access_token": "fresh", "refresh_token": "ghr_2", "expires_in": 3600}

        async with open_store(place.url, keyring=keyring, refreshers={"github": refresh}) as store:
            record = await store.load_fresh_tokens("github", "u1")
            assert record is not None
            assert record["access_token"] == "fresh"
            assert await _seen_by_others(place, keyring) == "fresh"

    asyncio.run(main())


def test_the_log_shrinks_after_a_long_reader(place: Place, path: Path, keyring: Keyring) -> None:
    """While a reader keeps an old snapshot the log grows; afterwards it does not keep that size."""

    def log_size() -> int:
        return Path(f"{path}-wal").stat().st_size

    async def main() -> None:
        async with opened(place, keyring) as store:
            with closing(sqlite3.connect(path, isolation_level=None)) as reader:
                reader.execute("BEGIN")
                reader.execute("SELECT count(*) FROM oauth_tokens").fetchall()
                while log_size() < 12 * 1024 * 1024:
                    await store_tag(store, "x" * 250_000)
            for number in range(3):
                await store_tag(store, str(number))
            assert log_size() <= 8 * 1024 * 1024

    asyncio.run(main())


def test_a_log_that_vanishes_is_no_old_log(place: Place, path: Path, keyring: Keyring) -> None:
    """The last of the other processes deletes the log when it closes the database, at any moment of an opening."""

    async def main() -> None:
        await set_up(place, keyring)
        file = DatabaseFile(path)
        log = Path(f"{path}-wal")

        def come_and_go() -> None:
            for _ in range(3000):
                log.write_bytes(b"x")
                log.unlink()

        coming_and_going = asyncio.create_task(asyncio.to_thread(come_and_go))
        while not coming_and_going.done():
            file.before_opening()
            await asyncio.sleep(0)
        await coming_and_going

    asyncio.run(main())
