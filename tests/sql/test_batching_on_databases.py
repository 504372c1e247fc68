"""Batching on each database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from support.database import Place
from support.matrix import Row, each_database, each_server, params, sqlite_row
from support.polling import until
from support.sent_statements import sent_statements
from tokenstore import AuthTokenStore, Keyring, LockTimeoutError, open_store
from tokenstore.errors import TableMissingError
from tokenstore.records import TokenKey
from tokenstore.registry import backend_for_url
from tokenstore.testing.conformance import sealed
from tokenstore_sql.backend import SQLBackend

# Seconds, long enough for a busy machine.
_IN_TIME = 10.0


@asynccontextmanager
async def _opened(url: str, *, rows: int = 0, **options: Any) -> AsyncIterator[SQLBackend]:
    backend: Any = backend_for_url(url, options)
    try:
        await backend.setup()
        if rows:
            for number in range(rows):
                await backend.put(_key(number), sealed(f"old-{number}"))
        yield backend
    finally:
        await backend.aclose()


def _key(number: int) -> TokenKey:
    return TokenKey("github", f"u{number}")


@each_database
def test_each_of_many_loads_gets_its_own_record(row: Row, url: str) -> None:
    """200 concurrent loads of 50 keys, some without a row: each gets its own record, from fewer than 200 statements."""

    async def main() -> None:
        async with _opened(url, rows=40) as backend:
            with sent_statements() as sent:
                found = await asyncio.gather(*(backend.get(_key(number % 50)) for number in range(200)))
            for number, record in enumerate(found):
                if number % 50 >= 40:
                    assert record is None
                else:
                    assert record is not None
                    assert record.key == _key(number % 50)
                    assert record.tokens == sealed(f"old-{number % 50}")
            assert len(sent) <= 40, "the loads do not share statements"

    asyncio.run(main())


@pytest.mark.parametrize(
    "row", params(names=["sqlite", "postgresql+asyncpg", "mariadb+asyncmy", "mysql9+asyncmy"], shared=True)
)
def test_a_batch_of_loads_uses_the_primary_key(row: Row, url: str) -> None:
    """The query plan has no scan of the table, even if the statistics say that the table is small."""
    analyze, explain, by_key, whole = {
        "sqlite": ("ANALYZE", "EXPLAIN QUERY PLAN", "SEARCH", "SCAN "),
        "postgres": ("ANALYZE", "EXPLAIN", "Index Cond", "Seq Scan"),
        "mysql": ("ANALYZE TABLE", "EXPLAIN", "range", "ALL"),
    }[row.mark]

    async def main() -> None:
        async with _opened(url, rows=1000) as backend:
            keys = [_key(number) for number in range(60)]
            await asyncio.gather(*map(backend.get, keys))
            statement, parameters = backend.statements.get_many(keys)
            connection = backend._source.take()
            assert connection is not None
            compiled = connection._compiler(statement)
            await connection.send(f"{analyze} {backend.table.name}", (), True)
            plan, _ = await connection.send(f"{explain} {compiled.sql}", compiled.arguments(parameters), True)
            backend._source.put_back(connection)
            words = "\n".join(str(value) for line in plan for value in tuple(line))
            assert by_key in words
            assert whole not in words

    asyncio.run(main())


@each_database
def test_each_of_many_stores_adds_one_to_the_generation(row: Row, url: str) -> None:
    """Two backends store one key many times, and other keys at the same time."""

    async def main() -> None:
        async with _opened(url, rows=3) as one, _opened(url) as other:
            before = await one.get(_key(0))
            assert before is not None
            await asyncio.gather(
                *(backend.put(_key(0), sealed(f"new-{n}")) for n in range(20) for backend in (one, other)),
                *(one.put(_key(100 + n), sealed(f"{n}")) for n in range(60)),
            )
            after = await other.get(_key(0))
            assert after is not None
            assert after.generation == before.generation + 40
            assert after.tokens in [sealed(f"new-{n}") for n in range(20)]
            found = [await one.get(_key(100 + n)) for n in range(60)]
            assert [record and record.tokens for record in found] == [sealed(f"{n}") for n in range(60)]

    asyncio.run(main())


@each_database
def test_a_load_after_a_store_returns_what_was_stored(row: Row, url: str) -> None:
    """Although other tasks load and store at the same time, no load shares a statement sent before its store."""

    async def main() -> None:
        async with _opened(url, rows=20) as backend:

            async def use(number: int) -> None:
                for turn in range(5):
                    await backend.put(_key(number), sealed(f"{number}-{turn}"))
                    record = await backend.get(_key(number))
                    assert record is not None
                    assert record.tokens == sealed(f"{number}-{turn}")

            await asyncio.gather(*map(use, range(20)))

    asyncio.run(main())


@each_server
def test_a_locked_row_does_not_delay_stores_of_other_rows(row: Row, url: str) -> None:
    """50 stores of other rows end long before ``lock_timeout``, also the one in the locked row's batch."""

    async def main() -> None:
        place = Place(row, url)
        async with _opened(url, rows=51, lock_timeout=10 * _IN_TIME) as backend:
            async with place.held("u10"):
                stores = [asyncio.create_task(backend.put(_key(n), sealed("new"))) for n in range(51)]
                locked = stores.pop(10)
                async with asyncio.timeout(_IN_TIME):
                    await asyncio.gather(*stores)
                    await asyncio.gather(*(backend.get(_key(n)) for n in range(51)))
                    await place.until_waiting()
                assert not locked.done()
            await locked
            found = [await backend.get(_key(n)) for n in range(51)]
            assert all(record is not None and record.tokens == sealed("new") for record in found)

    asyncio.run(main())


