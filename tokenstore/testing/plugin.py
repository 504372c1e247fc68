"""The pytest plugin: a store, a strict provider, and a clock for both. ``docs/testing.md`` is its guide.

pytest imports this module whenever tokenstore is installed, so it imports nothing but pytest and, with its package, the
names of :mod:`tokenstore`. ``-p no:tokenstore`` switches it off. All fixtures are plain ones, of function scope: they
work with pytest-asyncio, with anyio's plugin, and without either, because a store belongs to the event loop that makes
its first call. A project replaces a fixture by one of the same name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tokenstore import AuthTokenStore, sync
    from tokenstore.refresh.attempt import Refresh
    from tokenstore.testing import FakeClock, StrictRotatingProvider, SyncTokenProvider, TokenProvider

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


@pytest.fixture
def token_clock() -> FakeClock:
    """The clock of the store and of the provider. It stands still until the test moves it."""
    from tokenstore.testing import FakeClock

    return FakeClock()


@pytest.fixture
def token_provider_name() -> str:
    """The name under which the store knows the provider. Replace it by the one that your application uses."""
    return "example"


@pytest.fixture
def token_server(token_clock: FakeClock) -> Iterator[StrictRotatingProvider]:
    """A strict OAuth provider on the loopback interface, with an API."""
    from tokenstore.testing import StrictRotatingProvider

    with StrictRotatingProvider(clock=token_clock) as server:
        yield server


@pytest.fixture
def token_refreshers(token_provider_name: str, token_server: StrictRotatingProvider) -> Mapping[str, Refresh]:
    """The refreshers of the store. Replace it to test a refresher of your own."""
    from tokenstore.integrations.oauth2 import OAuth2Refresher

    refresher = OAuth2Refresher(
        token_server.token_url,
        token_server.client_id,
        token_server.client_secret,
        revocation_url=token_server.revocation_url,
    )
    return {token_provider_name: refresher}


@pytest.fixture
def token_store(token_clock: FakeClock, token_refreshers: Mapping[str, Refresh]) -> AuthTokenStore:
    """A store in memory. It has nothing to close. Replace it to test with a database."""
    from tokenstore import Keyring, generate_key, open_store

    # A test refuses a token just after it was stored, so a forced refresh must not wait for `force_min_age`.
    return open_store(
        "memory://",
        keyring=Keyring.from_string(generate_key()),
        clock=token_clock,
        refreshers=token_refreshers,
        force_min_age=0.0,
    )


@pytest.fixture
def token_provider(
    token_server: StrictRotatingProvider, token_store: AuthTokenStore, token_provider_name: str
) -> TokenProvider:
    """The provider, together with the store that has its users' tokens."""
    from tokenstore.testing import TokenProvider

    return TokenProvider(token_server, token_store, token_provider_name)


@pytest.fixture
def sync_token_store(token_clock: FakeClock, token_refreshers: Mapping[str, Refresh]) -> Iterator[sync.AuthTokenStore]:
    """A store without ``await``, in memory."""
    from tokenstore import Keyring, generate_key
    from tokenstore.sync import open_store

    with open_store(
        "memory://",
        keyring=Keyring.from_string(generate_key()),
        clock=token_clock,
        refreshers=token_refreshers,
        force_min_age=0.0,
    ) as store:
        yield store


@pytest.fixture
def sync_token_provider(
    token_server: StrictRotatingProvider, sync_token_store: sync.AuthTokenStore, token_provider_name: str
) -> SyncTokenProvider:
    """The provider, together with the store without ``await`` that has its users' tokens."""
    from tokenstore.testing import SyncTokenProvider

    return SyncTokenProvider(token_server, sync_token_store, token_provider_name)
