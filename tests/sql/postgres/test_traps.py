"""What bites a store on PostgreSQL: poolers, cached statements, settings that leak, encodings, TLS, clocks."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any

import pytest
from sqlalchemy import func, make_url, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from support import servers
from support.database import Place, app_engine, connection_of
from support.matrix import Row, params
from tokenstore import (
    AuthTokenStore,
    BackendUnavailableError,
    ConfigurationError,
    Keyring,
    LockTimeoutError,
    UnsupportedOperationError,
    open_store,
)
from tokenstore.records import TokenKey
from tokenstore_sql.postgres import PostgresDialect

both_drivers = pytest.mark.parametrize("row", params(names=["postgresql+asyncpg", "postgresql+psycopg"]))

KEY = TokenKey("github", "u1")


@pytest.fixture
def place(row: Row, url: str) -> Place:
    return Place(row, url)


async def _store(store: Any, tag: str, user_id: str = "u1") -> None:
    await store.store_tokens("github", user_id, tag, None, datetime.now(UTC) + timedelta(hours=1))


async def _tag(store: Any, user_id: str = "u1", *, for_update: bool = False) -> str | None:
    record = await store.load_tokens("github", user_id, for_update)
    return None if record is None else str(record["access_token"])


_THROUGH_THE_POOLER = """
import asyncio, json, sys
from tokenstore import ConflictError, Keyring, open_store
async def main(url, name):
    failures, done = [], 0
    async with open_store(url, keyring=Keyring({"k1": bytes(range(32))}), pool_size=4) as store:
        await store.setup()
        async def work(task):
            nonlocal done
            for turn in range(6):
                user = f"u{(task + turn) % 5}"
                try:
                    await store.store_tokens("github", user, name, None, None)
                    await store.load_tokens("github", user)
                    async with store.transaction() as tx:
                        await tx.load_tokens("github", user, for_update=True)
                        await tx.store_tokens("github", user, name, None, None)
                    done += 3
                except Exception as error:
                    failures.append(repr(error))
        await asyncio.gather(*(work(task) for task in range(4)))
    print(json.dumps([done, failures]))
asyncio.run(main(*sys.argv[1:]))
"""


@both_drivers
def test_a_pooler_in_transaction_mode(row: Row) -> None:
    """Three processes through pgbouncer with `prepared_statements=false`: not one call fails."""
    driver = row.name.partition("+")[2]
    url = f"{servers.pgbouncer().url(driver)}?prepared_statements=false&table=t_{token_hex(8)}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _THROUGH_THE_POOLER, url, f"p{number}"], stdout=subprocess.PIPE, text=True
        )
        for number in range(3)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in running]
    assert [json.loads(output) for output in outputs] == [[4 * 6 * 3, []]] * 3


@both_drivers
def test_another_process_s_ddl_between_two_calls(place: Place, keyring: Keyring) -> None:
    """A new column voids the plans that pooled connections have cached: the next calls work all the same."""

    async def main() -> None:
        async with open_store(place.url, keyring=keyring, pool_size=2) as store:
            await store.setup()
            for change in ("ADD COLUMN more text", "ALTER COLUMN more TYPE varchar(9)", "DROP COLUMN more"):
                for _ in range(8):  # psycopg prepares at the fifth time
                    await _store(store, "old")
                    assert await _tag(store) == "old"
                await asyncio.to_thread(place.server().execute, f"ALTER TABLE {place.table} {change}")
                assert await _tag(store) == "old"
                async with store.transaction() as tx:
                    assert await _tag(tx, for_update=True) == "old"
                    await _store(tx, "new")
                await _store(store, "newer")
                assert await _tag(store) == "newer"

    asyncio.run(main())


@both_drivers
def test_the_lock_timeout_is_the_transaction_s_alone(place: Place, keyring: Keyring) -> None:
    """An application's own lock_timeout holds before and after a store's call in its transaction, and elsewhere."""

    async def main() -> None:
        async with open_store(place.url, keyring=keyring) as store:
            await store.setup()
            await _store(store, "old")
        async with app_engine(place, pool_size=1, max_overflow=0) as engine:

            async def shown(session: AsyncSession) -> str:
                return str((await session.execute(text("SHOW lock_timeout"))).scalar_one())

            async with AsyncSession(engine) as session, session.begin():
                await session.execute(text("SET LOCAL lock_timeout = '4321ms'"))
                borrowed = AuthTokenStore(session, keyring=keyring, lock_timeout=0.3, **place.options)
                assert await _tag(borrowed, for_update=True) == "old"
                assert await shown(session) == "4321ms"
                await _store(borrowed, "new")
                assert await shown(session) == "4321ms"
                async with _locked(place, keyring):
                    with pytest.raises(LockTimeoutError):
                        async with session.begin_nested():
                            await _tag(borrowed, "u2", for_update=True)
                assert await shown(session) == "4321ms"
            async with AsyncSession(engine) as session:
                assert await shown(session) == "0"
                await session.rollback()
                borrowed = AuthTokenStore(session, keyring=keyring, **place.options)
                await _tag(borrowed, for_update=True)
                await _store(borrowed, "newer")
                assert await shown(session) == "0"
        async with open_store(place.url, keyring=keyring, pool_size=1) as store:
            async with store.transaction() as tx:
                await _tag(tx, for_update=True)
            async with connection_of(store) as connection:
                (found,), _ = await connection.run(select(func.current_setting("lock_timeout")))
                assert tuple(found) == ("0",)

    asyncio.run(main())


@asynccontextmanager
async def _locked(place: Place, keyring: Keyring) -> AsyncIterator[None]:
    """Another store's transaction has locked the row of `u2`."""
    async with open_store(place.url, keyring=keyring) as store:
        await _store(store, "other", "u2")
        async with store.transaction() as tx:
            await _tag(tx, "u2", for_update=True)
            yield