@each_server
def test_a_lock_timeout_fails_only_the_store_of_the_locked_row(row: Row, url: str) -> None:
    """The other stores of the same batch succeed."""

    async def main() -> None:
        place = Place(row, url)
        async with _opened(url, rows=12, lock_timeout=1) as backend:
            async with place.held("u10"):
                stores = [backend.put(_key(n), sealed("new")) for n in range(12)]
                ends = await asyncio.gather(*stores, return_exceptions=True)
            locked = ends.pop(10)
            assert type(locked) is LockTimeoutError
            assert str(_key(10)) in str(locked)
            assert ends == [None] * 11
            record = await backend.get(_key(10))
            assert record is not None
            assert record.tokens == sealed("old-10")
            assert backend._source.in_use == 0

    asyncio.run(main())


@sqlite_row
def test_stores_that_wait_for_sqlite_s_writer_share_one_connection(row: Row, url: str) -> None:
    """Loads are not delayed meanwhile, and afterwards all rows are stored."""

    async def main() -> None:
        place = Place(row, url)
        async with _opened(url, rows=50, lock_timeout=10 * _IN_TIME) as backend:
            async with place.held("u10"):
                stores = [asyncio.create_task(backend.put(_key(n), sealed("new"))) for n in range(50)]
                await until(lambda: backend._source.in_use > 0)
                async with asyncio.timeout(_IN_TIME):
                    await asyncio.gather(*(backend.get(_key(n)) for n in range(50)))
                assert not any(store.done() for store in stores)
                assert backend._source.in_use == 1
            await asyncio.gather(*stores)
            found = [await backend.get(_key(n)) for n in range(50)]
            assert all(record is not None and record.tokens == sealed("new") for record in found)

    asyncio.run(main())


@each_database
@pytest.mark.parametrize("write", [False, True])
def test_each_caller_of_a_failed_statement_gets_an_error_that_names_its_row(row: Row, url: str, write: bool) -> None:
    """Without the table, all statements fail."""

    async def main() -> None:
        async with _opened(url) as backend:
            await backend.drop()
            calls: list[Coroutine[Any, Any, object]] = [
                backend.put(_key(n), sealed()) if write else backend.get(_key(n)) for n in range(20)
            ]
            ends = await asyncio.gather(*calls, return_exceptions=True)
            assert all(type(end) is TableMissingError for end in ends)
            assert len({id(end) for end in ends}) == 20
            for number, end in enumerate(ends):
                assert str(end).startswith(f"{_key(number)}: the table does not exist")

    asyncio.run(main())


@each_database
def test_a_cancelled_caller_does_not_cancel_the_others_of_its_batch(row: Row, url: str) -> None:
    """The other callers get their answers, and all connections are returned to the pool."""

    async def main() -> None:
        async with _opened(url, rows=60) as backend:
            loads = [asyncio.create_task(backend.get(_key(n))) for n in range(60)]
            stores = [asyncio.create_task(backend.put(_key(n), sealed("new"))) for n in range(60)]
            await asyncio.sleep(0)
            for n, task in enumerate([*loads, *stores]):
                if n % 3 == 0:
                    task.cancel()
            for n, record in enumerate(await asyncio.gather(*[t for n, t in enumerate(loads) if n % 3])):
                assert record is not None
                assert record.key == _key(n // 2 * 3 + n % 2 + 1)
            await asyncio.gather(*[task for n, task in enumerate(stores) if n % 3])
            await asyncio.wait([*loads, *stores])
            await until(lambda: backend._source.in_use == 0)
            found = [await backend.get(_key(n)) for n in range(60) if n % 3]
            assert all(record is not None and record.tokens == sealed("new") for record in found)

    asyncio.run(main())


async def _refused(_: object) -> Any:
    raise AssertionError("the provider is called for a valid token")


@asynccontextmanager
async def _store_of(url: str, keyring: Keyring) -> AsyncIterator[AuthTokenStore]:
    async with open_store(url, keyring=keyring) as store:
        await store.setup()
        for user in ("hot", "other"):
            await store.store_tokens("github", user, f"gho_{user}", None, datetime.now(UTC) + timedelta(days=1))
            assert await store.load_tokens("github", user)
        yield store


@each_database
def test_200_loads_of_a_valid_token_take_few_statements(row: Row, url: str, keyring: Keyring) -> None:
    """200 callers load one row with a valid token at the same time."""

    async def main() -> None:
        async with _store_of(url, keyring) as store:
            with sent_statements() as sent:
                records = await asyncio.gather(
                    *(store.load_fresh_tokens("github", "hot", refresh=_refused) for _ in range(200))
                )
            assert all(record is not None and record["access_token"] == "gho_hot" for record in records)
            assert len(sent) <= 20

    asyncio.run(main())


@each_database
def test_repeated_loads_of_one_row_do_not_delay_a_load_of_another(row: Row, url: str, keyring: Keyring) -> None:
    """A load of another row ends while 200 callers load one row again and again."""

    async def main() -> None:
        async with _store_of(url, keyring) as store:
            enough = False

            async def crowd() -> None:
                while not enough:
                    assert await store.load_fresh_tokens("github", "hot", refresh=_refused)

            tasks = [asyncio.create_task(crowd()) for _ in range(200)]
            try:
                async with asyncio.timeout(_IN_TIME):
                    for _ in range(3):
                        record = await store.load_tokens("github", "other")
                        assert record is not None
                        assert record["access_token"] == "gho_other"
            finally:
                enough = True
                await asyncio.gather(*tasks)

    asyncio.run(main())
