"""What bites a store on SQLite: who waits for the one writer, whose transaction it is, files, threads, versions."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from support.database import Place, app_engine, connection_of, source_of
from support.matrix import row_named
from support.polling import until
from tokenstore import (
    AuthTokenStore,
    BackendUnavailableError,
    ConflictError,
    Keyring,
    LockTimeoutError,
    UnsupportedOperationError,
    open_store,
)
from tokenstore_sql.pool import Source
from tokenstore_sql.sqlite import _open, require_version

pytestmark = pytest.mark.sqlite

HOUR = timedelta(hours=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.db"


@pytest.fixture
def place(path: Path) -> Place:
    return Place(row_named("sqlite"), f"sqlite:///{path}")


async def _store(store: Any, tag: str) -> None:
    await store.store_tokens("github", "u1", tag, None, datetime.now(UTC) + HOUR)


async def _tag(store: Any, *, for_update: bool = False) -> str | None:
    record = await store.load_tokens("github", "u1", for_update)
    return None if record is None else str(record["access_token"])


async def _set_up(place: Place, keyring: Keyring) -> None:
    async with open_store(place.url, keyring=keyring) as store:
        await store.setup()
        await _store(store, "old")


@asynccontextmanager
async def _stores(place: Place, keyring: Keyring, **engine: Any) -> AsyncIterator[list[AuthTokenStore]]:
    """One store by URL, one on an application's engine, one on its session; the table holds one row."""
    await _set_up(place, keyring)
    async with AsyncExitStack() as stack:
        borrowed = await stack.enter_async_context(app_engine(place, **engine))
        session = await stack.enter_async_context(AsyncSession(borrowed))
        yield [
            await stack.enter_async_context(open_store(place.url, keyring=keyring)),
            await stack.enter_async_context(open_store(borrowed, keyring=keyring)),
            AuthTokenStore(session, keyring=keyring),
        ]


# ---- The one writer


def test_reads_do_not_wait_for_the_writer(place: Place, keyring: Keyring) -> None:
    """While another process holds the write lock, with a change in it, a read shows the row as last committed."""

    async def main() -> None:
        async with _stores(place, keyring) as stores, place.held():
            for store in stores:
                started = time.monotonic()
                for _ in range(5):
                    assert await _tag(store) == "old"
                assert time.monotonic() - started < 0.5
                assert [entry["user_id"] async for entry in store.list_tokens()] == ["u1"]

    asyncio.run(main())


def test_a_cancelled_waiter_for_the_write_lock_is_free_at_once(place: Place, keyring: Keyring) -> None:
    """Not when SQLite's busy timeout ends, which is five seconds by default; nothing is left waiting."""

    async def main() -> None:
        async with _stores(place, keyring) as stores:
            sources = [source_of(store) for store in (stores[0], stores[1], stores[1])]  # the session's is the second
            async with place.held():
                for store, source in zip(stores, sources, strict=True):

                    def has_begun(source: Source = source) -> bool:
                        return source.in_use == 1

                    waiter = asyncio.create_task(_store(store, "ghost"))
                    await until(has_begun)
                    started = time.monotonic()
                    waiter.cancel()
                    await asyncio.wait([waiter])
                    assert waiter.cancelled()
                    assert time.monotonic() - started < 0.5
            for store in stores:
                assert await _tag(store) == "old"
                await _store(store, "old")
            await place.until_idle()

    asyncio.run(main())


@pytest.mark.parametrize("what", ["store", "load"])
def test_a_cancelled_call_leaves_no_statement_open_in_sqlite(place: Place, what: str, keyring: Keyring) -> None:
    """Wherever it is cancelled: an open statement would hold its locks until the garbage collector finds it."""

    async def main() -> None:
        async with _stores(place, keyring) as stores:
            for store in stores:

                async def call(store: AuthTokenStore = store) -> None:
                    await (_store(store, "new") if what == "store" else _tag(store))

                started = time.perf_counter()
                await call()
                took = time.perf_counter() - started
                for point in range(15):
                    task = asyncio.create_task(call())
                    await asyncio.sleep(took * point / 12)
                    task.cancel()
                    await asyncio.wait([task])
                    await until(lambda: place.open_transactions() == 0)

    asyncio.run(main())


