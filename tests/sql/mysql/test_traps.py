"""What bites a store on MySQL and MariaDB: collations, gap locks, time zones, session settings, ghosts."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any

import pytest
from sqlalchemy import event, make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from support.database import Place, app_engine, connection_of
from support.matrix import ROWS, Row, params
from support.polling import until
from tokenstore import (
    AuthTokenStore,
    BackendUnavailableError,
    Keyring,
    LockTimeoutError,
    open_store,
)
from tokenstore.records import TokenKey
from tokenstore_sql.connection import Connection
from tokenstore_sql.mysql import MySQLDialect

mysql_rows = pytest.mark.parametrize("row", params(names=[row.name for row in ROWS if row.mark == "mysql"]))

KEY = TokenKey("github", "u1")
BIG = 256 * 1024


@pytest.fixture
def place(row: Row, url: str) -> Place:
    return Place(row, url)


async def _store(store: Any, tag: str, user_id: str = "u1") -> None:
    await store.store_tokens("github", user_id, tag, None, datetime.now(UTC) + timedelta(hours=1))


async def _tag(store: Any, user_id: str = "u1", *, for_update: bool = False) -> str | None:
    record = await store.load_tokens("github", user_id, for_update)
    return None if record is None else str(record["access_token"])


async def _set_up(place: Place, keyring: Keyring) -> None:
    async with open_store(place.url, keyring=keyring) as store:
        await store.setup()
        await _store(store, "old")


async def _ask(connection: AsyncConnection | AsyncSession, query: str) -> Any:
    return (await connection.execute(text(query))).scalar_one()


def _on_connect(engine: AsyncEngine, *statements: str) -> None:
    @event.listens_for(engine.sync_engine, "connect")
    def prepare(dbapi_connection: Any, _record: object) -> None:
        cursor = dbapi_connection.cursor()
        for statement in statements:
            cursor.execute(statement)
        cursor.close()


@mysql_rows
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["SET sql_mode = ''"], id="lenient"),
        pytest.param(["SET NAMES latin1"], id="latin1"),
        pytest.param(["SET collation_connection = utf8mb4_general_ci"], id="general_ci"),
    ],
)
def test_keys_are_their_bytes_whatever_the_session_s_settings(
    place: Place, settings: list[str], keyring: Keyring
) -> None:
    """Case, accents, blanks and normal forms tell users apart; nothing is cut, folded or converted on the way."""
    users = ["alice", "Alice", "alice ", " alice", "\u00e9", "e\u0301", "e", "\u00df", "ss", "\U0001f600", "%", "a\\"]
    users.append("\u00e9" * 256)  # as long as a user's id may be

    async def main() -> None:
        await _set_up(place, keyring)
        async with app_engine(place) as engine, open_store(place.url, keyring=keyring) as other:
            _on_connect(engine, *settings)
            store = open_store(engine, keyring=keyring, **place.options)
            for number, user_id in enumerate(users):
                await _store(store, f"token {number}", user_id)
            for number, user_id in enumerate(users):
                assert await _tag(store, user_id) == f"token {number}"
                assert await _tag(other, user_id) == f"token {number}"
            listed = [entry["user_id"] async for entry in store.list_tokens(provider="github")]
            assert listed == sorted([*users, "u1"], key=str.encode)

    asyncio.run(main())


@mysql_rows
def test_two_first_inserts_under_the_lock_do_not_dead_lock(place: Place, keyring: Keyring) -> None:
    """Two transactions find nothing under the lock, for different new users, and both insert."""

    async def main() -> None:
        await _set_up(place, keyring)
        async with app_engine(place) as engine, open_store(place.url, keyring=keyring) as store:
            met = asyncio.Barrier(2)

            async def insert_in_transaction(user_id: str) -> None:
                async with store.transaction() as tx:
                    assert await _tag(tx, user_id, for_update=True) is None
                    await met.wait()
                    await _store(tx, "new", user_id)

            async def insert_in_session(user_id: str) -> None:
                async with AsyncSession(engine) as session:
                    borrowed = AuthTokenStore(session, keyring=keyring, **place.options)
                    assert await _tag(borrowed, user_id, for_update=True) is None
                    await met.wait()
                    await _store(borrowed, "new", user_id)

            for insert in (insert_in_transaction, insert_in_session):
                for _ in range(5):
                    users = token_hex(4), token_hex(4)
                    await asyncio.gather(*map(insert, users))
                    assert [await _tag(store, user_id) for user_id in users] == ["new", "new"]

    asyncio.run(main())


@mysql_rows
def test_a_lock_timeout_in_a_borrowed_transaction(place: Place, keyring: Keyring) -> None:
    """1205 undoes only its statement: the caller's transaction lives on with its settings; ours is rolled back."""

    async def main() -> None:
        await _set_up(place, keyring)
        async with app_engine(place, pool_size=1, max_overflow=0) as engine, AsyncSession(engine) as session:
            store = AuthTokenStore(session, keyring=keyring, lock_timeout=1, **place.options)
            await session.execute(text("SET SESSION innodb_lock_wait_timeout = 33"))
            await session.commit()
            async with place.held():
                with pytest.raises(LockTimeoutError) as caught:
                    await _tag(store, for_update=True)
                assert caught.value.code == "1205"
                assert not session.in_transaction()
                async with session.begin():
                    await _store(store, "callers", "u2")
                    with pytest.raises(LockTimeoutError):
                        await _store(store, "never")
                    assert await _ask(session, "SELECT @@innodb_lock_wait_timeout") == 33
                    assert await _tag(store, "u2") == "callers"
            await place.until_idle()
            assert [await _tag(store), await _tag(store, "u2")] == ["old", "callers"]
            assert await _ask(session, "SELECT @@innodb_lock_wait_timeout") == 33
            await session.rollback()

    asyncio.run(main())


