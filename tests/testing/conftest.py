"""The fixtures of the plugin, which need not be installed, and a client of the provider's API."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from support.sync_stores import ended_loop_thread
from tokenstore.testing import StrictRotatingProvider
from tokenstore.testing.plugin import (
    sync_token_provider,
    sync_token_store,
    token_clock,
    token_provider,
    token_provider_name,
    token_refreshers,
    token_server,
    token_store,
)

__all__ = [
    "sync_token_provider",
    "sync_token_store",
    "token_clock",
    "token_provider",
    "token_provider_name",
    "token_refreshers",
    "token_server",
    "token_store",
]


@pytest.fixture(autouse=True)
def _loop_thread() -> Iterator[None]:
    with ended_loop_thread():
        yield


@pytest.fixture
def http(token_server: StrictRotatingProvider) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=token_server.base_url, trust_env=False) as client:
        yield client
