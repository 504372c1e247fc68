"""SQLite watches its files for the end of somebody else's lease."""

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

# Long enough for whatever else the machine does; a wait that nothing ends is made longer.
_IN_TIME, _NEVER = 20.0, 600.0


@sqlite_row
def test_sqlite_watches_the_files(row: Row, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another connection's commit ends the wait, without a statement of the waiter's."""
    monkeypatch.setattr(tokenstore_sql.sqlite.watching, "_LONGEST_WATCH", _NEVER)

    async def main() -> None:
        async with opened_backend(url) as backend, opened_backend(url) as other:
            await backend.get(KEY)
            for _ in range(5):
                await asyncio.sleep(0.15)  # so that nothing is fresh
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
def test_sqlite_ends_a_wait_without_a_change(row: Row, url: str) -> None:
    """After a quarter of a second: of two commits in one tick of the clock one may not show."""

    async def main() -> None:
        async with opened_backend(url) as backend:
            await asyncio.sleep(0.15)
            assert await asyncio.wait_for(watched_for(backend), _IN_TIME) > 0.19

    asyncio.run(main())


@sqlite_row
def test_sqlite_misses_no_commit_around_the_read(row: Row, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written just before the first look at the files may not have been there to read."""
    monkeypatch.setattr(tokenstore_sql.sqlite.watching, "_LONGEST_WATCH", _NEVER)
    monkeypatch.setattr(tokenstore_sql.sqlite.watching, "_RECENT", _IN_TIME)

    async def main() -> None:
        async with opened_backend(url) as backend, opened_backend(url) as other:
            await other.put(KEY, sealed("b"))
            await asyncio.wait_for(watched_for(backend), _IN_TIME)

    asyncio.run(main())


@sqlite_row
def test_sqlite_watches_a_file_in_another_journal_mode(
    row: Row, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application's engine need not be in WAL mode; and what is no file is waited for blindly."""
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
