"""No statement of a store calls operators or functions that another user planted in a schema of the search_path."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from support import servers
from support.matrix import Row, params
from support.polling import until
from tokenstore import AuthTokenStore, Keyring, LockTimeoutError, open_store

both_drivers = pytest.mark.parametrize("row", params(names=["postgresql+asyncpg", "postgresql+psycopg"]))
either_source = pytest.mark.parametrize("source", ["url", "engine"])

_USERS = [f"u{number}" for number in range(12)]

# Each planted function records its call and returns NULL. A sequence also counts calls whose transaction was rolled
# back.
_PLANTED = r"""
CREATE SCHEMA planted;
CREATE TABLE planted.called (what text);
CREATE SEQUENCE planted.calls;
CREATE FUNCTION planted.called(what text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS
$$ BEGIN PERFORM nextval('planted.calls'); INSERT INTO planted.called VALUES (what); END $$;
GRANT USAGE ON SCHEMA planted TO PUBLIC;
DO $do$
DECLARE
    operator text; l text; r text; result text; n int := 0;
    types text[] :=
        '{text,varchar,bpchar,name,bigint,int,smallint,float8,float4,numeric,bytea,timestamptz,interval,text[]}';
    signature text;
BEGIN
    FOREACH operator IN ARRAY '{=,<>,<,<=,>,>=,+,-,*,||}'::text[] LOOP
        FOREACH l IN ARRAY types LOOP
            FOREACH r IN ARRAY types LOOP
                n := n + 1;
                result := CASE WHEN operator IN ('+', '-', '*', '||') THEN r ELSE 'boolean' END;
                EXECUTE format(
                    'CREATE FUNCTION planted.f%s(l %s, r %s) RETURNS %s LANGUAGE plpgsql AS '
                    '$$ BEGIN PERFORM planted.called(%L); RETURN NULL; END $$',
                    n, l, r, result, format('%s %s %s', l, operator, r));
                EXECUTE format('CREATE OPERATOR public.%s (FUNCTION = planted.f%s, LEFTARG = %s, RIGHTARG = %s)',
                    operator, n, l, r);
            END LOOP;
        END LOOP;
    END LOOP;
    FOREACH signature IN ARRAY ARRAY[
        'clock_timestamp() timestamptz', 'clock_timestamp(int DEFAULT 0) timestamptz', 'now() timestamptz',
        'date_part(text, timestamptz) float8', 'date_part(varchar, timestamptz) float8',
        'date_part(name, timestamptz) float8', 'date_part(bpchar, timestamptz) float8',
        'date_part(varchar, interval) float8', 'date_part(text, interval) float8',
        'unnest(text[]) SETOF text', 'unnest(varchar[]) SETOF varchar', 'unnest(bytea[]) SETOF bytea',
        'unnest(bigint[]) SETOF bigint', 'unnest(text[], text[]) SETOF record',
        'unnest(text[], text[], bytea[], bytea[], bytea[], bigint[], bigint[], text[], bigint[]) SETOF record',
        'set_config(text, text, boolean) text', 'set_config(varchar, varchar, boolean) text',
        'current_setting(text) text', 'current_setting(varchar) text', 'current_setting(name) text',
        'current_database() name', 'count() bigint', 'count(int) bigint', 'pg_terminate_backend(int) boolean',
        'pg_terminate_backend(bigint) boolean', 'pg_advisory_xact_lock(int) void', 'pg_advisory_xact_lock(bigint) void'
    ] LOOP
        EXECUTE format(
            'CREATE FUNCTION public.%s RETURNS %s LANGUAGE plpgsql AS $$ BEGIN PERFORM planted.called(%L); %s; END $$',
            substring(signature from '^.*\)'), substring(signature from '\) (.*)$'), signature,
            CASE WHEN signature ~ 'SETOF|void' THEN 'RETURN' ELSE 'RETURN NULL' END);
    END LOOP;
END $do$;
"""


class _DatabaseWithPlantedFunctions:
    """A database with a store's table, and with functions and operators that another user planted.

    Attributes:
        url: The database's URL, as its owner.
    """

    def __init__(self, server: servers.Server, driver: str, name: str) -> None:
        self.url = server.url(driver, name)
        self._server = server
        self._name = name

    def create(self) -> None:
        server, name = self._server, self._name
        server.execute(f"CREATE DATABASE {name}")
        server.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{name}'")
        server.execute(f"GRANT CREATE ON DATABASE {name} TO {name}")
        server.execute(f"GRANT CREATE ON SCHEMA public TO {name}", name)

    def drop(self) -> None:
        self._server.execute(f"DROP DATABASE IF EXISTS {self._name} WITH (FORCE)")
        self._server.execute(f"DROP ROLE IF EXISTS {self._name}")

    def plant(self) -> None:
        """Plant the functions as a role that may only create objects."""
        replace(self._server, user=self._name, password=self._name).execute(_PLANTED, self._name)

    def called(self) -> list[str]:
        """Return the planted functions that were called, and the number of calls if there were any."""
        kept = sorted({what for (what,) in self._server.execute("SELECT what FROM planted.called", self._name)})
        [(count, any_called)] = self._server.execute("SELECT last_value, is_called FROM planted.calls", self._name)
        return [*kept, f"{count} calls"] if any_called else []


@pytest.fixture
def database(row: Row) -> Iterator[_DatabaseWithPlantedFunctions]:
    database = _DatabaseWithPlantedFunctions(servers.postgres(), row.name.partition("+")[2], f"trapped_{token_hex(4)}")
    try:
        database.create()
        yield database
    finally:
        database.drop()


@asynccontextmanager
async def _opened(source: str, url: str, keyring: Keyring, **options: Any) -> AsyncIterator[AuthTokenStore]:
    if source == "url":
        async with open_store(url, keyring=keyring, pool_size=2, application_name="planted", **options) as store:
            yield store
        return
    async with _engine(url) as engine, open_store(engine, keyring=keyring, **options) as store:
        yield store


@asynccontextmanager
async def _engine(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url, pool_size=2, max_overflow=0)
    try:
        yield engine
    finally:
        await engine.dispose()


async def _store(store: Any, user_id: str, tag: str) -> None:
    await store.store_tokens("github", user_id, tag, f"refresh of {tag}", datetime.now(UTC) + timedelta(hours=1))


async def _tag(store: Any, user_id: str, *, for_update: bool = False) -> str | None:
    record = await store.load_tokens("github", user_id, for_update)
    return None if record is None else str(record["access_token"])


async def _refresh(_: object) -> dict[str, object]:
    return {"access_token": "refreshed", "refresh_token": "next", "expires_in": 3600}


@contextmanager
def _no_planted_function_called(database: _DatabaseWithPlantedFunctions) -> Iterator[None]:
    """Check that no planted function was called, also if the block failed: its error may be a consequence."""
    try:
        yield
    finally:
        assert database.called() == []


@either_source
@both_drivers
def test_no_operation_calls_a_planted_function(
    database: _DatabaseWithPlantedFunctions, source: str, keyring: Keyring
) -> None:
    async def setup() -> None:
        async with open_store(database.url, keyring=keyring) as store:
            await store.setup()

    async def main() -> None:
        async with _opened(source, database.url, keyring) as store:
            await _store(store, "alone", "first")
            assert await _tag(store, "alone") == "first"
            # More callers than connections, so that they share statements.
            await asyncio.gather(*(_store(store, user, user) for user in _USERS))
            assert await asyncio.gather(*(_tag(store, user) for user in _USERS)) == _USERS
            assert await _tag(store, "nobody") is None
            async with store.transaction() as tx:
                assert await _tag(tx, "u1", for_update=True) == "u1"
                await _store(tx, "u1", "locked")
            assert await _tag(store, "u1") == "locked"
            record = await store.load_fresh_tokens("github", "u2", refresh=_refresh, force=True, force_min_age=0)
            assert record is not None
            assert record["access_token"] == await _tag(store, "u2") == "refreshed"
            assert await _listed(store) == sorted([*_USERS, "alone"])
            assert await _listed(store, provider="github") == sorted([*_USERS, "alone"])
            assert await _listed(store, user_id="u3") == ["u3"]
            assert await _listed(store, provider="github", user_id="u3") == ["u3"]
            assert await _listed(store, provider="gitlab") == []
            assert await store.delete_tokens("github", "u4")
            assert not await store.delete_tokens("github", "u4")

    asyncio.run(setup())
    database.plant()
    with _no_planted_function_called(database):
        asyncio.run(main())


async def _listed(store: AuthTokenStore, **filters: Any) -> list[str]:
    return [entry["user_id"] async for entry in store.list_tokens(**filters)]


@either_source
@both_drivers
def test_listing_refreshing_and_resealing_call_no_planted_function(
    database: _DatabaseWithPlantedFunctions, source: str, keyring: Keyring
) -> None:
    """The calls are `list_tokens` over several pages, `refresh_due`, a refresh that fails, and `reseal_tokens`."""
    newer = Keyring({"k2": bytes(range(1, 33)), "k1": bytes(range(32))})

    async def setup() -> None:
        async with open_store(database.url, keyring=keyring) as store:
            await store.setup()

    async def failing(_: object) -> dict[str, object]:
        raise OSError

    async def main() -> None:
        async with _opened(source, database.url, keyring, refreshers={"github": _refresh}) as store:
            backend: Any = store._backend
            await asyncio.gather(*(_store(store, user, user) for user in _USERS))
            page: list[Any] = []
            while rows := await backend.scan(
                provider=None, user_id=None, after=page[-1].key if page else None, limit=5
            ):
                page += rows
            assert [row.key.user_id for row in page] == sorted(_USERS)
            last = page[-2].key
            assert len(await backend.scan(provider="github", user_id=None, after=last, limit=5)) == 1
            assert await backend.scan(provider="github", user_id="u1", after=last, limit=5) == []
            await store.store_tokens("github", "due", "old", "refresh", datetime.now(UTC) - timedelta(hours=1))
            assert len([result async for result in store.refresh_due(within=60, page_size=1)]) == 1
            assert await _tag(store, "due") == "refreshed"
            with pytest.raises(Exception, match="provider"):
                await store.load_fresh_tokens("github", "u5", refresh=failing, force=True, force_min_age=0)
        async with _opened(source, database.url, newer) as store:
            for user in _USERS:
                assert await store.reseal_tokens("github", user)
            assert {row["key_id"] async for row in store.list_tokens()} == {"k1", "k2"}
            assert await _tag(store, "u1") == "u1"

    asyncio.run(setup())
    database.plant()
    with _no_planted_function_called(database):
        asyncio.run(main())


@either_source
@both_drivers
def test_no_operation_on_values_calls_a_planted_function(
    database: _DatabaseWithPlantedFunctions, source: str, keyring: Keyring
) -> None:
    async def setup() -> None:
        async with open_store(database.url, keyring=keyring) as store:
            await store.setup()

    async def main() -> None:
        async with _opened(source, database.url, Keyring({"k2": bytes(range(1, 33)), "k1": bytes(range(32))})) as store:
            async with _opened(source, database.url, keyring) as older:
                for user in _USERS:
                    await older.put_value("login", user, user, ttl=3600)
            await store.put_value("login", "u1", "anew")
            await store.put_value("login", "short", 1, ttl=0.000001)
            assert await store.get_value("login", "u1") == "anew"
            assert await store.get_value("login", "short") is None
            assert await store.reseal_value("login", "u2")
            for options in ({}, {"namespace": "login"}):
                names = [entry["name"] async for entry in store.list_values(page_size=5, **options)]
                assert names == sorted(_USERS)
            assert await store.pop_value("login", "u3") == "u3"
            assert await store.pop_value("login", "u3") is None
            assert await store.purge_values() == 1
            assert await store.delete_values("login") == len(_USERS) - 1

    asyncio.run(setup())
    database.plant()
    with _no_planted_function_called(database):
        asyncio.run(main())


@both_drivers
def test_waiting_for_a_lock_or_a_lease_calls_no_planted_function(
    database: _DatabaseWithPlantedFunctions, keyring: Keyring
) -> None:
    """The statements set `lock_timeout`, count the clients, and end the statement of a cancelled caller."""

    async def setup() -> None:
        async with open_store(database.url, keyring=keyring) as store:
            await store.setup()
            await _store(store, "u1", "first")

    async def main() -> None:
        async with (
            _engine(database.url) as engine,
            open_store(database.url, keyring=keyring) as store,
            open_store(database.url, keyring=keyring, lock_timeout=0.2) as other,
        ):
            async with AsyncSession(engine) as session, session.begin():
                borrowed = AuthTokenStore(session, keyring=keyring, lock_timeout=0.2)
                assert await _tag(borrowed, "u1", for_update=True) == "first"
                with pytest.raises(LockTimeoutError):
                    async with other.transaction() as tx:
                        await _tag(tx, "u1", for_update=True)
                write = asyncio.create_task(_store(store, "u1", "never"))
                await until(lambda: _waiting(database) == 1)
                write.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await write
                await until(lambda: _waiting(database) == 0)
                await _store(borrowed, "u1", "second")
            backend: Any = other._backend
            assert (await backend._count_clients()).all >= 1
            assert await _tag(store, "u1") == "second"

    asyncio.run(setup())
    database.plant()
    with _no_planted_function_called(database):
        asyncio.run(main())


def _waiting(database: _DatabaseWithPlantedFunctions) -> int:
    query = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{database._name}' AND wait_event_type = 'Lock'"
    [[count]] = database._server.execute(query)
    return int(count)