def test_a_changed_snapshot_is_a_conflict(place: Place, keyring: Keyring) -> None:
    """In a caller's deferred transaction that read before somebody wrote: a ConflictError, at once."""

    async def main() -> None:
        await _set_up(place, keyring)
        async with (
            open_store(place.url, keyring=keyring) as other,
            app_engine(place) as engine,
            AsyncSession(engine) as session,
        ):
            store = AuthTokenStore(session, keyring=keyring)
            await session.execute(text("BEGIN"))
            assert await _tag(store) == "old"
            await _store(other, "new")
            started = time.monotonic()
            with pytest.raises(ConflictError, match="repeat this one from its start"):
                await _tag(store, for_update=True)
            assert time.monotonic() - started < 1
            await session.rollback()
            assert await _tag(store, for_update=True) == "new"
            await session.rollback()

    asyncio.run(main())


# ---- Other people's engines


def _with_begin_event(place: Place) -> AsyncEngine:
    """The recipe of SQLAlchemy's documentation: the driver never begins, a hook does."""
    engine = create_async_engine(place.engine_url)

    @event.listens_for(engine.sync_engine, "connect")
    def take_over(dbapi_connection: Any, _record: object) -> None:
        dbapi_connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


def _never_autocommitting(place: Place) -> AsyncEngine:
    """The driver's mode of Python 3.12, in which a transaction is always open."""
    return create_async_engine(place.engine_url, connect_args={"autocommit": False})


def _with_driver_autocommit(place: Place) -> AsyncEngine:
    return create_async_engine(place.engine_url, connect_args={"isolation_level": None})


ENGINES = [_with_begin_event, _with_driver_autocommit]
if sys.version_info >= (3, 12):
    ENGINES.append(_never_autocommitting)


@pytest.mark.parametrize("make", ENGINES)
def test_engines_that_begin_in_their_own_way(place: Place, make: Any, keyring: Keyring) -> None:
    """Locks hold and writes are committed, on the engine and on its sessions, whoever begins the transaction."""

    async def refresh(store: Any) -> None:
        count = int(await _tag(store, for_update=True) or 0)
        await asyncio.sleep(0)
        await _store(store, str(count + 1))

    async def in_transaction(store: AuthTokenStore) -> None:
        async with store.transaction() as tx:
            await refresh(tx)

    async def in_session(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            await refresh(AuthTokenStore(session, keyring=keyring))

    async def in_callers(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session, session.begin():
            await refresh(AuthTokenStore(session, keyring=keyring))

    async def main() -> None:
        await _set_up(place, keyring)
        engine = make(place)
        try:
            async with open_store(place.url, keyring=keyring) as other, open_store(engine, keyring=keyring) as store:
                await store.setup()
                await _store(store, "0")
                await asyncio.gather(
                    *(in_transaction(store) for _ in range(3)),
                    *(in_session(engine) for _ in range(3)),
                    *(in_callers(engine) for _ in range(3)),
                )
                assert await _tag(other) == "9"
                assert await _tag(store) == "9"
                assert await store.delete_tokens("github", "u1")
                assert await _tag(other) is None
            await place.until_idle()
            assert engine.sync_engine.pool.checkedout() == 0
        finally:
            await engine.dispose()

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
@pytest.mark.parametrize(
    "url",
    ["sqlite+aiosqlite://", "sqlite+aiosqlite:///:memory:", "sqlite+aiosqlite:///file:x?mode=memory&uri=true"],
)
def test_memory_is_refused_on_engines_and_sessions(url: str, keyring: Keyring) -> None:
    """One connection for all tasks cannot serve: the error says so, and what to use instead."""
    engine = create_async_engine(url)
    with pytest.raises(UnsupportedOperationError, match=r"one task's rollback .* memory://"):
        open_store(engine, keyring=keyring)
    with pytest.raises(UnsupportedOperationError, match=r"one task's rollback .* memory://"):
        AuthTokenStore(AsyncSession(engine), keyring=keyring)


def test_a_read_only_database_is_unavailable_for_writes(place: Place, keyring: Keyring) -> None:
    """Reads go on; a write says that the database accepts none."""

    async def main() -> None:
        await _set_up(place, keyring)
        async with app_engine(place) as engine:

            @event.listens_for(engine.sync_engine, "connect")
            def no_writes(dbapi_connection: Any, _record: object) -> None:
                dbapi_connection.execute("PRAGMA query_only = 1").close()

            async with open_store(engine, keyring=keyring) as store:
                assert await _tag(store) == "old"
                with pytest.raises(BackendUnavailableError, match="accepts no writes") as caught:
                    await _store(store, "new")
                assert caught.value.code == "SQLITE_READONLY"

    asyncio.run(main())


# ---- Files


def _create(path: Path, barrier: Any) -> str | None:
    async def main() -> str | None:
        async with open_store(f"sqlite:///{path}", keyring=Keyring({"k1": bytes(range(32))})) as store:
            await store.setup()
            await _store(store, "new")
            return await _tag(store)

    barrier.wait(20)
    return asyncio.run(main())


def test_threads_that_create_the_file_at_once(tmp_path: Path) -> None:
    """Eight event loops in as many threads set up one new file, and all of them use it; nothing else is left."""
    for attempt in range(4):
        path, barrier = tmp_path / f"{attempt}.db", threading.Barrier(8)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _, p=path, b=barrier: _create(p, b), range(8)))
        assert found == ["new"] * 8
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {file.name.split("-")[0] for file in tmp_path.iterdir()} == {f"{n}.db" for n in range(4)}


