"""No error of a call on metadata keeps metadata, a token or a key in the local variables of tokenstore's own frames."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Iterator
from typing import Any

import pytest

from support.frame_walk import Walk
from support.matrix import Row, server_rows
from tokenstore import AuthTokenStore, Keyring, open_store
from tokenstore.records import MAX_TOKEN_BYTES, NO_METADATA, SealedMetadata, TokenKey
from tokenstore.sealing import Sealer
from tokenstore_memory import MemoryBackend

NOTE, TOKEN = "NT-5f0c-planted", "AT-91be-planted"
KEY, OTHER_KEY = bytes(range(101, 133)), bytes(range(133, 165))
ME = ("github", "u1")


@pytest.fixture
def walk() -> Iterator[Walk]:
    """Fails if no error path was walked."""
    walk = Walk((NOTE, TOKEN, KEY, OTHER_KEY))
    yield walk
    assert walk.paths


def _keyring() -> Keyring:
    return Keyring({"first": KEY, "second": OTHER_KEY})


async def _exhaust(entries: AsyncIterable[object]) -> None:
    async for _ in entries:
        pass


def test_arguments(walk: Walk) -> None:
    """Also those that exceed a limit only together with the fields that are stored."""

    async def main() -> None:
        store = open_store("memory://", keyring=_keyring())
        bad: list[Any] = [
            {"note": {NOTE}},
            {7: NOTE},
            [NOTE],
            {"note": NOTE * 20_000},
            {"note": NOTE, "a": float("nan")},
        ]
        await store.store_tokens(*ME, TOKEN, TOKEN, None, metadata={"other": NOTE})
        wide = {"note": "x" * (MAX_TOKEN_BYTES - len('{"note":""}'))}
        async with store.transaction() as tx:
            for target in (store, tx):
                await walk.wait("update", target.update_metadata(*ME, wide))
                for value in bad:
                    await walk.wait("update", target.update_metadata(*ME, value))
                    await walk.wait("store", target.store_tokens(*ME, TOKEN, TOKEN, None, metadata=value))
                    response = {"access_token": TOKEN}
                    await walk.wait("login", target.store_token_response(*ME, response, metadata=value))
        await store.aclose()
        await walk.wait("closed", store.update_metadata(*ME, {"note": NOTE}))

    asyncio.run(main())


def test_metadata_that_does_not_open(walk: Walk) -> None:
    """Of an unknown key, altered, and sealed by another program as text that is no JSON object."""

    async def main() -> None:
        backend, key = MemoryBackend(), TokenKey(*ME)
        store = AuthTokenStore(backend=backend, keyring=_keyring())
        await store.store_tokens(*ME, TOKEN, TOKEN, None, metadata={"note": NOTE})
        good = Sealer(_keyring()).seal_metadata(key, f'["{NOTE}"]')
        assert good.value is not None
        for name, bad in {
            "no object": good,
            "no JSON": Sealer(_keyring()).seal_metadata(key, NOTE),
            "altered": SealedMetadata(good.value[:-1] + b"\0", good.key_id),
            "another key's name": SealedMetadata(good.value, "second"),
            "an impossible name": SealedMetadata(good.value, ""),
            "unknown key": Sealer(Keyring({"other": OTHER_KEY})).seal_metadata(key, NOTE),
        }.items():
            row = await backend.get(key)
            assert row is not None
            assert await backend.set_metadata(key, bad, replacing=row.metadata.value)
            await walk.wait(f"load, {name}", store.load_tokens(*ME))
            await walk.wait(f"update, {name}", store.update_metadata(*ME, {"other": NOTE}))
            await walk.wait(f"reseal, {name}", store.reseal_tokens(*ME))
            await walk.wait(f"list, {name}", _exhaust(store.list_tokens(with_metadata=True)))
            async with store.transaction() as tx:
                await walk.wait(f"transaction, {name}", tx.update_metadata(*ME, {"other": NOTE}))
            record = await store.store_token_response(*ME, {"access_token": TOKEN})
            assert record["metadata"] == {}
        row = await backend.get(key)
        assert row is not None
        assert await backend.set_metadata(key, NO_METADATA, replacing=row.metadata.value)
        await store.load_tokens(*ME)

    asyncio.run(main())


@server_rows
def test_a_missing_table(walk: Walk, row: Row, url: str) -> None:
    async def main() -> None:
        async with open_store(url, keyring=_keyring()) as store:
            await walk.wait("update", store.update_metadata(*ME, {"note": NOTE}))
            await walk.wait("store", store.store_tokens(*ME, TOKEN, TOKEN, None, metadata={"note": NOTE}))
            await walk.wait("list", _exhaust(store.list_tokens(with_metadata=True)))

    asyncio.run(main())
