"""Stored rows are sealed again under a new key, and open in their own place alone."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from support.fresh_store import on_every_row
from support.keys import NORTH, SOUTH
from support.store_calls import load
from tokenstore import AuthTokenStore, Keyring, TamperedError, UnknownKeyError
from tokenstore.protocol import Backend
from tokenstore.records import TokenKey
from tokenstore.sealing import seal_tokens

ACCESS, REFRESH, SCOPE = "gho_access-secret", "ghr_refresh-secret", "repo-secret"


@on_every_row
async def test_a_new_key_reseals(store: AuthTokenStore) -> None:
    """The tokens, times and generation stay; afterwards the old key can go; a newer write is never overwritten."""
    backend = store._backend
    north = AuthTokenStore(backend=backend, keyring=Keyring({"north": NORTH}))
    both = AuthTokenStore(backend=backend, keyring=Keyring({"south": SOUTH, "north": NORTH}))
    south = AuthTokenStore(backend=backend, keyring=Keyring({"south": SOUTH}))
    await north.store_tokens("github", "u1", ACCESS, REFRESH, datetime.now(UTC), None, extra={"scope": SCOPE})
    with pytest.raises(UnknownKeyError, match="'north'"):
        await south.load_tokens("github", "u1")
    before = await load(both)
    assert both.needs_reseal(before)
    assert not north.needs_reseal(before)
    assert await both.reseal_tokens("github", "u1")
    assert not await both.reseal_tokens("github", "u1")
    assert not await both.reseal_tokens("github", "nobody")
    assert await load(south) == before | {"key_id": "south"}
    # The loser of a race: its read was before a newer write, its rewrap comes after.
    await north.store_tokens("github", "u1", "newer", REFRESH, None)
    stale = seal_tokens(
        Keyring({"south": SOUTH}),
        TokenKey("github", "u1"),
        access_token="stale",
        refresh_token=None,
        extra=None,
        access_token_expires_at=None,
        refresh_token_expires_at=None,
    )
    assert not await backend.rewrap(TokenKey("github", "u1"), stale, generation=before["generation"])
    assert (await load(both))["access_token"] == "newer"


@on_every_row
async def test_the_sealed_header_tells_the_key_and_not_the_column(store: AuthTokenStore) -> None:
    """A column that hides that a row still needs the old key is found: by then the old key could have been removed."""
    backend, key = store._backend, TokenKey("github", "u1")
    north = AuthTokenStore(backend=backend, keyring=Keyring({"north": NORTH}))
    both = AuthTokenStore(backend=backend, keyring=Keyring({"south": SOUTH, "north": NORTH}))
    await north.store_tokens(*key, ACCESS, REFRESH, None, extra={"scope": SCOPE})
    row = await backend.get(key)
    assert row is not None
    for key_id in ("south", "n", "north2", "", "é"):
        assert await backend.rewrap(key, replace(row.tokens, key_id=key_id), generation=row.generation)
        for call in (both.load_tokens, both.reseal_tokens):
            with pytest.raises(TamperedError, match="user 'u1'"):
                await call(*key)
    assert await backend.rewrap(key, row.tokens, generation=row.generation)
    assert await both.reseal_tokens(*key)
    assert not both.needs_reseal(await load(both))


@on_every_row
async def test_sealed_values_do_not_open_elsewhere(store: AuthTokenStore) -> None:
    """Ciphertexts swapped between rows or columns, flipped or cut are errors, whoever wrote them to the database."""
    backend: Backend = store._backend
    mine, theirs = TokenKey("github", "mine"), TokenKey("github", "theirs")
    for key in (mine, theirs):
        await store.store_tokens(*key, ACCESS, REFRESH, None, extra={"scope": SCOPE})
    rows = [await backend.get(key) for key in (mine, theirs)]
    good, stolen = (row.tokens for row in rows if row is not None)
    flipped = bytearray(good.access_token)
    flipped[-1] ^= 1
    for bad in (
        replace(good, access_token=stolen.access_token),
        replace(good, refresh_token=stolen.refresh_token),
        replace(good, extra=stolen.extra),
        replace(good, access_token=good.refresh_token or b""),
        replace(good, refresh_token=good.access_token),
        replace(good, access_token=bytes(flipped)),
        replace(good, access_token=good.access_token[:-1]),
        replace(good, access_token=ACCESS.encode()),
        replace(good, access_token=b""),
    ):
        await backend.put(mine, bad)
        with pytest.raises(TamperedError, match="user 'mine'") as caught:
            await store.load_tokens(*mine)
        assert ACCESS not in str(caught.value)
    await backend.put(mine, good)
    restored = await store.load_tokens(*mine)
    assert restored is not None
    assert restored["access_token"] == ACCESS
