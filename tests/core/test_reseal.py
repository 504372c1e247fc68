"""Resealing of stored rows with a new key, and sealed values that were moved or changed."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from support.fresh_store import on_every_row
from support.keys import NORTH, SOUTH
from support.store_calls import load
from tokenstore import AuthTokenStore, Keyring, TamperedError, UnknownKeyError
from tokenstore.protocol import Backend
from tokenstore.records import TokenKey
from tokenstore.sealing import Sealer

ACCESS, REFRESH, SCOPE = "gho_access-secret", "ghr_refresh-secret", "repo-secret"

TOKENS: dict[str, Any] = {"access_token": ACCESS, "refresh_token": REFRESH, "access_token_expires_at": None}


@on_every_row
async def test_resealing_with_a_new_key_changes_only_the_sealed_values(store: AuthTokenStore) -> None:
    """Tokens, times and generation stay; afterwards the old key can be removed; a newer write is not overwritten."""
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
    # A reseal that read the row before a newer write and rewraps it after that write must change nothing.
    await north.store_tokens("github", "u1", "newer", REFRESH, None)
    stale = Sealer(Keyring({"south": SOUTH})).seal(
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
async def test_reseal_reads_the_key_s_name_from_the_sealed_header_and_not_from_the_column(
    store: AuthTokenStore,
) -> None:
    """A row whose column wrongly names the new key is still found; otherwise the old key could be removed too early."""
    backend, key = store._backend, TokenKey("github", "u1")
    north = AuthTokenStore(backend=backend, keyring=Keyring({"north": NORTH}))
    both = AuthTokenStore(backend=backend, keyring=Keyring({"south": SOUTH, "north": NORTH}))
    await north.store_tokens(**key._asdict(), **TOKENS, extra={"scope": SCOPE})
    row = await backend.get(key)
    assert row is not None
    for key_id in ("south", "n", "north2", "", "é"):
        assert await backend.rewrap(key, replace(row.tokens, key_id=key_id), generation=row.generation)
        for call in (both.load_tokens, both.reseal_tokens):
            with pytest.raises(TamperedError, match="user 'u1'"):
                await call(**key._asdict())
    assert await backend.rewrap(key, row.tokens, generation=row.generation)
    assert await both.reseal_tokens(**key._asdict())
    assert not both.needs_reseal(await load(both))


@on_every_row
async def test_moved_or_changed_ciphertexts_raise_tampered_error(store: AuthTokenStore) -> None:
    """Ciphertexts in the database are swapped between rows or columns, changed in a bit, or truncated."""
    backend: Backend = store._backend
    mine, theirs = TokenKey("github", "mine"), TokenKey("github", "theirs")
    for key in (mine, theirs):
        await store.store_tokens(**key._asdict(), **TOKENS, extra={"scope": SCOPE})
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
            await store.load_tokens(**mine._asdict())
        assert ACCESS not in str(caught.value)
    await backend.put(mine, good)
    restored = await store.load_tokens(**mine._asdict())
    assert restored is not None
    assert restored["access_token"] == ACCESS
