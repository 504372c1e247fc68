"""What a test does to a user's tokens through the handle: log in, expire, revoke, and outages of the provider."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.provider_requests import resource
from tokenstore import (
    AuthTokenStore,
    Keyring,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    TokenRecord,
    TokensMissingError,
    open_store,
    sync,
)
from tokenstore.testing import FakeClock, StrictRotatingProvider, SyncTokenProvider, TokenProvider

NAME = "example"


class Scene:
    """The async store, called from plain tests: each call has an event loop of its own, one after another."""

    def __init__(self, provider: TokenProvider, http: httpx.Client) -> None:
        self.provider = provider
        self.store = provider.store
        self.http = http

    def login(self, user: str = "u1", **options: Any) -> TokenRecord:
        return asyncio.run(self.provider.login(user, **options))

    def expire(self, user: str = "u1", **options: Any) -> None:
        asyncio.run(self.provider.expire(user, **options))

    def load(self, user: str = "u1", **options: Any) -> TokenRecord:
        return asyncio.run(self.store.load_fresh_tokens(NAME, user, missing="raise", **options))

    def status(self, record: TokenRecord) -> int:
        """What the provider's API answers to the access token."""
        return resource(self.http, record["access_token"]).status_code


@pytest.fixture
def scene(token_provider: TokenProvider, http: httpx.Client) -> Scene:
    return Scene(token_provider, http)


def test_login_stores_the_tokens_of_a_real_grant(scene: Scene) -> None:
    record = scene.login(scope="read")
    assert resource(scene.http, record["access_token"]).json() == {"user": "u1", "scope": "read"}
    assert scene.load() == record
    assert scene.provider.refreshes == 0


def test_an_expired_token_is_refreshed_once(scene: Scene) -> None:
    async def load_at_once() -> list[TokenRecord]:
        loads = [scene.store.load_fresh_tokens(NAME, "u1", missing="raise") for _ in range(20)]
        return await asyncio.gather(*loads)

    old, other = scene.login(), scene.login("u2")
    scene.expire()
    assert scene.status(old) == 401
    records = asyncio.run(load_at_once())
    assert len({record["access_token"] for record in records}) == 1
    assert scene.status(records[0]) == 200
    assert scene.provider.refreshes == 1
    assert scene.load("u2") == other


def test_expire_changes_nothing_but_the_expiry(scene: Scene) -> None:
    scene.provider.server.refresh_token_lifetime = 86400
    old = scene.login(scope="read")
    asyncio.run(scene.store.update_metadata(NAME, "u1", {"team": "blue"}))
    scene.expire()
    record = asyncio.run(scene.store.load_tokens(NAME, "u1"))
    assert record is not None
    changed = {"access_token_expires_at", "generation", "updated_at", "metadata", "metadata_key_id"}
    assert {name for name in record if record[name] != old[name]} <= changed  # type: ignore[call-overload]
    assert record["metadata"] == {"team": "blue"}
    assert not scene.store.is_access_token_valid(record, clock_skew_seconds=0)


def test_expire_names_one_account(scene: Scene) -> None:
    scene.login()
    work = scene.login(account="work")
    scene.expire(account="work")
    assert scene.load(account="work")["access_token"] != work["access_token"]
    scene.load()
    assert scene.provider.refreshes == 1
    with pytest.raises(TokensMissingError, match="user 'u1', account 'home' has no tokens of provider 'example'"):
        scene.expire(account="home")


def test_an_access_token_that_ends_at_the_provider_alone_is_found_by_the_401(scene: Scene) -> None:
    old = scene.login()
    scene.provider.expire_access("u1")
    assert scene.load() == old
    assert scene.status(old) == 401
    new = scene.load(force=True, generation=old["generation"])
    assert scene.status(new) == 200
    assert scene.provider.refreshes == 1


def test_a_withdrawn_consent_is_found_by_the_next_refresh(scene: Scene) -> None:
    old = scene.login()
    scene.provider.revoke("u1")
    assert scene.load() == old
    assert scene.status(old) == 401
    scene.expire()
    for _ in range(2):
        with pytest.raises(ReauthorizationRequiredError):
            scene.load()
    assert scene.provider.server.stats().requests == 1
    assert scene.status(scene.login()) == 200
    assert scene.load()["access_token"] != old["access_token"]