@mysql_rows
@pytest.mark.parametrize("zone", ["-11:30", "+13:00", "SYSTEM"])
def test_the_session_s_time_zone_shifts_nothing(place: Place, zone: str, keyring: Keyring) -> None:
    """The store's clock is UTC in every session: rows and leases show the same times to all of them."""

    async def main() -> None:
        await _set_up(place, keyring)
        async with app_engine(place) as engine, open_store(place.url, keyring=keyring) as other:
            _on_connect(engine, f"SET time_zone = '{zone}'")
            store = open_store(engine, keyring=keyring, **place.options)
            await _store(store, "new")
            record = await other.load_tokens("github", "u1")
            assert record is not None
            assert abs(record["updated_at"] - datetime.now(UTC)) < timedelta(seconds=5)
            there: Any = store._backend
            here: Any = other._backend
            assert await there.claim_lease(KEY, generation=record["generation"], holder="h", duration=10)
            for backend in (here, there):
                assert 9 < (await backend.get([KEY]))[0].lease_expires_in <= 10

    asyncio.run(main())


@mysql_rows
def test_a_lease_runs_from_the_end_of_the_wait(place: Place, keyring: Keyring) -> None:
    """A claim that waited 0.6 s for the row's lock is granted in full from then on, not from its start."""

    async def main() -> None:
        await _set_up(place, keyring)
        async with open_store(place.url, keyring=keyring) as store:
            backend: Any = store._backend
            generation = (await backend.get([KEY]))[0].generation
            async with place.held():
                claim = asyncio.create_task(backend.claim_lease(KEY, generation=generation, holder="h", duration=10))
                await place.until_waiting()
                await asyncio.sleep(0.6)  # the time that must not be taken off the lease
            assert await claim
            assert 9.7 < (await backend.get([KEY]))[0].lease_expires_in <= 10

    asyncio.run(main())


@mysql_rows
def test_the_locking_read_decides_at_repeatable_read(place: Place, keyring: Keyring) -> None:
    """In a caller's transaction with a snapshot, the wait for the lock ends with the row as it now is."""

    async def main() -> None:
        await _set_up(place, keyring)
        async with (
            open_store(place.url, keyring=keyring) as other,
            app_engine(place, isolation_level="REPEATABLE READ") as engine,
            AsyncSession(engine) as session,
            session.begin(),
        ):
            _ = await session.connection()
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            assert await _tag(store) == "old"
            async with other.transaction() as tx:
                await _tag(tx, for_update=True)
                waiter = asyncio.create_task(_tag(store, for_update=True))
                await place.until_waiting()
                await _store(tx, "new")
            assert await waiter == "new"
            await _store(store, "newer")
        async with open_store(place.url, keyring=keyring) as other:
            assert await _tag(other) == "newer"

    asyncio.run(main())


@mysql_rows
def test_the_biggest_tokens(place: Place, keyring: Keyring) -> None:
    """Three fields of 256 KiB each go in and come out, on the store's own engine and on a session."""
    access, refresh, claim = (letter * BIG for letter in "arc")
    extra = {"id_token": claim[: BIG - 100]}

    async def main() -> None:
        await _set_up(place, keyring)
        async with (
            open_store(place.url, keyring=keyring) as store,
            app_engine(place) as engine,
            AsyncSession(engine) as session,
        ):
            for each in (store, AuthTokenStore(session, keyring=keyring, **place.options)):
                await each.store_tokens("github", "big", access, refresh, None, extra=extra)
                record = await each.load_tokens("github", "big")
                assert record is not None
                assert (record["access_token"], record["refresh_token"]) == (access, refresh)
                assert record["extra"] == extra
                await each.delete_tokens("github", "big")

    asyncio.run(main())


