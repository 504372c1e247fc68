"""The tables change from one version to the next while programs of both versions use them."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import inspect, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from support import store_jobs
from support.command_line import cli
from support.database import Place, app_engine, connection_settings
from support.matrix import each_database, postgres_rows, shared_rows
from support.migration_jobs import COLUMN, TITLE, become_next_version, end_traffic, migrate, tokens_of, traffic
from support.polling import until
from support.workers import Team, Worker
from tokenstore import (
    AuthTokenStore,
    BackendUnavailableError,
    ConfigurationError,
    InvalidInputError,
    Keyring,
    MigrationResult,
    UnsupportedOperationError,
    open_store,
)
from tokenstore_sql import migrations

_PROCESSES, _CALLERS = 4, 8
_WAITING_FOR_THE_TABLE = """SELECT count(*) FROM information_schema.processlist
    WHERE db = database() AND state LIKE 'Waiting for table metadata%'"""


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    """Processes with programs of this version."""
    team = Team()
    yield team
    team.close()


@pytest.fixture(scope="module")
def newcomers() -> Iterator[Sequence[Worker]]:
    """Two processes with programs of the next version."""
    team = Team()
    workers = team.first(2)
    for worker in workers:
        worker.call(become_next_version)
    yield workers
    team.close()


@pytest.mark.soak
@shared_rows
def test_32_callers_go_on_while_the_tables_change(place: Place, team: Team, newcomers: Sequence[Worker]) -> None:
    """None gets an error, and each one's last tokens are there, for programs of both versions."""
    team[0].call(store_jobs.set_up, place.url)
    workers = team.first(_PROCESSES)
    migrator, newcomer = newcomers
    for number, worker in enumerate(workers):
        worker.start(traffic, place.url, f"old-{number}", _CALLERS)
        worker.met()
    for worker in workers:
        worker.go_on()
    asyncio.run(_migrate_beside_a_long_transaction(place, migrator))
    assert migrator.call(migrate, place.url) == MigrationResult(2, 2, ())
    newcomer.call(store_jobs.set_up, place.url)
    newcomer.start(traffic, place.url, "new", _CALLERS)
    newcomer.met()
    newcomer.go_on()
    asyncio.run(until(lambda: _writes(place, "new-0") > 2))
    migrator.call(end_traffic, place.url)
    last = {user: token for worker in [*workers, newcomer] for user, token in worker.result().items()}
    assert len(last) == (_PROCESSES + 1) * _CALLERS
    for reader in (workers[0], newcomer):
        found = reader.call(tokens_of, place.url)
        assert {user: found[user] for user in last} == last
    assert _is_migrated(place)


async def _migrate_beside_a_long_transaction(place: Place, migrator: Worker) -> None:
    """Migrate while a transaction uses the table. The callers must not wait behind the change that waits for it."""
    if place.row.mark == "sqlite":  # where no transaction but a write keeps others from writing
        assert migrator.call(migrate, place.url) == MigrationResult(1, 2, (TITLE,))
        return
    async with app_engine(place) as engine, engine.connect() as reader:
        await reader.execute(text(f"SELECT count(*) FROM {place.table}"))
        migrator.start(migrate, place.url)
        migrator.met()
        migrator.go_on()
        await until(lambda: _waiting_for_the_table(place) > 0)
        for _ in range(3):
            before = _writes(place, "old-0-0")
            await until(lambda: _writes(place, "old-0-0") > before + 2)  # noqa: B023 - ends in this round
    assert await asyncio.to_thread(migrator.result) == MigrationResult(1, 2, (TITLE,))


def _query(place: Place, statement: str) -> list[Any]:
    if place.row.mark != "sqlite":
        return place.server().execute(statement)
    with closing(sqlite3.connect(make_url(place.url).database or "", isolation_level=None)) as connection:
        return connection.execute(statement).fetchall()


def _waiting_for_the_table(place: Place) -> int:
    if place.row.mark == "postgres":
        query = "SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"
    else:
        query = _WAITING_FOR_THE_TABLE
    try:
        [[count]] = _query(place, query)
    except DBAPIError as error:
        # MySQL raises this error while a statement with binary values is executed: the caller asks again.
        if "Cannot convert string" not in str(error.orig):
            raise
        return 0
    return int(count)


