"""The provider is slow or unavailable."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta

import pytest

from support.matrix import Row, each_database
from support.polling import until
from support.refresh_scene import DUE, Scene, checked_out, scene_of
from support.refresh_world import settled
from support.refreshers import pair
from support.store_calls import fresh, load
from tokenstore import Keyring
from tokenstore.records import TokenKey

HOUR = 3600.0
# Seconds after which the provider wants to be called again.
RETRY = 0.2


@each_database
def test_while_the_provider_is_slow_the_database_is_free(row: Row, url: str, keyring: Keyring) -> None:
    """Two hundred callers wait for one response and hold no connection; other callers read and write meanwhile."""

    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            old = await scene.log_in()
            user = old["user_id"]
            async with scene.store(old, url, pool_size=10) as store:
                async with scene.held(store, user) as caller:
                    callers = [caller, *(asyncio.create_task(fresh(store, user)) for _ in range(199))]
                    attempt = store._engine._attempts[TokenKey("github", user)]
                    await until(lambda: attempt.report.joined == 199)
                    for number in range(10):
                        assert checked_out(store) == 0
                        assert await asyncio.gather(*(load(store, user) for _ in range(10))) == [old] * 10
                        assert checked_out(store) == 0
                        expires_at = datetime.now(UTC) + timedelta(seconds=HOUR)
                        other = (f"other{number}", "access", "refresh")
                        await store.store_tokens("github", *other, expires_at)
                        assert pair(await fresh(store, other[0])) == other[1:]
                    assert checked_out(store) == 0
                    assert scene.provider.stats().in_flight == 1
                    assert not any(caller.done() for caller in callers)
                told = await asyncio.gather(*callers)
                assert len({pair(record) for record in told}) == 1
                await scene.check(old, told[0])

    asyncio.run(main())


async def outage(scene: Scene, seconds: float) -> None:
    """Make the provider unavailable for so many seconds, and until it was called three times."""
    old = await scene.log_in(DUE)
    user = old["user_id"]
    async with scene.store(old, scene.url) as store:
        scene.recorder.retry_after = RETRY
        scene.provider.outage = True
        began = time.monotonic()
        while scene.provider.stats().requests < 3 or time.monotonic() - began < seconds:
            for record in await asyncio.gather(*(fresh(store, user) for _ in range(10))):
                assert pair(record) == pair(old)
        asked = scene.provider.stats().requests
        assert asked <= 1 + (time.monotonic() - began) / RETRY
        scene.provider.outage = False
        while pair(record := await fresh(store, user)) == pair(old):
            pass
        assert scene.provider.stats().requests <= asked + 2, (
            "more requests than one that was already sent and one that succeeded"
        )
        await settled(store)
        await scene.check(old, record)


@each_database
def test_an_outage_of_the_provider_within_the_margin_raises_no_error(row: Row, url: str, keyring: Keyring) -> None:
    """All callers get the token that is still valid. The provider is not called before its retry time."""

    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            await outage(scene, 0)

    asyncio.run(main())


@pytest.mark.soak
@each_database
def test_an_outage_of_ten_seconds_within_the_margin_raises_no_error(row: Row, url: str, keyring: Keyring) -> None:
    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            await outage(scene, 10)

    asyncio.run(main())