@both_drivers
def test_a_database_that_is_not_utf8_is_refused(place: Place, keyring: Keyring) -> None:
    """LATIN1 could not hold every user's id: `setup` says so, and creates nothing."""
    name = f"latin1_{token_hex(4)}"
    server = place.server()
    server.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    try:
        url = make_url(place.engine_url).set(database=name).render_as_string(hide_password=False)

        async def main() -> None:
            async with open_store(url, keyring=keyring) as store:
                with pytest.raises(UnsupportedOperationError, match=r"encoding is LATIN1; create one with ENCODING"):
                    await store.setup()

        asyncio.run(main())
        assert server.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", name) == [(0,)]
    finally:
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@both_drivers
def test_libpq_s_options_reach_the_driver(place: Place, keyring: Keyring) -> None:
    """`sslmode=require` on a server without TLS fails instead of going on in the clear; `application_name` shows."""

    async def main() -> None:
        async with open_store(place.url, keyring=keyring, sslmode="require") as store:
            with pytest.raises(BackendUnavailableError, match=r"(?i)SSL") as caught:
                await store.setup()
            assert str(make_url(place.engine_url).password) not in str(caught.value)
        async with open_store(place.url, keyring=keyring, sslmode="disable", application_name="shown-here") as store:
            await store.setup()
            await _tag(store)
            query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shown-here'"
            assert await asyncio.to_thread(place.server().execute, query) == [(1,)]
        url = make_url(place.engine_url).set(host="192.0.2.1").render_as_string(hide_password=False)
        async with open_store(url, keyring=keyring, connect_timeout=1) as store:
            started = time.monotonic()
            with pytest.raises(BackendUnavailableError):
                await _tag(store)
            assert time.monotonic() - started < 5

    asyncio.run(main())


@both_drivers
def test_a_certificate_that_cannot_be_read_is_a_configuration_error(place: Place, keyring: Keyring) -> None:
    """What the driver refuses before it connects is one of our errors, too."""

    async def main() -> None:
        async with open_store(
            place.url, keyring=keyring, sslmode="verify-full", sslrootcert="/nonexistent/root.crt"
        ) as store:
            with pytest.raises((ConfigurationError, BackendUnavailableError), match=r"root\.crt|SSL|file"):
                await store.setup()

    asyncio.run(main())


