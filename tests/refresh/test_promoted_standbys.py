"""A primary is killed while tokens are refreshed, and its synchronous standby is promoted."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from secrets import token_hex
from signal import SIGKILL

import pytest

from support.cluster_traffic import ClusterTraffic
from support.polling import until
from support.postgres_servers import start_postgres
from tokenstore import Keyring, open_store
from tokenstore.testing.provider import StrictRotatingProvider

_USERS, _ROUNDS = 20, 10


@pytest.mark.soak
@pytest.mark.postgres
def test_a_promoted_synchronous_standby_has_every_pair(keyring: Keyring) -> None:
    """The stores' URLs name both servers. They go on at the new primary, and no refresh token is used twice."""
    # Files, because the memory of a killed server would remain.
    primary = start_postgres(dynamic_shared_memory_type="mmap")
    standby = start_postgres(standby_of=primary)
    # Of every commit the standby has the log before the primary answers.
    primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    primary.execute("SELECT pg_reload_conf()")
    hosts = ",".join(f"{server.host}:{server.port}" for server in (primary, standby))
    table = f"t_{token_hex(8)}"

    def url(driver: str) -> str:
        one_host = primary.url(driver).replace(f"@{primary.host}:{primary.port}", f"@{hosts}")
        return f"{one_host}?table={table}&target_session_attrs=primary"

    def sync_state() -> list[tuple[object, ...]]:
        return primary.execute("SELECT sync_state FROM pg_stat_replication")

    async def main() -> None:
        with StrictRotatingProvider() as provider:
            traffic = ClusterTraffic(provider, _USERS)
            async with asyncio.timeout(120), AsyncExitStack() as stack:
                await until(lambda: sync_state() == [("sync",)])
                stores = [
                    await stack.enter_async_context(
                        open_store(url(driver), keyring=keyring, refreshers={"github": traffic}, connect_timeout=2)
                    )
                    for driver in ("asyncpg", "psycopg", "asyncpg")
                ]
                await stores[0].setup()
                running = asyncio.create_task(traffic.run(stores, _ROUNDS))
                await until(lambda: traffic.rounds >= _USERS)
                with provider.hold():
                    # The new pairs of these refreshes arrive when the primary is dead.
                    requests = provider.stats().requests
                    await asyncio.to_thread(provider.wait_for_requests, requests + _USERS // 2)
                    process = primary._process
                    assert process is not None
                    await asyncio.to_thread(process.stop, SIGKILL)
                    await asyncio.to_thread(standby.execute, "SELECT pg_promote()")
                await running
                for store in stores:
                    await traffic.check(store)
                # Of what the old primary had acknowledged nothing was lost: all tokens can be refreshed again.
                await traffic.run(stores, 1)
                assert provider.stats().reuses == 0

    asyncio.run(main())
