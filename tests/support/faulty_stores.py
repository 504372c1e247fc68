"""Stores whose connections are cut, and stores that go round the faults."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from support.connection_faults import Faults, faulty
from support.database import source_of
from support.matrix import ROWS, Row
from support.tagged_tokens import load_tag, store_tag
from tokenstore import AuthTokenStore, Keyring, open_store

DATABASES = [row for row in ROWS if row.shared]
each_cut = pytest.mark.parametrize(
    ("row", "when", "how"),
    [
        pytest.param(row, when, how, id=f"{row.name}-{when}-{how}", marks=getattr(pytest.mark, row.mark))
        for row in DATABASES
        for when in ("before", "after")
        for how in (("reset",) if row.mark == "sqlite" else ("reset", "end"))
    ],
)


@asynccontextmanager
async def two_ways(url: str, keyring: Keyring) -> AsyncIterator[tuple[Faults, AuthTokenStore]]:
    """The faults before a table, and a store that goes round them."""
    async with open_store(url, keyring=keyring) as direct, faulty(url) as faults:
        await direct.setup()
        yield faults, direct


@asynccontextmanager
async def connected(faults: Faults, direct: AuthTokenStore, keyring: Keyring) -> AsyncIterator[AuthTokenStore]:
    """A new store that goes through the faults, with a connection, over a row that holds "old"."""
    await store_tag(direct, "old")
    async with open_store(faults.url, keyring=keyring) as store:
        assert await load_tag(store) == "old"
        yield store
        assert source_of(store).in_use == 0


async def count(faults: Faults, direct: AuthTokenStore, keyring: Keyring, tag: str = "new") -> list[str]:
    async with connected(faults, direct, keyring) as store:
        with faults.counted() as statements:
            await store_tag(store, tag)
    return statements


def place_of_the_write(row: Row, statements: list[str]) -> int:
    """Which statement commits the write: on a server, the write itself."""
    [write] = [at for at, text in enumerate(statements) if text.startswith("INSERT")]
    return write