@both_drivers
def test_a_transaction_that_the_server_ends_for_idling(place: Place, keyring: Keyring) -> None:
    """`idle_in_transaction_session_timeout` over a slow HTTP call: BackendUnavailableError, nothing half-written."""

    async def main() -> None:
        async with open_store(place.url, keyring=keyring) as store:
            await store.setup()
            await _store(store, "old")
        async with app_engine(place) as engine, AsyncSession(engine) as session:
            await session.execute(text("SET idle_in_transaction_session_timeout = '500ms'"))
            await session.commit()
            borrowed = AuthTokenStore(session, keyring=keyring, **place.options)
            await _tag(borrowed, for_update=True)
            await place.until_idle()
            with pytest.raises(BackendUnavailableError, match="provider 'github', user 'u1'"):
                await _store(borrowed, "new")
            assert await _tag(borrowed) == "old"
            await _store(borrowed, "new")
            assert await _tag(borrowed) == "new"

    asyncio.run(main())


@both_drivers
def test_a_lease_runs_from_the_end_of_the_wait(place: Place, keyring: Keyring) -> None:
    """A claim that waited 0.6 s for the row's lock is granted in full from then on, not from its start."""

    async def main() -> None:
        async with open_store(place.url, keyring=keyring) as store:
            await store.setup()
            await _store(store, "old")
            backend: Any = store._backend
            generation = (await backend.get([KEY]))[0].generation
            async with place.held():
                claim = asyncio.create_task(backend.claim_lease(KEY, generation=generation, holder="h", duration=10))
                await place.until_waiting()
                await asyncio.sleep(0.6)  # the time that must not be taken off the lease
            assert await claim
            assert 9.7 < (await backend.get([KEY]))[0].lease_expires_in <= 10

    asyncio.run(main())


@both_drivers
def test_a_server_that_became_read_only_is_left(place: Place, keyring: Keyring) -> None:
    """A write is refused as unavailable, and its connection is not used again: later ones may reach a new primary."""
    server = place.server()

    async def read_only(value: str) -> None:
        async with app_engine(place, isolation_level="AUTOCOMMIT") as engine, engine.connect() as connection:
            await connection.execute(text("SET default_transaction_read_only = off"))
            await connection.execute(
                text(f'ALTER DATABASE "{server.database}" SET default_transaction_read_only = {value}')
            )

    async def main() -> None:
        async with open_store(place.url, keyring=keyring, pool_size=1) as store:
            await store.setup()
            await _store(store, "old")
        await read_only("on")
        try:
            async with open_store(place.url, keyring=keyring, pool_size=1) as store:
                assert await _tag(store) == "old"
                with pytest.raises(BackendUnavailableError, match="accepts no writes") as caught:
                    await _store(store, "new")
                assert caught.value.code == "25006"
                with pytest.raises(BackendUnavailableError):
                    async with store.transaction() as tx:
                        await _tag(tx, for_update=True)
                await read_only("off")
                await _store(store, "new")
                assert await _tag(store) == "new"
        finally:
            await read_only("off")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("40001", "ConflictError"),
        ("40P01", "ConflictError"),
        ("55P03", "LockTimeoutError"),
        ("57014", "LockTimeoutError"),
        ("57P01", "BackendUnavailableError"),
        ("25006", "BackendUnavailableError"),
        ("25P03", "BackendUnavailableError"),
        ("08006", "BackendUnavailableError"),
        ("53300", "BackendUnavailableError"),
        ("42P01", "TableMissingError"),
        ("42501", "BackendError"),
        ("23505", "BackendError"),
    ],
)
def test_errors_are_told_by_sqlstate(code: str, name: str) -> None:
    """Whatever class a driver wraps them in."""

    class Anything(Exception):
        sqlstate = code

    kind, found = PostgresDialect(1).classify(Anything())
    assert (kind.__name__, found) == (name, code)
