"""A database file that does not exist: `setup` alone creates one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from support.database import Place
from support.tagged_tokens import load_tag, store_in_transaction, store_tag
from tokenstore import AuthTokenStore, BackendError, ConfigurationError, Keyring, TableMissingError, open_store

pytestmark = pytest.mark.sqlite


async def _list(store: AuthTokenStore) -> list[object]:
    return [entry async for entry in store.list_tokens()]


@pytest.mark.parametrize(
    "call",
    [load_tag, lambda store: store_tag(store, "new"), store_in_transaction, _list],
    ids=["load", "store", "transaction", "list"],
)
def test_only_setup_creates_the_file(
    place: Place, path: Path, call: Callable[[AuthTokenStore], Coroutine[Any, Any, object]], keyring: Keyring
) -> None:
    """A mistyped path is told, with what to do, and leaves nothing behind."""

    async def main() -> None:
        async with open_store(place.url, keyring=keyring) as store:
            with pytest.raises(TableMissingError, match=f"there is no database file {path}: check the path"):
                await call(store)
            assert list(path.parent.iterdir()) == []
            await store.setup()
            await store_tag(store, "new")
            assert await load_tag(store) == "new"

    asyncio.run(main())


def test_a_missing_folder_is_named(path: Path, keyring: Keyring) -> None:
    folder = path.parent / "no folder"

    async def main() -> None:
        async with open_store(f"sqlite:///{folder}/tokens.db", keyring=keyring) as store:
            with pytest.raises(ConfigurationError, match=f"the folder {folder} does not exist"):
                await store.setup()
            with pytest.raises(TableMissingError, match="no folder"):
                await load_tag(store)

    asyncio.run(main())


def test_a_log_without_its_file_is_not_deleted(place: Place, path: Path, keyring: Keyring) -> None:
    """SQLite deletes the log of a database that was moved without it, as soon as a new file is there."""
    log = Path(f"{path}-wal")
    log.write_bytes(b"the last commits")

    async def main() -> None:
        async with open_store(place.url, keyring=keyring) as store:
            with pytest.raises(BackendError, match=r"without its write-ahead log, tokens\.db-wal"):
                await store.setup()

    asyncio.run(main())
    assert log.read_bytes() == b"the last commits"
    assert not path.exists()


@pytest.mark.parametrize("name", ["a b.db", "100%.db", "what?.db", "one#two.db", "größe.db"])
def test_names_that_a_uri_has_to_quote(path: Path, name: str, keyring: Keyring) -> None:
    file = path.with_name(name)
    url = f"sqlite:///{file}".replace("%", "%25").replace("?", "%3F")

    async def main() -> None:
        async with open_store(url, keyring=keyring) as store:
            await store.setup()
            await store_tag(store, "new")
            assert await load_tag(store) == "new"

    asyncio.run(main())
    assert {found.name for found in path.parent.iterdir()} == {name}