def test_opening_more_stores_keeps_the_locks_of_the_first(place: Place, path: Path, keyring: Keyring) -> None:
    """Closing any descriptor of a database file drops the process's locks on it: nothing of ours opens it by hand."""

    async def main() -> None:
        await _set_up(place, keyring)
        async with open_store(place.url, keyring=keyring) as store, store.transaction() as tx:
            await _tag(tx, for_update=True)
            for _ in range(3):
                async with open_store(place.url, keyring=keyring, lock_timeout=0.1) as other:
                    assert await _tag(other) == "old"
                    with pytest.raises(LockTimeoutError):
                        await _store(other, "stolen")
            code = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN IMMEDIATE')"
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, str(path), stderr=asyncio.subprocess.PIPE
            )
            _, stderr = await process.communicate()
            assert b"database is locked" in stderr

    asyncio.run(main())


def test_a_store_s_connections_are_durable_and_in_wal_mode(place: Place, path: Path, keyring: Keyring) -> None:
    """A file keeps its journal mode; every connection of ours waits for the disk at each commit."""

    async def main() -> None:
        await _set_up(place, keyring)
        async with open_store(place.url, keyring=keyring) as store, connection_of(store) as connection:
            found = [
                tuple((await connection.run(text(f"PRAGMA {name}"))).rows[0])
                for name in ("journal_mode", "synchronous")
            ]
        assert found == [("wal",), (2,)]

    asyncio.run(main())


# ---- The library


@pytest.mark.parametrize("version", [(3, 6, 0), (3, 24, 0), (3, 35, 5), (3, 36, 0)])
def test_old_sqlite_is_refused(version: tuple[int, int, int]) -> None:
    """Before STRICT tables there is no store; the message names both versions."""
    with pytest.raises(UnsupportedOperationError, match=rf"SQLite {'.'.join(map(str, version))}; 3\.37\.0 or later"):
        require_version(version)


def test_recent_sqlite_is_accepted() -> None:
    """The oldest that works, and the one of this Python."""
    require_version((3, 37, 0))
    require_version(sqlite3.sqlite_version_info)


def test_the_table_is_strict(place: Place, path: Path, keyring: Keyring) -> None:
    """A value of another type is refused by the database, not converted."""
    asyncio.run(_set_up(place, keyring))
    connection = sqlite3.connect(path)
    try:
        for column, value in (("access_token", "text"), ("generation", "one"), ("access_token_expires_at", b"1")):
            with pytest.raises(sqlite3.IntegrityError, match="cannot store"):
                connection.execute(f"UPDATE oauth_tokens SET {column} = ?", (value,))
    finally:
        connection.close()


def test_a_closed_connection_holds_no_lock(path: Path) -> None:
    """Not even one whose cursor still has rows to give, as a cancelled task leaves it behind."""

    async def main() -> None:
        connection = await _open(path, 1.0)
        await connection.execute("BEGIN IMMEDIATE")
        unread = await connection.execute("SELECT 1 UNION SELECT 2")
        await connection.close()
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
        del unread

    asyncio.run(main())
