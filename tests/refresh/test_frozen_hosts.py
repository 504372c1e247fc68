"""A database server freezes while the provider answers; the store's URL names another one."""

from __future__ import annotations

import asyncio
import time

import pytest

from support.database import Place
from support.matrix import Row, server_rows
from support.refresh_scene import Scene, scene_of
from support.silent_host import FreezingHost
from tokenstore import Keyring
from tokenstore_sql.connections import pool

_REFRESH_TIMEOUT = 10.0


@server_rows
def test_the_write_of_a_new_pair_goes_to_another_host(
    row: Row, url: str, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pair is stored before the lease ends, so that no other process sends the refresh token a second time."""
    monkeypatch.setattr(pool, "_TRUSTED", 0.0)
    monkeypatch.setattr(pool, "_PING_TIMEOUT", 0.5)
    server = Place(row, url).server()
    at = f"{server.host}:{server.port}"

    async def refreshed(scene: Scene) -> None:
        old = await scene.log_in()
        async with FreezingHost((server.host, server.port)) as host:
            both = url.replace(f"@{at}", f"@{host.address},{at}")
            async with scene.store(old, both, connect_timeout=1, refresh_timeout=_REFRESH_TIMEOUT) as store:
                async with scene.held(store, old["user_id"]) as caller:
                    host.frozen = True
                answered_at = time.monotonic()
                told = await caller
                assert time.monotonic() - answered_at < 1.5 * _REFRESH_TIMEOUT
        await scene.check(old, told)

    async def main() -> None:
        async with scene_of(url, keyring) as scene:
            await refreshed(scene)

    asyncio.run(main())
