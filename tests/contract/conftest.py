"""Fixtures of the tests of the strict provider, and of those with several processes."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from support.provider_requests import Clock
from support.workers import Team
from tokenstore.testing.provider import StrictRotatingProvider


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def provider(clock: Clock) -> Iterator[StrictRotatingProvider]:
    with StrictRotatingProvider(clock=clock) as provider:
        yield provider


@pytest.fixture
def http(provider: StrictRotatingProvider) -> Iterator[httpx.Client]:
    auth = (provider.client_id, provider.client_secret)
    with httpx.Client(base_url=provider.base_url, auth=auth, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def target() -> Iterator[StrictRotatingProvider]:
    """One provider for all generated requests of a property test."""
    with StrictRotatingProvider() as provider:
        yield provider


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    """Processes that carry out jobs of a module's tests."""
    team = Team()
    yield team
    team.close()
