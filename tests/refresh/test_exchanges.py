"""Tokens in exchange for those of another row, the subject (RFC 8693)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from support.refresh_world import World, on_every_row, on_memory, on_rows
from support.refreshers import OLD, Script
from tokenstore import (
    AuthTokenStore,
    ConfigurationError,
    ProviderRefusedError,
    ReauthorizationRequiredError,
    RefreshTimeoutError,
    TokenRecord,
    TokensMissingError,
)
from tokenstore.integrations.machine import TokenExchange
from tokenstore.records import TokenKey

API: Mapping[str, Any] = {"access_token": "api-access-secret", "expires_in": 3600}


class Exchange(Script):
    """A refresh callable that exchanges the token of the user's row of ``github``; it notes the subjects' tokens."""

    issues = True

    def __init__(self, *answers: Mapping[str, Any] | BaseException, subject: str = "github") -> None:
        super().__init__(*(answers or (API,)))
        self.subject = subject
        self.subjects: list[str] = []

    def subject_of(self, key: TokenKey) -> TokenKey:
        return key._replace(provider=self.subject)

    async def __call__(self, record: TokenRecord, subject: TokenRecord | None = None) -> Mapping[str, Any]:
        assert subject is not None
        self.subjects.append(subject["access_token"])
        return await super().__call__(record)


def exchange_at(world: World, **options: Any) -> TokenExchange:
    provider = world.provider
    return TokenExchange(
        provider.token_url, provider.client_id, provider.client_secret, subject_provider="github", **options
    )


async def api_token(store: AuthTokenStore) -> str:
    record = await store.load_fresh_tokens("api", "u1", missing="raise")
    token: str = record["access_token"]
    return token


@on_every_row
async def test_an_expired_subject_is_refreshed_once_before_it_is_exchanged(world: World) -> None:
    """Two stores with 10 callers each: one refresh of the subject, one exchange; and the subject stays as it is."""
    refreshers = {"github": world.refresher, "api": exchange_at(world, audience="https://api", scope="read")}
    stores = [await world.store(refreshers=refreshers) for _ in range(2)]
    await world.log_in(stores[0])
    tokens = await asyncio.gather(*(api_token(store) for store in stores for _ in range(10)))
    stats = world.provider.stats()
    assert (stats.refreshes, stats.issues, stats.reuses) == (1, 1, 0)
    assert len(set(tokens)) == 1
    record = await stores[0].load_fresh_tokens("api", "u1", missing="raise")
    assert (record["extra"]["audience"], record["extra"]["scope"]) == ("https://api", "read")
    assert (await world.stored())["access_token"] not in tokens


@on_rows("memory", "sqlite", "postgresql+asyncpg", "mariadb+aiomysql")
async def test_a_subject_for_which_the_user_has_to_log_in_leaves_no_mark(world: World) -> None:
    """The error names the subject, the provider is not called for the exchange, and a login revives both rows."""
    refused = Script(ReauthorizationRequiredError("no", code="invalid_grant"))
    exchange = Exchange()
    store = await world.store(refreshers={"github": refused, "api": exchange})
    with pytest.raises(TokensMissingError, match="'github', user 'u1'"):
        await api_token(store)
    await store.store_tokens("github", "u1", *OLD, world.at(-1))
    for _ in range(2):
        with pytest.raises(ReauthorizationRequiredError) as caught:
            await api_token(store)
        assert (caught.value.provider, caught.value.user_id) == ("github", "u1")
    assert (refused.calls, exchange.calls) == (1, 0)
    await store.store_tokens("github", "u1", "login", "r", world.at(3600))
    assert await api_token(store) == API["access_token"]
    assert exchange.subjects == ["login"]


@on_rows("memory", "sqlite", "postgresql+psycopg", "mariadb+asyncmy")
async def test_a_new_login_of_the_subject_revives_a_refused_exchange_at_once(world: World) -> None:
    """Without one, the provider is not called again before the retry time."""
    exchange = Exchange(ProviderRefusedError("revoked", code="invalid_grant"), API)
    store = await world.store(refreshers={"github": Script(), "api": exchange})
    await store.store_tokens("github", "u1", "revoked", "r", world.at(3600))
    for _ in range(2):
        with pytest.raises(ProviderRefusedError, match="invalid_grant"):
            await api_token(store)
    assert exchange.calls == 1
    await store.store_tokens("github", "u1", "login", "r", world.at(3600))
    assert await api_token(store) == API["access_token"]
    assert exchange.subjects == ["revoked", "login"]


@on_rows("memory", "sqlite", "postgresql+psycopg", "mariadb+asyncmy")
async def test_a_refusal_that_came_after_the_login_stays_however_slow_the_database_is(world: World) -> None:
    """Its time is compared with that of the login, and not with the time at which the answer is there."""
    exchange = Exchange(ProviderRefusedError("revoked", code="invalid_grant"), API)
    store = await world.store(refreshers={"github": Script(), "api": exchange})
    backend: Any = store._backend
    clear = backend.clear_failure

    async def clear_late(*args: Any, **options: Any) -> bool:
        await asyncio.sleep(0.3)
        cleared: bool = await clear(*args, **options)
        return cleared

    backend.clear_failure = clear_late
    await store.store_tokens("github", "u1", "revoked", "r", world.at(3600))
    for _ in range(2):
        with pytest.raises(ProviderRefusedError, match="invalid_grant"):
            await api_token(store)
    assert exchange.calls == 1


@on_memory
async def test_a_subject_is_valid_for_the_time_of_the_exchange(world: World) -> None:
    script, exchange = Script(), Exchange()
    store = await world.store(refreshers={"github": script, "api": exchange}, refresh_timeout=120, refresh_margin=0)
    await store.store_tokens("github", "u1", *OLD, world.at(100), extra={"expires_in": 3600})
    await api_token(store)
    assert exchange.subjects == ["new-access-secret"]


@on_memory
async def test_rows_that_are_each_others_subject_end_in_an_error(world: World) -> None:
    """A row that is its own subject, or names none, is one at once."""
    store = await world.store(
        refreshers={"a": Exchange(subject="b"), "b": Exchange(subject="a"), "own": Exchange(subject="own")},
        refresh_timeout=0.05,
    )
    with pytest.raises(RefreshTimeoutError, match=r"got no valid token within 0\.15 s"):
        await store.load_fresh_tokens("a", "u1")
    with pytest.raises(ConfigurationError, match="its own subject"):
        await store.load_fresh_tokens("own", "u1")
    for subject in ("", 1):
        with pytest.raises(ConfigurationError, match="subject_of names no row"):
            await store.load_fresh_tokens("api", "u1", refresh=Exchange(subject=subject))  # type: ignore[arg-type]


@on_memory
async def test_an_exchange_passes_no_gate_while_it_waits_for_its_subject(world: World) -> None:
    """Subject and row are of one provider, which may have one call at a time."""
    refresher = world.refresher
    exchange = exchange_at(world)

    class Both:
        """Refreshes the row of the empty account, and exchanges its token for the other rows."""

        issues = True

        def subject_of(self, key: TokenKey) -> TokenKey:
            return key._replace(account="")

        async def __call__(self, record: TokenRecord, subject: TokenRecord | None = None) -> Mapping[str, Any]:
            return await exchange(record, subject)

    both = Both()
    store = await world.store(refreshers={"github": refresher}, provider_concurrency=1)
    await world.log_in(store)
    calls = (
        store.load_fresh_tokens("github", "u1", account=account, refresh=both, missing="raise") for account in "abc"
    )
    records = await asyncio.gather(*calls)
    assert len({record["access_token"] for record in records}) == 3
    assert world.provider.stats().issues == 3