def _writes(place: Place, user_id: str) -> int:
    """A number that grows with every write of the user's tokens; 0 if there are none."""
    found = _query(place, f"SELECT generation FROM {place.table} WHERE user_id = '{user_id}'")
    return int(found[0][0]) if found else 0


def _version(place: Place) -> object:
    found = _query(place, f"SELECT version FROM {place.table}_values WHERE namespace = '' AND name = 'schema'")
    return found[0][0] if found else None


def _columns_and_indexes(place: Place) -> tuple[set[str], set[str | None]]:
    async def main() -> tuple[set[str], set[str | None]]:
        async with app_engine(place) as engine, engine.connect() as connection:
            columns = await connection.run_sync(lambda sync: inspect(sync).get_columns(place.table))
            indexes = await connection.run_sync(lambda sync: inspect(sync).get_indexes(place.table))
            return {column["name"] for column in columns}, {index["name"] for index in indexes}

    return asyncio.run(main())


def _is_migrated(place: Place) -> bool:
    columns, indexes = _columns_and_indexes(place)
    return _version(place) == 2 and COLUMN in columns and f"{place.table}_by_use" in indexes


@each_database
def test_programs_that_migrate_at_once_change_the_tables_once(
    place: Place, team: Team, newcomers: Sequence[Worker]
) -> None:
    team[0].call(store_jobs.set_up, place.url)
    for worker in newcomers:
        worker.start(migrate, place.url)
        worker.met()
    for worker in newcomers:
        worker.go_on()
    results = sorted(worker.result() for worker in newcomers)
    assert results == [MigrationResult(1, 2, (TITLE,)), MigrationResult(2, 2, ())]
    assert _is_migrated(place)


@postgres_rows
def test_an_index_whose_build_was_ended_is_built_anew(place: Place, team: Team, newcomers: Sequence[Worker]) -> None:
    """PostgreSQL keeps the index of a build that did not end: it is of no use, but has the name."""
    invalid = f"SELECT count(*) FROM pg_index WHERE indrelid = '{place.table}'::regclass AND NOT indisvalid"
    builds = "FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'CREATE INDEX%'"
    migrator, _ = newcomers
    team[0].call(store_jobs.set_up, place.url)
    _query(place, f"ALTER TABLE {place.table} ADD COLUMN {COLUMN} BIGINT")  # so much was done before

    async def main() -> None:
        async with app_engine(place) as engine, engine.connect() as writer:
            await writer.execute(text(f"DELETE FROM {place.table}"))  # the build waits for this transaction
            migrator.start(migrate, place.url)
            migrator.met()
            migrator.go_on()
            await until(lambda: _query(place, invalid) == [(1,)] and place.waiting() == 1)
            [(pid, _)] = _query(place, f"SELECT pid, pg_terminate_backend(pid) {builds}")
            await until(lambda: _query(place, f"SELECT 1 FROM pg_stat_activity WHERE pid = {pid}") == [])

    asyncio.run(main())
    try:
        migrator.result()  # with psycopg the migration goes on over a new connection
    except BackendUnavailableError:
        assert _query(place, invalid) == [(1,)]
        assert migrator.call(migrate, place.url) == MigrationResult(1, 2, (TITLE,))
    assert _query(place, invalid) == [(0,)]
    assert _is_migrated(place)


@each_database
def test_programs_start_on_tables_of_their_own_version_and_of_the_next(
    place: Place, team: Team, newcomers: Sequence[Worker]
) -> None:
    this, newer = team[0], newcomers[0]
    this.call(store_jobs.set_up, place.url)
    with pytest.raises(ConfigurationError, match=r"is of version 1, .* needs version 2: run `tokenstore migrate`"):
        newer.call(store_jobs.set_up, place.url)
    assert newer.call(migrate, place.url, True) == MigrationResult(1, 2, (TITLE,))
    assert not _is_migrated(place)  # a dry run changes nothing
    newer.call(migrate, place.url)
    assert _is_migrated(place)
    newer.call(store_jobs.set_up, place.url)
    this.call(store_jobs.set_up, place.url)
    assert this.call(migrate, place.url) == MigrationResult(2, 2, ())
    _query(place, f"UPDATE {place.table}_values SET version = 3 WHERE namespace = ''")
    for job in (store_jobs.set_up, migrate):
        with pytest.raises(ConfigurationError, match=r"is of version 3, .* up to version 2: install a newer"):
            this.call(job, place.url)


