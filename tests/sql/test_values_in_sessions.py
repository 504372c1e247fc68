"""Values over an application's engine and in a borrowed session: what is committed, and what others wait for."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from support.contract_example import app
from support.database import Place, app_engine
from support.matrix import each_database, mysql_rows, server_rows, shared_rows
from tokenstore import AuthTokenStore, ConflictError, Keyring, LockTimeoutError, open_store
from tokenstore.testing.conformance._helpers import until

KEY = ("login", "state")


@shared_rows
def test_in_the_caller_s_transaction_the_store_commits_no_value(place: Place, keyring: Keyring) -> None:
    """Others see a put, a pop and a deletion after the caller's commit, and none of them after a rollback."""

    async def main() -> None:
        async with app(place, keyring) as (engine, other), AsyncSession(engine) as session:
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            await other.put_value(*KEY, "popped")
            await other.put_value("clients", "github", "deleted")
            for ends in (session.rollback, session.commit):
                _ = await session.begin()
                assert await store.pop_value(*KEY) == "popped"
                assert await store.get_value(*KEY) is None
                assert await store.delete_values("clients") == 1
                await store.put_value("login", "new", "put", ttl=600)
                assert await store.get_value("login", "new") == "put"
                assert [entry["name"] async for entry in store.list_values()] == ["new"]
                assert await store.purge_values() == 0
                assert session.in_transaction()
                assert await other.get_value(*KEY) == "popped"
                assert await other.get_value("login", "new") is None
                await ends()
                names = [entry["name"] async for entry in other.list_values()]
                assert names == (["new"] if ends == session.commit else ["github", "state"])

    asyncio.run(main())


@shared_rows
def test_in_a_transaction_of_its_own_the_store_commits_values(place: Place, keyring: Keyring) -> None:
    """No call leaves a transaction open; a pop of nothing, neither."""

    async def main() -> None:
        async with app(place, keyring) as (engine, other), AsyncSession(engine) as session:
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            calls: list[Any] = [
                lambda: store.pop_value(*KEY),
                lambda: store.put_value(*KEY, "put"),
                lambda: store.get_value(*KEY),
                lambda: store.reseal_value(*KEY),
                lambda: store.pop_value(*KEY),
                lambda: store.delete_values("login"),
                store.purge_values,
            ]
            found = []
            for call in calls:
                _ = await call()
                assert not session.in_transaction()
                found.append(await other.get_value(*KEY))
            assert found == [None, "put", "put", "put", None, None, None]

    asyncio.run(main())


@shared_rows
@pytest.mark.parametrize("committed", [True, False], ids=["commit", "rollback"])
def test_a_pop_waits_for_another_one_in_an_open_transaction(committed: bool, place: Place, keyring: Keyring) -> None:
    """After a commit it gets nothing, after a rollback the value; a wait that is too long is an error."""

    async def main() -> None:
        async with (
            app(place, keyring) as (engine, other),
            AsyncSession(engine) as session,
            open_store(place.url, keyring=keyring, lock_timeout=0.05) as hasty,
        ):
            await other.put_value(*KEY, "value")
            _ = await session.begin()
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            assert await store.pop_value(*KEY) == "value"
            with pytest.raises(LockTimeoutError, match="namespace 'login', name 'state'"):
                await hasty.pop_value(*KEY)
            waiter = asyncio.create_task(other.pop_value(*KEY))
            await place.until_waiting(other)
            assert not waiter.done()
            await (session.commit() if committed else session.rollback())
            assert await waiter == (None if committed else "value")
            assert await other.get_value(*KEY) is None

    asyncio.run(main())


@shared_rows
def test_a_pop_gets_a_value_that_was_put_while_it_waited(place: Place, keyring: Keyring) -> None:
    async def main() -> None:
        async with app(place, keyring) as (engine, other), AsyncSession(engine) as session:
            await other.put_value(*KEY, "old")
            _ = await session.begin()
            await AuthTokenStore(session, keyring=keyring, **place.options).put_value(*KEY, "new")
            waiter = asyncio.create_task(other.pop_value(*KEY))
            await place.until_waiting(other)
            await session.commit()
            assert await waiter == "new"
            assert await other.get_value(*KEY) is None

    asyncio.run(main())


@server_rows
def test_a_value_that_expired_while_a_pop_waited_is_not_returned(place: Place, keyring: Keyring) -> None:
    """The clock is read after the wait, also if the lock's holder has changed nothing."""

    async def main() -> None:
        async with app(place, keyring) as (engine, other), AsyncSession(engine) as session:
            await other.put_value(*KEY, "value", ttl=1.0)
            query = text(f"SELECT 1 FROM {place.table}_values WHERE namespace = 'login' FOR UPDATE")
            assert (await session.execute(query)).all()
            waiter = asyncio.create_task(other.pop_value(*KEY, default="missing"))
            await place.until_waiting(other)

            async def expired() -> bool:
                return await other.get_value(*KEY) is None  # a plain read, which waits for no lock

            await until(expired, "the value has expired")
            assert not waiter.done()
            await session.rollback()
            assert await waiter == "missing"

    asyncio.run(main())


@mysql_rows
def test_a_pop_in_a_transaction_with_an_older_snapshot_gets_the_latest_value(place: Place, keyring: Keyring) -> None:
    """At REPEATABLE READ a plain read would return the old version for ever. MariaDB may refuse, by its settings."""

    async def main() -> None:
        async with (
            app(place, keyring, isolation_level="REPEATABLE READ") as (engine, other),
            AsyncSession(engine) as session,
        ):
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            await other.put_value(*KEY, "old")
            _ = await session.begin()
            assert await store.get_value(*KEY) == "old"
            await other.put_value(*KEY, "new")
            refused = None
            try:
                assert await store.pop_value(*KEY) == "new"
            except ConflictError as error:
                refused = error.code
            await session.commit()
            assert refused in (None, "1020")
            assert await other.get_value(*KEY) == (None if refused is None else "new")

    asyncio.run(main())


@each_database
@pytest.mark.parametrize("level", [None, "AUTOCOMMIT"])
def test_of_many_sessions_one_pops_a_value(level: str | None, place: Place, keyring: Keyring) -> None:
    """Also in the driver's autocommit mode, in which a lock ends with its statement."""
    arguments = {} if level is None else {"isolation_level": level}

    async def main() -> None:
        async with app(place, keyring, **arguments) as (engine, other), AsyncExitStack() as stack:
            sessions = [await stack.enter_async_context(AsyncSession(engine)) for _ in range(4)]
            stores = [AuthTokenStore(session, keyring=keyring, **place.options) for session in sessions]
            names = [f"state-{number}" for number in range(20)]
            for name in names:
                await other.put_value("login", name, name)
            popped: Counter[str] = Counter()
            for name in names:
                found = await asyncio.gather(*(store.pop_value("login", name) for store in stores))
                popped.update(value for value in found if value is not None)
            assert popped == Counter(names)

    asyncio.run(main())


@shared_rows
def test_of_many_tasks_on_an_engine_one_pops_a_value(place: Place, keyring: Keyring) -> None:
    async def main() -> None:
        async with app_engine(place) as engine, open_store(engine, keyring=keyring, **place.options) as store:
            await store.setup()
            for number in range(5):
                await store.put_value(*KEY, number)
                found = await asyncio.gather(*(store.pop_value(*KEY) for _ in range(12)))
                assert [value for value in found if value is not None] == [number]

    asyncio.run(main())
