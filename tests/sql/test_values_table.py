"""The table of values: its creation, its index, and rows that somebody has altered."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import inspect, text

from support.database import Place, app_engine
from support.matrix import Row, params, shared_rows
from tokenstore import AuthTokenStore, ConfigurationError, Keyring, TableMissingError, TamperedError, open_store
from tokenstore_sql.backend import SQLBackend

MAX_INT64 = 2**63 - 1


def _backend(store: AuthTokenStore) -> Any:
    backend: Any = store._backend
    assert isinstance(backend, SQLBackend)
    return backend


async def _tables(place: Place) -> set[str]:
    async with app_engine(place) as engine, engine.connect() as connection:
        names = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    return {name for name in names if name.startswith(place.table)}


async def _execute(place: Place, *statements: str) -> None:
    async with app_engine(place) as engine, engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement))


@shared_rows
def test_setup_creates_and_drop_removes_both_tables(place: Place, keyring: Keyring) -> None:
    """Setup also adds the table of values to a token table that was there before, and keeps its rows."""
    both = {place.table, f"{place.table}_values"}

    async def main() -> None:
        async with open_store(place.url, keyring=keyring) as store:
            await store.setup()
            assert await _tables(place) == both
            await store.store_tokens("github", "u1", "at", None, None)
            await _execute(place, f"DROP TABLE {place.table}_values")
            with pytest.raises(TableMissingError, match=r"name 'state': the table does not exist.*tokenstore init"):
                await store.get_value("login", "state")
            assert await store.load_tokens("github", "u1") is not None
            await store.setup()
            assert await _tables(place) == both
            assert await store.get_value("login", "state") is None
            assert await store.load_tokens("github", "u1") is not None
            await _backend(store).drop()
            assert await _tables(place) == set()

    asyncio.run(main())


@shared_rows
def test_setup_refuses_another_table_of_that_name(place: Place, keyring: Keyring) -> None:
    async def main() -> None:
        async with open_store(place.url, keyring=keyring) as store:
            await store.setup()
            await _execute(
                place, f"DROP TABLE {place.table}_values", f"CREATE TABLE {place.table}_values (id INTEGER PRIMARY KEY)"
            )
            with pytest.raises(ConfigurationError, match=f"{place.table}_values exists but is no table of values: it"):
                await store.setup()

    asyncio.run(main())


def test_the_longest_name_of_a_table_leaves_room_for_those_of_its_indexes() -> None:
    """PostgreSQL cuts names after 63 bytes; MySQL refuses those over 64."""
    from sqlalchemy import MetaData

    from tokenstore.options import identifier
    from tokenstore_sql import token_table, values_table

    name = identifier("table", "t" * 48)
    metadata = MetaData()
    for table in (token_table(metadata, name), values_table(metadata, name)):
        assert len(table.name) <= 63
        assert all(len(str(index.name)) <= 63 for index in table.indexes)


@pytest.mark.parametrize(
    "row", params(names=["sqlite", "postgresql+asyncpg", "mariadb+asyncmy", "mysql9+asyncmy"], shared=True)
)
def test_values_are_found_and_purged_by_an_index(row: Row, url: str, keyring: Keyring) -> None:
    """No plan scans the table, of which a few rows have expired."""
    analyze, explain, whole = {
        "sqlite": ("ANALYZE", "EXPLAIN QUERY PLAN", "SCAN "),
        "postgres": ("ANALYZE", "EXPLAIN", "Seq Scan"),
        "mysql": ("ANALYZE TABLE", "EXPLAIN", "ALL"),
    }[row.mark]

    async def main() -> None:
        async with open_store(url, keyring=keyring) as store:
            await store.setup()
            for start in range(0, 2000, 100):
                numbers = range(start, start + 100)
                await asyncio.gather(*(store.put_value(f"g{n % 7}", f"n{n}", n, ttl=3600 + n) for n in numbers))
            backend = _backend(store)
            statements = backend.value_statements
            asked = [
                (statements.get, {"g": "g1", "n": "n1"}),
                (statements.get_locked, {"g": "g1", "n": "n1"}),
                (statements.expired, {"limit": 100}),
                (statements.delete_expired, {"until": 1}),
                *((query, {"limit": 5, "g": "g1", "after_g": "g1", "after_n": "n1"}) for query in _pages(statements)),
            ]
            if statements.take is not None:
                asked.append((statements.take, {"g": "g1", "n": "n1"}))
            connection = backend._source.take()
            assert connection is not None
            await connection.send(f"{analyze} {backend.values.name}", (), True)
            for statement, parameters in asked:
                compiled = connection._compiler(statement)
                plan, _ = await connection.send(f"{explain} {compiled.sql}", compiled.arguments(parameters), True)
                words = "\n".join(str(value) for line in plan for value in tuple(line))
                assert whole not in words.replace(f"SCAN {backend.values.name} USING INDEX", ""), compiled.sql
            backend._source.put_back(connection)

    asyncio.run(main())


def _pages(statements: Any) -> list[Any]:
    return [
        *statements.scan(by_group=True, after=False),
        *statements.scan(by_group=True, after=True),
        *statements.scan(by_group=False, after=True),
    ]


@shared_rows
def test_an_altered_value_is_refused_and_no_other_value_is(place: Place, keyring: Keyring) -> None:
    """It can be popped and put anew. Its columns are altered, or its sealed value is replaced by another one's."""
    table, this = f"{place.table}_values", "WHERE name = 'bobby'"

    def alter(change: str) -> str:
        return f"UPDATE {table} SET {change} {this}"

    moved = f"INSERT INTO {table} SELECT namespace, 'bobby', value, key_id, expires_at, version, created_at, updated_at"
    alterations = {
        "expires_at": [alter(f"expires_at = {MAX_INT64}")],
        "version": [alter(f"version = {MAX_INT64}")],
        "key_id": [alter("key_id = 'other'")],
        "created_at": [alter(f"created_at = {-MAX_INT64}")],
        "value": [f"DELETE FROM {table} {this}", f"{moved} FROM {table} WHERE name = 'alice'"],
    }

    async def main() -> None:
        async with open_store(place.url, keyring=keyring) as store:
            await store.setup()
            for column, statements in alterations.items():
                for name in ("alice", "bobby", "carol"):
                    await store.put_value("login", name, name)
                await _execute(place, *statements)
                for call in (store.get_value, store.reseal_value):
                    with pytest.raises(TamperedError, match="name 'bobby'"):
                        await call("login", "bobby")
                assert await store.get_value("login", "alice") == "alice"
                assert await store.get_value("login", "carol") == "carol"
                found: list[str] = []
                try:
                    async for entry in store.list_values(page_size=2):
                        found.append(entry["name"])  # noqa: PERF401 - an error would lose them
                except TamperedError:
                    assert column in ("expires_at", "created_at")
                assert {*found, "bobby"} == {"alice", "bobby", "carol"}
                with pytest.raises(TamperedError, match="name 'bobby'"):
                    await store.pop_value("login", "bobby")
                await store.put_value("login", "bobby", "again")
                assert await store.pop_value("login", "bobby") == "again"

    asyncio.run(main())
