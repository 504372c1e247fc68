"""Row locks work at each isolation level that an application can choose."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from support.database import Place, app_engine
from support.matrix import params
from support.tagged_tokens import load_tag, opened, store_tag
from tokenstore import AuthTokenStore, ConflictError, Keyring, LockTimeoutError, UnsupportedOperationError, open_store

LEVELS = ["AUTOCOMMIT", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
SQLITE_LEVELS = ["AUTOCOMMIT", "SERIALIZABLE"]


def _levels() -> Iterator[object]:
    for param in params(names=["sqlite", "postgresql+asyncpg", "postgresql+psycopg", "mariadb+asyncmy"]):
        [row] = param.values  # type: ignore[attr-defined]
        for level in SQLITE_LEVELS if row.mark == "sqlite" else LEVELS:
            yield pytest.param(row, level, id=f"{row.name}-{level}", marks=getattr(pytest.mark, row.mark))


every_level = pytest.mark.parametrize(("row", "level"), list(_levels()))


@every_level
def test_row_locks_work_on_an_engine_of_any_isolation_level(place: Place, level: str, keyring: Keyring) -> None:
    """A second caller waits, then reads the tokens that the first one stored."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            engines = [await stack.enter_async_context(app_engine(place, isolation_level=level)) for _ in range(2)]
            first, second = (open_store(engine, keyring=keyring, **place.options) for engine in engines)
            await first.setup()
            await store_tag(first, "old")

            async def read_under_lock() -> str | None:
                async with second.transaction() as tx:
                    return await load_tag(tx, for_update=True)

            async with first.transaction() as tx:
                assert await load_tag(tx, for_update=True) == "old"
                waiter = asyncio.create_task(read_under_lock())
                await place.until_waiting(second)
                assert not waiter.done()
                await store_tag(tx, "new")
            assert await waiter == "new"

    asyncio.run(main())


@every_level
def test_a_locking_load_in_a_session_of_any_isolation_level_never_returns_old_tokens(
    place: Place, level: str, keyring: Keyring
) -> None:
    """In a transaction that has already read the row, a locking load returns the newest tokens or raises ConflictError.

    In autocommit mode, where no lock would be held, a locking load is refused.
    """

    async def main() -> tuple[str, str | None]:
        async with (
            opened(place, keyring, lock_timeout=1) as other,
            app_engine(place, isolation_level=level) as engine,
            AsyncSession(engine) as session,
            session.begin(),
        ):
            _ = await session.connection()
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            assert await load_tag(store) == "old"
            newest = "new"
            try:
                await store_tag(other, newest)
            except LockTimeoutError:  # at this level a plain read also takes a lock
                assert (place.row.mark, level) == ("mysql", "SERIALIZABLE")
                newest = "old"
            return newest, await load_tag(store, for_update=True)

    if level == "AUTOCOMMIT" and place.row.mark != "sqlite":
        with pytest.raises(UnsupportedOperationError, match=r"autocommit mode.*READ COMMITTED"):
            asyncio.run(main())
        return
    try:
        newest, locked = asyncio.run(main())
    except ConflictError:
        assert level in ("REPEATABLE READ", "SERIALIZABLE")
    else:
        assert locked == newest


@every_level
def test_row_locks_work_at_any_level_in_a_transaction_that_the_store_begins(
    place: Place, level: str, keyring: Keyring
) -> None:
    """Of two sessions that refresh under the lock, the second waits and reads the first one's tokens."""

    async def main() -> None:
        calls = 0

        async def refresh(engine: AsyncEngine) -> str | None:
            nonlocal calls
            async with AsyncSession(engine) as session:
                store = AuthTokenStore(session, keyring=keyring, **place.options)
                if await load_tag(store, for_update=True) == "old":
                    calls += 1
                    await store_tag(store, "new")
            async with AsyncSession(engine) as session:
                return await load_tag(AuthTokenStore(session, keyring=keyring, **place.options))

        async with opened(place, keyring), app_engine(place, isolation_level=level) as engine:
            assert await asyncio.gather(*(refresh(engine) for _ in range(4))) == ["new"] * 4
            assert calls == 1

    asyncio.run(main())
