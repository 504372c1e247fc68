"""A write whose connection is cut has happened or has not; a read is sent again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest

from support.connection_faults import How, When
from support.faulty_stores import connected, count, each_cut, place_of_the_write, two_ways
from support.matrix import Row, shared_rows
from support.tagged_tokens import load_tag, store_tag
from tokenstore import AuthTokenStore, BackendUnavailableError, Keyring


@each_cut
def test_a_write_that_is_cut_at_each_statement(row: Row, url: str, when: When, how: How, keyring: Keyring) -> None:
    """Before the write it has not happened, after it has, whatever the caller is told; the store goes on working."""

    async def main() -> None:
        async with two_ways(url, keyring) as (faults, direct):
            clean = await count(faults, direct, keyring)
            write = place_of_the_write(row, clean)
            for at, statement in enumerate(clean):
                async with connected(faults, direct, keyring) as store:
                    told = "new"
                    with faults.cut(at, when, how) as cut:
                        try:
                            await store_tag(store, "new")
                        except BackendUnavailableError:
                            told = "old" if at < write or (at == write and when == "before") else "new"
                            assert await load_tag(direct) == told, (at, statement)
                        else:
                            assert at != write, "nobody may be told that this write went well"
                    assert cut.happened
                    assert cut.statements[: at + 1] == clean[: at + 1]
                    assert await load_tag(direct) == told, (at, statement)
                    if row.mark == "sqlite" and statement == "COMMIT":
                        with suppress(BackendUnavailableError):  # from a connection that should not have been kept
                            await load_tag(store)
                    assert await load_tag(store) == told
                    await store_tag(store, "later")
                    assert await load_tag(direct) == "later"

    asyncio.run(main())


@shared_rows
def test_cutting_all_connections(row: Row, url: str, keyring: Keyring) -> None:
    """Dead connections are replaced before anything is sent over them; a read that meets one is sent again."""

    async def main() -> None:
        async with two_ways(url, keyring) as (faults, direct), connected(faults, direct, keyring) as store:
            faults.cut_all()
            assert await load_tag(store) == "old"
            await store_tag(store, "new")
            assert await load_tag(direct) == "new"

    asyncio.run(main())


async def _list(store: AuthTokenStore) -> int:
    return len([entry async for entry in store.list_tokens()])


async def _load_two(store: AuthTokenStore) -> int:
    records = await asyncio.gather(*(store.load_tokens("github", user) for user in ("u1", "nobody")))
    return len([record for record in records if record is not None])


async def _refresh_due(store: AuthTokenStore) -> int:
    async def refresh(_: object) -> dict[str, object]:
        return {"access_token": "fresh", "expires_in": 3600}

    return len([result async for result in store.refresh_due(within=86400, provider="github", refresh=refresh)])


@pytest.mark.parametrize("call", [_list, _load_two, _refresh_due])
@each_cut
def test_a_read_of_several_rows_that_meets_a_dead_connection_is_sent_again(
    row: Row, url: str, keyring: Keyring, call: Callable[[AuthTokenStore], Awaitable[int]], when: When, how: How
) -> None:
    """An idle connection that looked alive: its first statement finds out that it is dead."""

    async def main() -> None:
        async with two_ways(url, keyring) as (faults, direct), connected(faults, direct, keyring) as store:
            expiry = datetime.now(UTC) + timedelta(hours=1)
            await direct.store_tokens("github", "u1", "old", "refresh", expiry)
            with faults.cut(0, when, how) as cut:
                assert await call(store) == 1
            assert cut.happened

    asyncio.run(main())
