"""The stores of the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.command_line import ACCESS, REFRESH, on_store
from tokenstore.store import AuthTokenStore


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    """The URL of an empty store on which setup has run."""
    url = f"sqlite:///{tmp_path}/tokens.db"
    on_store(url, lambda store: store.setup())
    return url


@pytest.fixture
def filled(sqlite: str) -> str:
    """The URL of a store with more rows than fit into a pipe."""

    async def fill(store: AuthTokenStore) -> None:
        async with store.transaction() as tx:
            for number in range(1500):
                await tx.store_tokens("github", f"user-{number:04}", ACCESS, REFRESH, None)

    on_store(sqlite, fill)
    return sqlite
