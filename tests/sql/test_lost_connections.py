"""Cut connections: a write has taken effect completely or not at all, and a read is retried."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest

from support.connection_faults import How, When
from support.faulty_stores import connected, count, each_cut, faulty_and_direct, index_of_write
from support.matrix import Row, shared_rows
from support.tagged_tokens import load_tag, store_tag
from tokenstore import AuthTokenStore, BackendUnavailableError, Keyring


@each_cut
def test_a_write_cut_before_a_statement_is_not_stored_and_one_cut_after_it_is(
    row: Row, url: str, when: When, how: How, keyring: Keyring
) -> None:
    """The connection is cut at each statement in turn; afterwards the store works on a new connection."""

    async def main() -> None:
        async with faulty_and_direct(url, keyring) as (faults, direct):
            clean = await count(faults, direct, keyring)
            write = index_of_write(row, clean)
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
                            assert at != write, "the caller was told that the cut write succeeded"
                    assert cut.happened
                    assert cut.statements[: at + 1] == clean[: at + 1]
                    assert await load_tag(direct) == told, (at, statement)
                    if row.mark == "sqlite" and statement == "COMMIT":
                        with suppress(BackendUnavailableError):  # raised if a dead connection was kept in the pool
                            await load_tag(store)
                    assert await load_tag(store) == told
                    await store_tag(store, "later")
                    assert await load_tag(direct) == "later"

    asyncio.run(main())


@shared_rows
def test_calls_succeed_after_all_idle_connections_were_cut(row: Row, url: str, keyring: Keyring) -> None:
    """Dead connections are replaced before a write is sent over them; a read over a dead connection is retried."""

    async def main() -> None:
        async with faulty_and_direct(url, keyring) as (faults, direct), connected(faults, direct, keyring) as store:
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
def test_a_read_of_several_rows_is_retried_if_its_connection_is_dead(
    row: Row, url: str, keyring: Keyring, call: Callable[[AuthTokenStore], Awaitable[int]], when: When, how: How
) -> None:
    """The idle connection looks alive; only its first statement fails."""

    async def main() -> None:
        async with faulty_and_direct(url, keyring) as (faults, direct), connected(faults, direct, keyring) as store:
            expiry = datetime.now(UTC) + timedelta(hours=1)
            await direct.store_tokens("github", "u1", "old", "refresh", expiry)
            with faults.cut(0, when, how) as cut:
                assert await call(store) == 1
            assert cut.happened

    asyncio.run(main())
