"""The store's values as a key-value store, as the package that defines the protocol uses it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from key_value.aio.adapters.pydantic import PydanticAdapter
from key_value.aio.protocols import AsyncKeyValue
from key_value.aio.wrappers.prefix_collections import PrefixCollectionsWrapper
from pydantic import BaseModel

from tokenstore import InvalidInputError, Keyring, TamperedError, open_store
from tokenstore.integrations.key_value import StoreKeyValue

_KEYRING = Keyring({"k1": bytes(32)})


class _Client(BaseModel):
    client_id: str
    redirect_uris: list[str]


def _run(path: Path, test: Callable[[StoreKeyValue], Coroutine[None, None, None]]) -> None:
    async def run() -> None:
        async with open_store(f"sqlite:///{path / 'tokens.db'}", keyring=_KEYRING) as store:
            await store.setup()
            await test(StoreKeyValue(store))

    asyncio.run(run())


def test_it_is_what_the_package_asks_for(tmp_path: Path) -> None:
    async def test(values: StoreKeyValue) -> None:
        assert isinstance(values, AsyncKeyValue)
        typed: AsyncKeyValue = values
        clients = PydanticAdapter[_Client](PrefixCollectionsWrapper(typed, prefix="app"), _Client)
        registered = _Client(client_id="c1", redirect_uris=["https://example.com/callback"])
        await clients.put("c1", registered, collection="clients", ttl=60)
        assert await clients.get("c1", collection="clients") == registered
        assert await values.get("c1", collection="clients") is None

    _run(tmp_path, test)


def test_values_of_collections_are_apart(tmp_path: Path) -> None:
    async def test(values: StoreKeyValue) -> None:
        await values.put("k", {"n": 1})
        await values.put("k", {"n": 2}, collection="other")
        assert (await values.get("k"), await values.get("k", collection="other")) == ({"n": 1}, {"n": 2})
        assert await values.delete("k") is True
        assert await values.delete("k") is False
        assert await values.ttl("k") == (None, None)
        assert await values.ttl("k", collection="other") == ({"n": 2}, None)

    _run(tmp_path, test)


def test_the_time_to_live_counts_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_900_000_000.0
    monkeypatch.setattr("tokenstore.integrations.key_value.time.time", lambda: now)

    async def test(values: StoreKeyValue) -> None:
        nonlocal now
        await values.put("k", {"n": 1}, ttl=3600)
        now += 600
        assert await values.ttl("k") == ({"n": 1}, 3000.0)
        await values.put("k", {"n": 2})  # without an end, as it was put last
        assert await values.ttl("k") == ({"n": 2}, None)
        with pytest.raises(InvalidInputError, match="ttl"):
            await values.put("k", {"n": 3}, ttl=0)

    _run(tmp_path, test)


def test_several_at_once(tmp_path: Path) -> None:
    async def test(values: StoreKeyValue) -> None:
        await values.put_many(["a", "b"], [{"n": 1}, {"n": 2}], collection="c", ttl=60)
        assert await values.get_many(["b", "none", "a"], collection="c") == [{"n": 2}, None, {"n": 1}]
        [(_, left), nothing] = await values.ttl_many(["a", "none"], collection="c")
        assert left is not None
        assert 0 < left <= 60
        assert nothing == (None, None)
        with pytest.raises(InvalidInputError, match="2 keys and 1 values"):
            await values.put_many(["x", "y"], [{}], collection="c")
        assert await values.get("x", collection="c") is None
        assert await values.delete_many(["a", "none", "b"], collection="c") == 2

    _run(tmp_path, test)


@pytest.mark.parametrize("length", [512, 513, 4000])
def test_keys_of_any_length_stay_apart(length: int, tmp_path: Path) -> None:
    async def test(values: StoreKeyValue) -> None:
        one, other = "x" * length, "x" * (length - 1) + "y"
        await values.put(one, {"n": 1})
        await values.put(other, {"n": 2})
        assert await values.get_many([one, other]) == [{"n": 1}, {"n": 2}]

    _run(tmp_path, test)


def test_a_key_that_looks_like_a_hash_reads_no_other_value(tmp_path: Path) -> None:
    async def test(values: StoreKeyValue) -> None:
        await values.put("x" * 600, {"n": 1})
        store = values._store
        [entry] = [entry async for entry in store.list_values()]
        assert entry["name"].startswith("sha256:")
        assert await values.get(entry["name"]) is None

    _run(tmp_path, test)


@pytest.mark.parametrize("key", ["", "a\0b", "\ud800"])
def test_a_key_that_no_database_keeps_is_refused(key: str, tmp_path: Path) -> None:
    async def test(values: StoreKeyValue) -> None:
        with pytest.raises(InvalidInputError):
            await values.put(key, {"n": 1})

    _run(tmp_path, test)


def test_values_are_sealed_and_bound_to_their_key(tmp_path: Path) -> None:
    async def test(values: StoreKeyValue) -> None:
        await values.put("k1", {"client_secret": "hush-hush"})
        await values.put("k2", {"client_secret": "other"})

    _run(tmp_path, test)
    assert b"hush" not in (tmp_path / "tokens.db").read_bytes()
    with sqlite3.connect(tmp_path / "tokens.db", isolation_level=None) as connection:
        [sealed] = connection.execute("SELECT value FROM oauth_tokens_values WHERE name = 'k1'").fetchone()
        connection.execute("UPDATE oauth_tokens_values SET value = ? WHERE name = 'k2'", [sealed])
    connection.close()

    async def read(values: StoreKeyValue) -> None:
        with pytest.raises(TamperedError):
            await values.get("k2")

    _run(tmp_path, read)


def test_what_is_not_json_is_refused(tmp_path: Path) -> None:
    async def test(values: StoreKeyValue) -> None:
        wrong: dict[str, Any] = {"when": object()}
        with pytest.raises(InvalidInputError):
            await values.put("k", wrong)
        assert await values.get("k") is None

    _run(tmp_path, test)
