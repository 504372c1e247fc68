"""The loop thread ends after each test: otherwise it would be reported as left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.matrix import Row
from support.sync_stores import Open, ended_loop_thread
from tokenstore import Keyring
from tokenstore.sync import AuthTokenStore, open_store


@pytest.fixture(autouse=True)
def _loop_thread() -> Iterator[None]:
    with ended_loop_thread():
        yield


@pytest.fixture
def open_sync(row: Row, url: str, keyring: Keyring) -> Iterator[Open]:
    """Opens synchronous stores on the test's row of the matrix, with tables, and closes them."""
    stores: list[AuthTokenStore] = []

    def opened(**options: object) -> AuthTokenStore:
        store = open_store(url, keyring=keyring, **options)  # type: ignore[arg-type]
        store.setup()
        stores.append(store)
        return store

    yield opened
    for store in stores:
        store.close()