@each_database
def test_tables_without_a_version_are_of_the_first(place: Place, team: Team, newcomers: Sequence[Worker]) -> None:
    """An application's Alembic may have created them."""
    team[0].call(store_jobs.set_up, place.url)
    _query(place, f"DELETE FROM {place.table}_values")
    team[0].call(store_jobs.set_up, place.url)
    assert _version(place) is None
    with pytest.raises(ConfigurationError, match=f"lacks {COLUMN}; .* or run `tokenstore migrate`"):
        newcomers[0].call(store_jobs.set_up, place.url)
    assert newcomers[0].call(migrate, place.url) == MigrationResult(1, 2, (TITLE,))
    assert _is_migrated(place)


@each_database
def test_an_application_s_engine_keeps_its_settings(
    place: Place, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here version 1 lacks a column and an index of the present tables."""
    index = f"{place.table}_by_user"
    migration = migrations.Migration(TITLE, [("token table", "metadata")], [("token table", "_by_user")])

    async def main() -> None:
        async with (
            app_engine(place, pool_size=1, max_overflow=0) as engine,
            open_store(engine, keyring=keyring, **place.options) as store,
        ):
            await store.setup()
            _query(place, f"DROP INDEX {index}" + f" ON {place.table}" * (place.row.mark == "mysql"))
            _query(place, f"ALTER TABLE {place.table} DROP COLUMN metadata")
            monkeypatch.setattr(migrations, "MIGRATIONS", [migration])
            before = await connection_settings(engine, place.row, 1)
            assert await store.migrate() == MigrationResult(1, 2, (TITLE,))
            assert await connection_settings(engine, place.row, 1) == before
            await store.setup()
            await store.store_tokens("github", "u1", "t", None, None, metadata={"name": "Ann"})

    asyncio.run(main())
    columns, indexes = _columns_and_indexes(place)
    assert "metadata" in columns
    assert index in indexes


@each_database
def test_a_store_on_a_session_does_not_change_tables(place: Place, keyring: Keyring) -> None:
    """The application's transaction would hold the tables."""

    async def main() -> None:
        async with app_engine(place) as engine, AsyncSession(engine) as session:
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            with pytest.raises(UnsupportedOperationError, match="has no migrations; use open_store"):
                await store.migrate()

    asyncio.run(main())


@each_database
def test_the_command_says_what_it_does(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "MIGRATIONS", [])
    assert cli("init", url=place.url, keys=None).code == 0
    assert cli("migrate", url=place.url, keys=None) == (0, "the tables are of version 1\n", "")
    monkeypatch.setattr(migrations, "MIGRATIONS", [migrations.Migration(TITLE)])
    planned = f"to do: {TITLE}\nthe tables are of version 1; `tokenstore migrate` brings them to 2\n"
    assert cli("migrate", "--dry-run", url=place.url) == (0, planned, "")
    [report] = cli("migrate", "--dry-run", "--json", url=place.url).rows
    assert report == {"found": 1, "version": 2, "steps": [TITLE], "dry_run": True}
    assert cli("migrate", url=place.url) == (0, f"done: {TITLE}\nthe tables are of version 2\n", "")
    assert _version(place) == 2


@each_database
def test_the_row_of_the_version_is_no_value(place: Place, keyring: Keyring) -> None:
    """No list has it, and no caller can name it."""

    async def main() -> None:
        async with open_store(place.url, keyring=keyring) as store:
            await store.setup()
            await store.put_value("a", "b", 1)
            assert [entry["name"] async for entry in store.list_values()] == ["b"]
            assert [entry["name"] async for entry in store.list_values(page_size=1)] == ["b"]
            assert await store.purge_values() == 0
            with pytest.raises(InvalidInputError, match="namespace must not be empty"):
                await store.get_value("", "schema")

    asyncio.run(main())
    assert _version(place) == migrations.newest_version()
