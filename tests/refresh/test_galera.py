"""Refreshes on a Galera cluster of three nodes: one call of the provider for each expiry, whatever becomes of a node.

Row locks are local to a node, and reads of another node may be out of date. The compare-and-set of a lease is not: of
two nodes that change one row at once, the cluster lets one win.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from secrets import token_hex
from signal import SIGCONT, SIGKILL, SIGSTOP

import pytest

from support import servers
from support.cluster_traffic import ClusterTraffic
from support.galera import start_galera, until_synced
from support.polling import until
from support.server_processes import Process
from support.store_calls import load
from support.tagged_tokens import load_tag, store_tag
from tokenstore import AuthTokenStore, BackendUnavailableError, Keyring, open_store
from tokenstore.testing.provider import StrictRotatingProvider

_USERS, _ROUNDS = 20, 5


@pytest.mark.soak
@pytest.mark.mysql
def test_a_galera_cluster_calls_the_provider_once_for_each_expiry_and_survives_the_loss_of_a_node(
    keyring: Keyring,
) -> None:
    """All parts on one cluster, because its start takes most of the time."""
    nodes = start_galera()

    async def main() -> None:
        async with asyncio.timeout(240):
            with StrictRotatingProvider() as provider:
                await _without_faults(nodes, keyring, ClusterTraffic(provider, _USERS))
            await _with_causal_reads(nodes, keyring)
            with StrictRotatingProvider() as provider:
                await _with_a_frozen_node(nodes, keyring, ClusterTraffic(provider, _USERS))
            with StrictRotatingProvider() as provider:
                await _with_a_killed_node(nodes, keyring, ClusterTraffic(provider, _USERS))
            await _without_quorum(nodes, keyring)

    asyncio.run(main())


def _url(table: str, driver: str, *nodes: servers.Server, options: str = "") -> str:
    hosts = ",".join(f"{node.host}:{node.port}" for node in nodes)
    url = nodes[0].url(driver).replace(f"@{nodes[0].host}:{nodes[0].port}", f"@{hosts}")
    return f"{url}?table={table}{options}"


async def _stores(
    stack: AsyncExitStack, urls: list[str], keyring: Keyring, traffic: ClusterTraffic
) -> list[AuthTokenStore]:
    stores = [
        await stack.enter_async_context(
            open_store(url, keyring=keyring, refreshers={"github": traffic}, connect_timeout=2)
        )
        for url in urls
    ]
    await stores[0].setup()
    return stores


async def _without_faults(nodes: list[servers.Server], keyring: Keyring, traffic: ClusterTraffic) -> None:
    """A hundred expiries, seen by one store on each node: a hundred calls of the provider, and no reuse."""
    table = f"t_{token_hex(8)}"
    drivers = ("aiomysql", "asyncmy", "aiomysql")
    async with AsyncExitStack() as stack:
        urls = [_url(table, driver, node) for driver, node in zip(drivers, nodes, strict=True)]
        stores = await _stores(stack, urls, keyring, traffic)
        await traffic.run(stores, _ROUNDS)
        stats = traffic.provider.stats()
        assert (stats.requests, stats.refreshes, stats.reuses) == (_USERS * _ROUNDS, _USERS * _ROUNDS, 0)
        assert traffic.failures == 0
        for store in stores:
            await traffic.check(store)


async def _with_causal_reads(nodes: list[servers.Server], keyring: Keyring) -> None:
    """With `wsrep_sync_wait=1`, a load on one node sees each write that a store on another node has made."""
    table = f"t_{token_hex(8)}"
    for node in nodes:
        node.execute("SET GLOBAL wsrep_sync_wait = 1")
    try:
        async with (
            open_store(_url(table, "asyncmy", nodes[0]), keyring=keyring) as first,
            open_store(_url(table, "aiomysql", nodes[1]), keyring=keyring) as second,
        ):
            await first.setup()
            for number in range(200):
                await store_tag(first, f"tag {number}")
                assert await load_tag(second) == f"tag {number}"
    finally:
        for node in nodes:
            node.execute("SET GLOBAL wsrep_sync_wait = 0")


async def _with_a_frozen_node(nodes: list[servers.Server], keyring: Keyring, traffic: ClusterTraffic) -> None:
    """The node is expelled, and comes back later, with the statements that it had received before.

    Until it is expelled, no node of the cluster can commit.
    """

    async def freeze() -> None:
        _process(nodes[0]).signal(SIGSTOP)

    async def thaw() -> None:
        await asyncio.to_thread(until_synced, nodes[1], len(nodes) - 1)
        rounds = traffic.rounds
        await until(lambda: traffic.rounds >= rounds + _USERS)
        _process(nodes[0]).signal(SIGCONT)
        await asyncio.to_thread(until_synced, nodes[0], len(nodes))

    await _with_a_lost_node(nodes, keyring, traffic, freeze, thaw, options="&statement_timeout=2")


async def _with_a_killed_node(nodes: list[servers.Server], keyring: Keyring, traffic: ClusterTraffic) -> None:
    await _with_a_lost_node(nodes, keyring, traffic, lambda: _kill(nodes[0]))


async def _with_a_lost_node(
    nodes: list[servers.Server],
    keyring: Keyring,
    traffic: ClusterTraffic,
    lose: Callable[[], Awaitable[None]],
    regain: Callable[[], Awaitable[None]] | None = None,
    *,
    options: str = "",
) -> None:
    """Each store's URL names all nodes, beginning with another one. The stores go on, and lose nothing."""
    table = f"t_{token_hex(8)}"
    async with AsyncExitStack() as stack:
        orders = [nodes, [*nodes[1:], nodes[0]], [nodes[2], *nodes[:2]]]
        drivers = ("asyncmy", "aiomysql", "asyncmy")
        urls = [_url(table, driver, *order, options=options) for driver, order in zip(drivers, orders, strict=True)]
        stores = await _stores(stack, urls, keyring, traffic)
        running = asyncio.create_task(traffic.run(stores, 3 * _ROUNDS))
        await until(lambda: traffic.rounds >= _USERS)
        with traffic.provider.hold():
            # Each of the stores has refreshes under way, whose new pairs arrive when the node is lost.
            requests = traffic.provider.stats().requests
            await asyncio.to_thread(traffic.provider.wait_for_requests, requests + _USERS // 2)
            await lose()
        if regain is not None:
            await regain()
        await running
        for store in stores:
            await traffic.check(store)
        # Of what the lost node had acknowledged nothing was lost: each user's tokens can be refreshed again.
        await traffic.run(stores, 1)
        assert traffic.provider.stats().reuses == 0


async def _kill(node: servers.Server) -> None:
    await asyncio.to_thread(_process(node).stop, SIGKILL)


def _process(node: servers.Server) -> Process:
    assert node._process is not None
    return node._process


async def _without_quorum(nodes: list[servers.Server], keyring: Keyring) -> None:
    """The last node of three refuses to serve: its error says that the database is not available."""
    table = f"t_{token_hex(8)}"
    async with open_store(_url(table, "asyncmy", nodes[2]), keyring=keyring) as store:
        await store.setup()
        await store.store_tokens("github", "u1", "old", None, None)
        await _kill(nodes[1])
        for call in (
            lambda: load(store),
            lambda: store.store_tokens("github", "u1", "new", None, datetime.now(UTC)),
        ):
            assert await _first_error(call) == "1047"
        # So does a new connection: a node without quorum is passed over.
        async with open_store(_url(table, "asyncmy", nodes[2], nodes[0]), keyring=keyring) as other:
            with pytest.raises(BackendUnavailableError):
                await load(other)


async def _first_error(call: Callable[[], Awaitable[object]]) -> str | None:
    """Repeat a call until it fails, and return the error's code."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            await call()
        except BackendUnavailableError as error:
            return error.code
        await asyncio.sleep(0.05)
    return None
