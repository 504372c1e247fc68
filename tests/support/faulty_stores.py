"""Stores whose connections can be cut, beside a store that connects directly."""

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
async def faulty_and_direct(url: str, keyring: Keyring) -> AsyncIterator[tuple[Faults, AuthTokenStore]]:
    """Make faults for a new table, and a store that connects to it directly."""
    async with open_store(url, keyring=keyring) as direct, faulty(url) as faults:
        await direct.setup()
        yield faults, direct


@asynccontextmanager
async def connected(faults: Faults, direct: AuthTokenStore, keyring: Keyring) -> AsyncIterator[AuthTokenStore]:
    """Open a store that connects through the faults and has an open connection; the row holds "old"."""
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


def index_of_write(row: Row, statements: list[str]) -> int:
    """Return the index of the statement that commits the write; on a server, the INSERT itself commits."""
    [write] = [at for at, text in enumerate(statements) if text.startswith("INSERT")]
    return write