@pytest.mark.parametrize("drop", [False, True])
def test_an_outage_lasts_until_the_block_ends_and_the_retry_time_has_come(
    scene: Scene, token_clock: FakeClock, drop: bool
) -> None:
    """The failure's retry time is a time of the test's clock."""
    old = scene.login()
    scene.expire()
    with scene.provider.outage(drop=drop):
        if drop:
            with pytest.raises(httpx.RemoteProtocolError):
                scene.status(old)
        else:
            assert scene.status(old) == 503
        with pytest.raises(ProviderUnavailableError):
            scene.load()
    requests = scene.provider.server.stats().requests
    with pytest.raises(ProviderUnavailableError):
        scene.load()
    assert scene.provider.server.stats().requests == requests
    token_clock.advance(timedelta(minutes=1))
    assert scene.status(scene.load()) == 200
    assert scene.provider.refreshes == 1


def test_an_outage_within_an_outage_ends_with_the_outer_one(scene: Scene) -> None:
    seen: list[object] = []
    with scene.provider.outage(drop=True):
        with scene.provider.outage():
            seen.append(scene.provider.server.outage)
        seen.append(scene.provider.server.outage)
    assert [*seen, scene.provider.server.outage] == [True, "drop", False]


def test_tokens_expire_when_the_clock_is_moved(scene: Scene, token_clock: FakeClock) -> None:
    """The store, its rows and the provider have one clock."""
    old = scene.login()
    token_clock.advance(timedelta(minutes=50))
    assert (scene.load(), scene.status(old)) == (old, 200)
    token_clock.advance(timedelta(minutes=10))
    assert scene.status(old) == 401
    assert not scene.store.is_access_token_valid(old)
    assert scene.status(scene.load()) == 200
    assert scene.provider.refreshes == 1


def test_the_application_revokes_at_the_provider(scene: Scene) -> None:
    old = scene.login()
    assert asyncio.run(scene.store.revoke_tokens(NAME, "u1"))
    assert scene.status(old) == 401
    assert scene.provider.server.stats().revoked_grants == 1


@pytest.mark.sqlite
def test_the_handle_works_with_a_database(
    token_server: StrictRotatingProvider, token_refreshers: Any, http: httpx.Client, keyring: Keyring, tmp_path: Path
) -> None:
    def run(call: Any) -> TokenRecord:
        async def main() -> TokenRecord:
            async with open_store(f"sqlite:///{tmp_path}/t.db", keyring=keyring, refreshers=token_refreshers) as store:
                await store.setup()
                provider = TokenProvider(token_server, store, NAME)
                await provider.login("u1")
                await provider.expire("u1")
                record: TokenRecord = await call(store)
                return record

        return asyncio.run(main())

    def fresh(store: AuthTokenStore) -> Coroutine[Any, Any, TokenRecord]:
        return store.load_fresh_tokens(NAME, "u1", missing="raise")

    assert resource(http, run(fresh)["access_token"]).status_code == 200
    assert token_server.stats().refreshes == 1


def test_the_handle_without_await(
    sync_token_store: sync.AuthTokenStore,
    sync_token_provider: SyncTokenProvider,
    token_clock: FakeClock,
    http: httpx.Client,
) -> None:
    provider, store = sync_token_provider, sync_token_store
    old = provider.login("u1", scope="read")
    assert store.load_fresh_tokens(NAME, "u1") == old
    provider.expire("u1")
    new = store.load_fresh_tokens(NAME, "u1", missing="raise")
    assert (resource(http, old["access_token"]).status_code, resource(http, new["access_token"]).status_code) == (
        401,
        200,
    )
    token_clock.advance(timedelta(hours=1))
    with provider.outage(), pytest.raises(ProviderUnavailableError):
        store.load_fresh_tokens(NAME, "u1")
    provider.revoke("u1")
    token_clock.advance(60)
    with pytest.raises(ReauthorizationRequiredError):
        store.load_fresh_tokens(NAME, "u1")
    assert provider.refreshes == 1
    with pytest.raises(TokensMissingError, match="user 'u2' has no tokens of provider 'example'"):
        provider.expire("u2")


def test_a_handle_shows_its_name_and_no_token(token_provider: TokenProvider) -> None:
    record = asyncio.run(token_provider.login("u1"))
    assert repr(token_provider) == f"<TokenProvider example {token_provider.server!r}>"
    assert record["access_token"] not in repr(token_provider)
