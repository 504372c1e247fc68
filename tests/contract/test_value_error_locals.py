"""No error of a call on values keeps a value or a key in the local variables of tokenstore's own frames."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from support.frame_walk import Walk
from support.matrix import Row, server_rows
from tokenstore import AuthTokenStore, Keyring, open_store
from tokenstore.sealing import Sealer
from tokenstore.value_records import ValueKey
from tokenstore_memory import MemoryBackend

VERIFIER = "VF-5f0c-planted"
KEY, OTHER_KEY = bytes(range(101, 133)), bytes(range(133, 165))
PLACE = ValueKey("login", "state")


@pytest.fixture
def walk() -> Iterator[Walk]:
    """Fails if no error path was walked."""
    walk = Walk((VERIFIER, KEY, OTHER_KEY))
    yield walk
    assert walk.paths


def _keyring() -> Keyring:
    return Keyring({"first": KEY, "second": OTHER_KEY})


async def _exhaust(entries: AsyncIterable[object]) -> None:
    async for _ in entries:
        pass


def test_arguments(walk: Walk) -> None:
    async def main() -> None:
        store = open_store("memory://", keyring=_keyring())
        values: list[Any] = [
            {"verifier": {VERIFIER}},
            {7: VERIFIER},
            [VERIFIER, float("nan")],
            VERIFIER.encode(),
            VERIFIER * 20_000,
        ]
        for value in values:
            await walk.wait("value", store.put_value("login", "state", value))
        await walk.wait("namespace", store.put_value("", "state", VERIFIER))
        await walk.wait("name", store.put_value("login", "\0", VERIFIER))
        await walk.wait("ttl", store.put_value("login", "state", VERIFIER, ttl=-1))
        await store.aclose()
        await walk.wait("closed", store.put_value("login", "state", VERIFIER))

    asyncio.run(main())


def test_values_that_do_not_open(walk: Walk) -> None:
    """Of an unknown key, altered, and sealed by another program as text that is no JSON."""

    async def main() -> None:
        backend = MemoryBackend()
        store = AuthTokenStore(backend=backend, keyring=_keyring())
        stranger = AuthTokenStore(backend=backend, keyring=Keyring({"other": OTHER_KEY}))
        await store.put_value(*PLACE, VERIFIER)
        for call in (stranger.get_value, stranger.reseal_value, stranger.pop_value):
            await walk.wait("unknown key", call(*PLACE))
        good = Sealer(_keyring()).seal_value(PLACE, VERIFIER)  # without quotes
        for name, bad in {
            "no JSON": good,
            "altered": replace(good, sealed=good.sealed[:-1] + b"\0"),
            "another key's name": replace(good, key_id="second"),
            "an impossible name": replace(good, key_id=""),
        }.items():
            for call in (store.get_value, store.pop_value):
                await backend.put_value(PLACE, bad, ttl=None)
                await walk.wait(name, call(*PLACE))
        await backend.put_value(PLACE, replace(good, key_id=""), ttl=None)
        await walk.wait("list", _exhaust(store.list_values()))

    asyncio.run(main())


@server_rows
def test_a_missing_table(walk: Walk, row: Row, url: str) -> None:
    async def main() -> None:
        async with open_store(url, keyring=_keyring()) as store:
            await walk.wait("put", store.put_value("login", "state", VERIFIER))
            await walk.wait("get", store.get_value("login", "state"))
            await walk.wait("pop", store.pop_value("login", "state"))

    asyncio.run(main())
