"""The database is unavailable, or locked, when the provider answers."""

from __future__ import annotations

import asyncio
import sqlite3

import pytest
from sqlalchemy import make_url

from support.database import Place
from support.matrix import Row, each_database, each_server, sqlite_row
from support.polling import until
from support.refresh_scene import SOAK_TIMEOUT, Scene, checked_out, noted, scene_of, spied
from support.refresh_world import settled
from support.refreshers import pair
from support.store_calls import fresh, load
from tokenstore import AuthTokenStore, BackendUnavailableError, Keyring, TokenRecord, TokensNotStoredError
from tokenstore.refresh.settings import Settings


async def restarted(scene: Scene) -> None:
    """Make the database unavailable when the provider answers, and available again after a write has failed."""
    old = await scene.log_in()
    async with scene.store(old) as store:
        with spied(store) as writes:
            async with scene.held(store, old["user_id"]) as caller:
                scene.go_away()
            await until(lambda: writes.await_count > 1)
            assert not caller.done()
            scene.faults.refuse = False
            told = await caller
        await scene.check(old, told)


@each_database
def test_the_database_restarts_while_the_provider_answers(row: Row, url: str, keyring: Keyring) -> None:
    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            await restarted(scene)

    asyncio.run(main())


@pytest.mark.soak
@each_database
def test_each_of_a_hundred_refreshes_with_a_database_restart_succeeds(row: Row, url: str, keyring: Keyring) -> None:
    async def main() -> None:
        async with scene_of(url, keyring, SOAK_TIMEOUT) as scene:
            for number in range(100):
                with noted(number):
                    await restarted(scene)

    asyncio.run(main())


@pytest.mark.soak
@each_server
def test_a_server_really_restarts_while_the_provider_answers(row: Row, url: str, keyring: Keyring) -> None:
    """The server is available again before the provider answers, or only after that."""
    server = Place(row, url).server()
    process = server._process
    if process is None:
        pytest.skip("the tests cannot restart a server that was named by URL")

    async def main() -> None:
        async with scene_of(url, keyring, SOAK_TIMEOUT) as scene:
            for number in range(4):
                old = await scene.log_in()
                async with scene.store(old, url) as store:
                    with noted(number), spied(store) as writes:
                        async with scene.held(store, old["user_id"]) as caller:
                            await asyncio.to_thread(process.stop)
                            if number % 2:
                                await asyncio.to_thread(process.start, server._ask_version)
                        if not number % 2:
                            await until(lambda: writes.await_count > 1)
                            assert not caller.done()
                            await asyncio.to_thread(process.start, server._ask_version)
                        told = await caller
                    await scene.check(old, told)

    asyncio.run(main())


@sqlite_row
@pytest.mark.parametrize("lock_timeout", [0.1, 10.0], ids=["brief", "lasting"])
def test_tokens_are_stored_after_another_writer_has_released_the_file(
    row: Row, url: str, lock_timeout: float, keyring: Keyring
) -> None:
    """The other writer holds SQLite's file for a longer or shorter time than ``lock_timeout``."""

    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            old = await scene.log_in()
            other = sqlite3.connect(make_url(url).database or "", isolation_level=None)
            async with scene.store(old, lock_timeout=lock_timeout) as store:
                with spied(store) as writes:
                    async with scene.held(store, old["user_id"]) as caller:
                        other.execute("BEGIN IMMEDIATE")
                    await until(lambda: writes.await_count > (lock_timeout < 1))
                    await until(lambda: checked_out(store) > 0)
                    assert not caller.done()
                    other.close()
                    told = await caller
                assert writes.await_count == 1 or lock_timeout < 1
                await scene.check(old, told)

    asyncio.run(main())


@pytest.fixture
def _brief_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let callers get the error half a second after the provider's answer. All other limits stay as they are."""
    monkeypatch.setattr(Settings, "save", 0.5)


@each_database
@pytest.mark.usefixtures("_brief_writes")
def test_the_error_for_tokens_that_cannot_be_stored_contains_them(row: Row, url: str, keyring: Keyring) -> None:
    """When the database is available again, the same pair is stored without another call of the provider."""

    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            old = await scene.log_in()
            user = old["user_id"]
            async with scene.store(old) as store:
                scene.recorder.answered = scene.go_away
                with pytest.raises(TokensNotStoredError) as caught:
                    await fresh(store, user)
                scene.recorder.answered = lambda: None
                record = caught.value.record
                assert pair(record) == pair(scene.recorder.issued[user][0])
                assert await load(scene.direct, user) == old
                with pytest.raises(BackendUnavailableError):
                    await fresh(store, user)
                scene.faults.refuse = False
                await settled(store)
                assert pair(await fresh(store, user)) == pair(record)
                await scene.check(old, record)

    asyncio.run(main())


@each_database
@pytest.mark.usefixtures("_brief_writes")
def test_closing_without_a_database_raises_an_error_with_the_tokens(row: Row, url: str, keyring: Keyring) -> None:
    """``aclose()`` and the callers get the tokens, whether the callers still wait or already got an error."""

    async def main() -> None:
        async with scene_of(url, keyring) as scene:

            async def closed(old: TokenRecord, store: AuthTokenStore, caller: asyncio.Task[TokenRecord]) -> None:
                with pytest.raises(TokensNotStoredError) as by_closing:
                    await store.aclose()
                with pytest.raises(TokensNotStoredError) as by_calling:
                    await caller
                [record] = by_closing.value.records
                [issued] = scene.recorder.issued[old["user_id"]]
                assert pair(record) == pair(by_calling.value.record) == pair(issued)
                assert checked_out(store) == 0
                assert await load(scene.direct, old["user_id"]) == old
                # The caller can store the tokens from the error's record.
                times = record["access_token_expires_at"], record["refresh_token_expires_at"]
                await scene.direct.store_tokens("github", old["user_id"], *pair(record), *times)
                await scene.check(old, record)

            olds = [await scene.log_in() for _ in range(2)]
            stores = [await scene.open(old) for old in olds]
            with spied(stores[0]) as writes:
                with scene.provider.hold():
                    pairs = zip(stores, olds, strict=True)
                    callers = [asyncio.create_task(fresh(store, old["user_id"])) for store, old in pairs]
                    await asyncio.to_thread(scene.provider.wait_for_requests, 2)
                    scene.go_away()
                await until(lambda: writes.await_count > 0)
            first = asyncio.create_task(closed(olds[0], stores[0], callers[0]))
            await asyncio.wait(callers[1:])
            await closed(olds[1], stores[1], callers[1])
            await first

    asyncio.run(main())
