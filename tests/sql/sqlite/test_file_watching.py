"""On SQLite, waiting for another holder's lease watches the database's files."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

import tokenstore_sql.sqlite.watching
from support.database import Place, app_engine
from support.matrix import Row, sqlite_row
from support.sent_statements import sent_statements
from support.watched_backend import KEY, opened_backend, watched_for
from tokenstore.registry import backend_for_url
from tokenstore.testing.conformance import sealed

# Seconds, long enough for a busy machine; waits that must not end by themselves are longer.
_IN_TIME, _NEVER = 20.0, 600.0


@sqlite_row
def test_another_connection_s_commit_ends_the_wait(row: Row, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The waiting store sends no statement."""
    monkeypatch.setattr(tokenstore_sql.sqlite.watching, "_LONGEST_WATCH", _NEVER)

    async def main() -> None:
        async with opened_backend(url) as backend, opened_backend(url) as other:
            await backend.get(KEY)
            for _ in range(5):
                await asyncio.sleep(0.15)  # so that no file was changed just before
                with sent_statements() as sent:
                    watching = asyncio.create_task(watched_for(backend))
                    await asyncio.sleep(0.03)
                    assert not watching.done()
                assert sent == []
                await other.put(KEY, sealed("b"))
                with sent_statements() as sent:
                    await asyncio.wait_for(watching, _IN_TIME)
                assert sent == []

    asyncio.run(main())


@sqlite_row
def test_the_wait_ends_after_a_quarter_of_a_second_without_a_change(row: Row, url: str) -> None:
    """Of two commits within the resolution of the file's time stamp, the second one may not be noticed."""

    async def main() -> None:
        async with opened_backend(url) as backend:
            await asyncio.sleep(0.15)
            assert await asyncio.wait_for(watched_for(backend), _IN_TIME) > 0.19

    asyncio.run(main())


@sqlite_row
def test_a_commit_between_the_read_and_the_wait_is_noticed(row: Row, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit just before the first check of the files may have come after the caller's read."""
    monkeypatch.setattr(tokenstore_sql.sqlite.watching, "_LONGEST_WATCH", _NEVER)
    monkeypatch.setattr(tokenstore_sql.sqlite.watching, "_RECENT", _IN_TIME)

    async def main() -> None:
        async with opened_backend(url) as backend, opened_backend(url) as other:
            await other.put(KEY, sealed("b"))
            await asyncio.wait_for(watched_for(backend), _IN_TIME)

    asyncio.run(main())


@sqlite_row
def test_a_commit_in_another_journal_mode_is_noticed(
    row: Row, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application's engine may not use WAL mode. Without a file, the wait only ends by its timeout."""
    monkeypatch.setattr(tokenstore_sql.sqlite.watching, "_LONGEST_WATCH", _NEVER)

    async def main() -> None:
        path = tmp_path / "app.db"
        place = Place(row, f"sqlite:///{path}")
        async with app_engine(place) as engine:
            dialect = backend_for_url(place.url, {}).dialect  # type: ignore[attr-defined]
            writer = sqlite3.connect(path)
            writer.execute("CREATE TABLE t (x)")
            writer.commit()
            await asyncio.sleep(0.15)

            watching = asyncio.create_task(dialect.watch(engine.url, None))
            await asyncio.sleep(0.02)
            writer.execute("INSERT INTO t VALUES (1)")
            writer.commit()
            await asyncio.wait_for(watching, _IN_TIME)
            writer.close()
            await asyncio.wait_for(
                dialect.watch(engine.url.set(database="file:app.db?mode=ro&uri=true"), None), _IN_TIME
            )

    asyncio.run(main())