@mysql_rows
def test_a_read_only_server_is_left(place: Place, keyring: Keyring) -> None:
    """`read_only=1`, as on a replica: a write is unavailable, and its connection is not used again."""
    server, user, password = place.server(), f"app_{token_hex(4)}", token_hex(8)
    server.execute(f"CREATE USER {user} IDENTIFIED BY '{password}'")
    server.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE, CREATE, INDEX ON {server.database}.* TO {user}")
    url = make_url(place.url).set(username=user, password=password).render_as_string(hide_password=False)

    async def main() -> None:
        async with open_store(url, keyring=keyring, pool_size=1) as store:
            await store.setup()
            await _store(store, "old")
            first = await _thread_of(store)
            server.execute("SET GLOBAL read_only = 1")
            assert await _tag(store) == "old"
            with pytest.raises(BackendUnavailableError, match="accepts no writes") as caught:
                await _store(store, "new")
            assert caught.value.code == "1290"
            assert password not in str(caught.value)
            assert await _thread_of(store) != first
            with pytest.raises(BackendUnavailableError):  # noqa: PT012
                async with store.transaction() as tx:
                    await _tag(tx)
                    await _store(tx, "new")
            server.execute("SET GLOBAL read_only = 0")
            await _store(store, "new")
            assert await _tag(store) == "new"

    try:
        asyncio.run(main())
    finally:
        server.execute("SET GLOBAL read_only = 0")
        server.execute(f"DROP USER {user}")


async def _thread_of(store: AuthTokenStore) -> int:
    async with connection_of(store) as connection:
        return int((await connection.driver_connection()).thread_id())


# ---- Ghosts: what the server goes on with after the client has gone


@mysql_rows
def test_killing_a_ghost_needs_no_connection_of_the_pool(place: Place, keyring: Keyring) -> None:
    """With every connection waiting, cancelled tasks return at once, and their statements end at once."""

    async def main() -> None:
        await _set_up(place, keyring)
        async with open_store(place.url, keyring=keyring, pool_size=2) as store:
            await _store(store, "old", "u2")
            async with place.held(), place.held("u2"):
                waiters = [asyncio.create_task(_store(store, "ghost", user_id)) for user_id in ("u1", "u2")]
                await place.until_waiting(count=2)
                started = time.monotonic()
                for waiter in waiters:
                    waiter.cancel()
                await asyncio.wait(waiters)
                assert time.monotonic() - started < 0.5
                await until(lambda: place.waiting() == 0)
            assert [await _tag(store), await _tag(store, "u2")] == ["old", "old"]

    asyncio.run(main())


@mysql_rows
def test_only_the_thread_of_the_cancelled_statement_is_killed(place: Place, keyring: Keyring) -> None:
    """Other statements that wait for the same row go on waiting, and get it."""

    async def main() -> None:
        await _set_up(place, keyring)
        async with open_store(place.url, keyring=keyring) as one, open_store(place.url, keyring=keyring) as two:
            async with place.held():
                ghost = asyncio.create_task(_store(one, "ghost"))
                await place.until_waiting()
                alive = asyncio.create_task(_store(two, "alive"))
                await place.until_waiting(count=2)
                ghost.cancel()
                await until(lambda: place.waiting() == 1)
                await asyncio.wait([ghost])
                assert not alive.done()
            await alive
            assert await _tag(one) == "alive"

    asyncio.run(main())


@mysql_rows
def test_nothing_is_killed_where_the_thread_is_not_certain(
    place: Place, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a proxy, or with another server at the address, the statement is left to its own lock wait timeout."""
    from tokenstore_sql import mysql

    seen: list[Any] = []
    really = mysql._kill_thread

    async def elsewhere(connection: Connection, thread: Any) -> None:
        seen.append(thread)
        await really(connection, thread._replace(hostname="another-server"))
        seen.append("looked")

    monkeypatch.setattr(mysql, "_kill_thread", elsewhere)

    async def main() -> None:
        await _set_up(place, keyring)
        async with open_store(place.url, keyring=keyring, lock_timeout=1) as store:
            async with place.held():
                ghost = asyncio.create_task(_store(store, "ghost"))
                await place.until_waiting()
                ghost.cancel()
                await asyncio.wait([ghost])
                await until(lambda: seen[-1:] == ["looked"])
                assert place.waiting() == 1
                await until(lambda: place.waiting() == 0)
            assert await _tag(store) == "old"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (1020, "ConflictError"),
        (1213, "ConflictError"),
        (1205, "LockTimeoutError"),
        (1146, "TableMissingError"),
        (2006, "BackendUnavailableError"),
        (2013, "BackendUnavailableError"),
        (4031, "BackendUnavailableError"),
        (1290, "BackendUnavailableError"),
        (1792, "BackendUnavailableError"),
        (1836, "BackendUnavailableError"),
        (1045, "BackendUnavailableError"),
        (1040, "BackendUnavailableError"),
        (1142, "BackendError"),
        (1062, "BackendError"),
    ],
)
def test_errors_are_told_by_number(number: int, name: str) -> None:
    """Whatever class a driver wraps them in."""
    kind, code = MySQLDialect(1).classify(Exception(number, "words"))
    assert (kind.__name__, code) == (name, str(number))
