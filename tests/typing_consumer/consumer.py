"""A program that uses the installed package, to check the types that users' type checkers see.

It is not run. mypy and pyright check it in strict mode, in an environment that has the wheel.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, assert_type

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

import tokenstore_sql
from tokenstore import (
    AuthTokenStore,
    Keyring,
    RefreshableRecord,
    RefreshResult,
    TokenEntry,
    TokenEntryWithMetadata,
    TokenRecord,
    TokenStoreError,
    Transaction,
    ValueEntry,
    generate_key,
    open_store,
    sync,
)
from tokenstore.integrations.celery import install
from tokenstore.integrations.machine import ClientCredentials, TokenExchange
from tokenstore.protocol import Backend
from tokenstore.testing import FakeClock, StrictRotatingProvider, SyncTokenProvider, TokenProvider
from tokenstore_memory import MemoryBackend

assert_type(tokenstore_sql.__name__, str)


async def borrowed(session: AsyncSession) -> None:
    """A store on the application's session."""
    store = AuthTokenStore(db_session=session)
    await store.store_tokens(
        provider="github",
        user_id="user-123",
        access_token="gho_abc",
        refresh_token="ghr_xyz",
        access_token_expires_at=datetime.now(UTC) + timedelta(hours=8),
        refresh_token_expires_at=None,
    )
    record = await store.load_tokens(provider="github", user_id="user-123", for_update=True)
    assert_type(record, TokenRecord | None)
    if record and not store.is_access_token_valid(record) and store.is_refresh_token_valid(record):
        assert_type(record, RefreshableRecord)
        assert_type(record["refresh_token"], str)
        await store.store_tokens("github", "user-123", "gho_def", record["refresh_token"], None)


async def owned(engine: AsyncEngine) -> None:
    """A store with its own connections."""
    assert_type(open_store(engine), AuthTokenStore)
    keyring = Keyring({"first": b"k" * 32})
    assert_type(generate_key(), str)
    async with open_store("sqlite:///tokens.db", keyring=keyring, namespace="prod", lock_timeout=2.5) as store:
        assert_type(store, AuthTokenStore)
        await store.setup()
        async with store.transaction() as tx:
            assert_type(tx, Transaction)
            assert_type(await tx.load_tokens("github", "u1", for_update=True), TokenRecord | None)
        async for entry in store.list_tokens(user_id="u1"):
            assert_type(entry, TokenEntry)
            assert_type(entry["access_token_expires_at"], datetime | None)
            assert_type(entry["account"], str)
            assert_type(entry["metadata_key_id"], str | None)
        async for full in store.list_tokens(user_id="u1", with_metadata=True):
            assert_type(full, TokenEntryWithMetadata)
            assert_type(full["metadata"], dict[str, Any])
            assert_type(full["account"], str)
        assert_type(await store.delete_tokens("github", "u1"), bool)
        assert_type(await store.update_metadata("github", "u1", {"step": 1, "gone": None}), dict[str, Any] | None)
        await store.store_tokens("github", "u1", "gho_abc", None, None, metadata={"step": 1})
        await store.store_tokens("github", "u1", "gho_abc", None, None, account="work")
        assert_type(await store.load_tokens("github", "u1", account="work"), TokenRecord | None)
        assert_type(await store.load_fresh_tokens("github", "u1"), TokenRecord | None)
        assert_type(await store.load_fresh_tokens("github", "u1", missing="raise"), TokenRecord)
        try:
            assert_type(await store.reseal_tokens("github", "u1"), bool)
            await store.put_value("login", "state", {"verifier": "v"}, ttl=timedelta(minutes=10))
            assert_type(await store.pop_value("login", "state", default=None), Any)
            assert_type(await store.purge_values(), int)
            async for value in store.list_values(namespace="login"):
                assert_type(value, ValueEntry)
                assert_type(value["expires_at"], datetime | None)
        except TokenStoreError as error:
            assert_type(error, TokenStoreError)


