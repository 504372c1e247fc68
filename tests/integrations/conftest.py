"""Fixtures of the tests of the integrations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.http_world import World, world_of
from support.oauth2_calls import ID, SECRET
from support.scripted_endpoint import Endpoint
from tokenstore import Keyring
from tokenstore.integrations import _endpoint
from tokenstore.testing.provider import StrictRotatingProvider


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.stop()


@pytest.fixture(scope="module")
def target() -> Iterator[Endpoint]:
    """One endpoint for all generated answers of a property test."""
    endpoint = Endpoint()
    yield endpoint
    endpoint.stop()


@pytest.fixture
def provider() -> Iterator[StrictRotatingProvider]:
    with StrictRotatingProvider(client_id=ID, client_secret=SECRET, clock=lambda: 1_700_000_000.0) as provider:
        yield provider


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_endpoint, "_PAUSE", (0.0, 0.0))


@pytest.fixture
def world(request: pytest.FixtureRequest, keyring: Keyring, tmp_path: Path) -> Iterator[World]:
    """A world with the client that the test's parameter names."""
    with (
        StrictRotatingProvider(client_id=ID, client_secret=SECRET) as provider,
        world_of(request.param, provider, keyring, tmp_path) as world,
    ):
        yield world
