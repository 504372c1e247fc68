"""Namespaces: what a store has sealed in one of them does not open in another."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from support.database import Place, app_engine
from support.fresh_store import on_every_row
from support.keys import NORTH, SOUTH
from support.matrix import Row, each_database
from support.refreshers import OLD, Revoker
from support.store_calls import due, load
from tokenstore import AuthTokenStore, InvalidInputError, Keyring, TamperedError, open_store
from tokenstore.records import TokenKey
from tokenstore_memory import MemoryBackend

KEYRING = Keyring({"north": NORTH})
MOVED = "it was altered, moved, or sealed in another namespace, or another key had that name"


def _in(
    store: AuthTokenStore, namespace: str, *, keyring: Keyring = KEYRING, revoker: Revoker | None = None
) -> AuthTokenStore:
    """A store on the same rows."""
    refreshers = None if revoker is None else {"github": revoker}
    return AuthTokenStore(backend=store._backend, keyring=keyring, namespace=namespace, refreshers=refreshers)


@on_every_row
async def test_a_value_that_was_sealed_in_another_namespace_does_not_open(store: AuthTokenStore) -> None:
    """The value is copied from one table to another, as an attacker with access to both could do."""
    ours, theirs, none = _in(store, "ours"), _in(store, "theirs"), _in(store, "")
    for one in (ours, none):
        await one.store_tokens("github", "u1", "at", "rt", None, extra={"scope": "repo"})
        assert (await load(one))["access_token"] == "at"
        for other in {ours, theirs, none} - {one}:
            with pytest.raises(TamperedError, match=MOVED):
                await other.load_tokens("github", "u1")
            async with other.transaction() as tx:
                with pytest.raises(TamperedError, match=MOVED):
                    await tx.load_tokens("github", "u1", for_update=True)
    await theirs.store_tokens("github", "u1", "at", None, None)
    assert (await load(theirs))["refresh_token"] is None


@on_every_row
async def test_each_field_is_bound_to_the_namespace(store: AuthTokenStore) -> None:
    """A row gets one field of the same row in another namespace."""
    ours, theirs, key = _in(store, "ours"), _in(store, "theirs"), TokenKey("github", "u1")
    rows = []
    for one in (theirs, ours):
        await one.store_tokens(*key[:2], "at", "rt", None, extra={"scope": "repo"})
        rows.append(await store._backend.get(key))
    stolen, good = (row.tokens for row in rows if row is not None)
    for field in ("access_token", "refresh_token", "extra"):
        values = {name: getattr(good, name) for name in good.__slots__} | {field: getattr(stolen, field)}
        await store._backend.put(key, type(good)(**values))
        with pytest.raises(TamperedError, match=f"{field} of provider 'github', user 'u1' does not open"):
            await ours.load_tokens("github", "u1")


@on_every_row
async def test_no_call_uses_a_row_of_another_namespace(store: AuthTokenStore) -> None:
    """It is not refreshed, revoked or resealed, and no provider gets its tokens. It can be listed and deleted."""
    revoker = Revoker()
    keyring = Keyring({"south": SOUTH, "north": NORTH})
    ours, theirs = _in(store, "ours"), _in(store, "theirs", keyring=keyring, revoker=revoker)
    await ours.store_tokens("github", "u1", *OLD, datetime.now(UTC) - timedelta(hours=1))
    before = await store._backend.get(TokenKey("github", "u1"))
    for call in (theirs.load_fresh_tokens, theirs.revoke_tokens, theirs.reseal_tokens):
        with pytest.raises(TamperedError, match=MOVED):
            await call("github", "u1")
    [result] = await due(theirs, within=60)
    assert (result.outcome, type(result.error)) == ("failed", TamperedError)
    assert (revoker.calls, revoker.revoked) == (0, [])
    after = await store._backend.get(TokenKey("github", "u1"))
    assert before is not None
    assert after is not None
    assert (after.tokens, after.generation, after.failure) == (before.tokens, before.generation, None)
    assert [entry["user_id"] async for entry in theirs.list_tokens()] == ["u1"]
    assert await theirs.delete_tokens("github", "u1")


@on_every_row
async def test_refreshing_and_resealing_keep_the_namespace(store: AuthTokenStore) -> None:
    revoker = Revoker()
    ours = _in(store, "ours", revoker=revoker)
    await ours.store_tokens("github", "u1", *OLD, datetime.now(UTC) - timedelta(hours=1))
    fresh = await ours.load_fresh_tokens("github", "u1")
    assert fresh is not None
    assert (await load(ours))["access_token"] == fresh["access_token"]
    both = _in(store, "ours", keyring=Keyring({"south": SOUTH, "north": NORTH}))
    assert await both.reseal_tokens("github", "u1")
    assert (await load(both))["key_id"] == "south"
    with pytest.raises(TamperedError, match=MOVED):
        await _in(store, "", keyring=Keyring({"south": SOUTH})).load_tokens("github", "u1")


@each_database
def test_a_store_on_a_session_has_a_namespace(row: Row, url: str) -> None:
    place = Place(row, url)

    async def main() -> None:
        async with open_store(place.url, keyring=KEYRING, namespace="ours") as store:
            await store.setup()
            await store.store_tokens("github", "u1", "at", None, None)
        async with app_engine(place) as engine, AsyncSession(engine) as session:
            ours = AuthTokenStore(session, keyring=KEYRING, namespace="ours", **place.options)
            theirs = AuthTokenStore(session, keyring=KEYRING, namespace="theirs", **place.options)
            assert (await load(ours))["access_token"] == "at"
            with pytest.raises(TamperedError, match=MOVED):
                await theirs.load_tokens("github", "u1")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("namespace", "message"),
    [
        ("a" * 256, "namespace has 256 bytes as UTF-8; at most 255 are allowed"),
        ("é" * 128, "namespace has 256 bytes as UTF-8; at most 255 are allowed"),
        ("a\0", "namespace holds a NUL character"),
        ("\ud800", "namespace holds a lone surrogate and cannot be encoded as UTF-8"),
        (None, "namespace must be a str, not NoneType"),
        (b"", "namespace must be a str, not bytes"),
    ],
)
def test_a_namespace_is_checked_when_the_store_is_made(namespace: Any, message: str) -> None:
    with pytest.raises(InvalidInputError) as of_function:
        open_store("memory://", keyring=KEYRING, namespace=namespace)
    with pytest.raises(InvalidInputError) as of_class:
        AuthTokenStore(backend=MemoryBackend(), keyring=KEYRING, namespace=namespace)
    assert str(of_function.value) == str(of_class.value) == message


def test_the_longest_namespace_is_accepted() -> None:
    async def main() -> None:
        for namespace in ("a" * 255, "é" * 127):
            async with open_store("memory://", keyring=KEYRING, namespace=namespace) as store:
                await store.store_tokens("github", "u1", "at", None, None)
                assert (await load(store))["access_token"] == "at"

    asyncio.run(main())