def without_await(engine: AsyncEngine) -> None:
    """The same methods without await have the same types."""
    assert_type(sync.open_store(engine), sync.AuthTokenStore)
    with sync.open_store("sqlite:///tokens.db", refreshers={"github": refresh_plainly}, lock_timeout=2.5) as store:
        assert_type(store, sync.AuthTokenStore)
        assert_type(store.aio, AuthTokenStore)
        install(store)
        store.setup()
        with store.transaction() as tx:
            assert_type(tx, sync.Transaction)
            assert_type(tx.load_tokens("github", "u1", for_update=True), TokenRecord | None)
        for entry in store.list_tokens(user_id="u1"):
            assert_type(entry, TokenEntry)
        for result in store.refresh_due(within=60):
            assert_type(result, RefreshResult)
        assert_type(store.store_tokens("github", "u1", "gho_abc", None, None), None)
        assert_type(store.store_tokens("github", "u1", "gho_abc", None, None, if_absent=True), bool)
        assert_type(store.load_fresh_tokens("github", "u1"), TokenRecord | None)
        record = store.load_fresh_tokens("github", "u1", missing="raise")
        assert_type(record, TokenRecord)
        if store.is_refresh_token_valid(record):
            assert_type(record, RefreshableRecord)
        assert_type(store.get_value("login", "state"), Any)
        for value in store.list_values():
            assert_type(value, ValueEntry)


def refresh_plainly(record: RefreshableRecord) -> dict[str, Any]:
    """A refresher may be a plain function."""
    return {"access_token": "new", "refresh_token": record["refresh_token"]}


def validity(store: AuthTokenStore, kept: dict[str, Any], seen: Mapping[str, object]) -> bool:
    """The validity checks accept any mapping: a record, a dict, a row of another library."""
    return store.is_access_token_valid(kept, clock_skew_seconds=120) and store.is_refresh_token_valid(seen)


def known_keys(record: TokenRecord) -> None:
    """Each key of a record has a type of its own."""
    assert_type(record["access_token"], str)
    assert_type(record["account"], str)
    assert_type(record["refresh_token"], str | None)
    assert_type(record["access_token_expires_at"], datetime | None)
    assert_type(record["created_at"], datetime)
    assert_type(record["generation"], int)
    assert_type(record["extra"], dict[str, Any])
    assert_type(record["metadata"], dict[str, Any])
    assert_type(record["metadata_key_id"], str | None)
    assert_type(record | {"extra": {}}, TokenRecord)
    assert_type(dict(record.items()), dict[str, Any])


async def refresh(record: RefreshableRecord) -> dict[str, Any]:
    """A refresher is only called for a record with a refresh token."""
    assert_type(record["refresh_token"], str)
    assert_type(record["access_token"], str)
    assert_type(record["metadata"], dict[str, Any])
    return {"access_token": "new", "expires_in": 3600}


async def refresh_any(record: TokenRecord) -> Mapping[str, Any]:
    """A refresher may accept every record, too."""
    return {"access_token": record["access_token"]}


def refreshed(backend: MemoryBackend) -> AuthTokenStore:
    """A store that refreshes by itself."""
    issuers = {
        "billing": ClientCredentials("https://sso.example.com/token", "app", "made-up", timeout=5),
        "orders": TokenExchange("https://sso.example.com/token", "app", "made-up", subject_provider="sso"),
    }
    return open_store(backend, refreshers={"github": refresh, "gitlab": refresh_any, **issuers})


def as_plain_dict(record: TokenRecord) -> dict[str, Any]:
    """A record is a dict."""
    return record


def as_backend(backend: MemoryBackend) -> Backend:
    """The shipped backends satisfy the protocol for backends."""
    return backend


async def expired(token_provider: TokenProvider, token_clock: FakeClock) -> None:
    """A test with the fixtures of the pytest plugin."""
    assert_type(await token_provider.login("u1"), TokenRecord)
    await token_provider.expire("u1")
    with token_provider.outage(drop=True):
        token_clock.advance(timedelta(hours=1))
    assert_type(token_provider.refreshes, int)
    assert_type(token_provider.server, StrictRotatingProvider)
    assert_type(token_provider.store, AuthTokenStore)


def expired_without_await(sync_token_provider: SyncTokenProvider) -> None:
    """A test with the fixtures of the store without ``await``."""
    assert_type(sync_token_provider.login("u1"), TokenRecord)
    assert_type(sync_token_provider.store, sync.AuthTokenStore)
