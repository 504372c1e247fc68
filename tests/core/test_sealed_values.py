"""Sealing of values: their place byte by byte, values that must not open, and resealing with a new key."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from support.fresh_store import on_every_row
from support.keys import NORTH, SOUTH, keyring_of
from tokenstore import AuthTokenStore, Keyring, TamperedError, UnknownKeyError
from tokenstore.keyring import place_of
from tokenstore.records import SealedTokens, TokenKey
from tokenstore.sealing import Sealer
from tokenstore.value_records import SealedValue, ValueKey, ValueRow
from tokenstore_memory import MemoryBackend

KEY = ValueKey("login", "state-123")
SECRET = "verifier-s3cr3t"
NORTH_ALONE, SOUTH_ALONE = Keyring({"north": NORTH}), Keyring({"south": SOUTH})
BOTH = Keyring({"south": SOUTH, "north": NORTH})
# AES-256-GCM-SIV of '{"a":1}' with the key 00 01 … 1f, the nonce a0 … ab, and the associated data of the format.
PINNED = bytes.fromhex("01056e6f727468a0a1a2a3a4a5a6a7a8a9aaab")


def _on(store: AuthTokenStore, keyring: Keyring, namespace: str = "") -> AuthTokenStore:
    """A store on the same rows."""
    return AuthTokenStore(backend=store._backend, keyring=keyring, namespace=namespace)


def _backend(store: AuthTokenStore) -> Any:
    return store._backend


async def _row(store: AuthTokenStore, key: ValueKey = KEY) -> ValueRow:
    row: ValueRow | None = await _backend(store).get_value(key)
    assert row is not None
    return row


def test_the_format_of_a_value_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout is that of tokens; the associated data has the value's namespace, its name and the word `value`."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

    nonce = bytes(range(0xA0, 0xAC))
    monkeypatch.setattr("tokenstore.keyring.os.urandom", lambda size: nonce[:size])
    value = Sealer(keyring_of("north"), "prod").seal_value(KEY, '{"a":1}')
    assert value.key_id == "north"
    assert value.sealed[:19] == PINNED
    associated = b"\x01\x05north\x00\x04prod\x00\x05login\x00\x09state-123\x00\x05value"
    assert value.sealed[19:] == AESGCMSIV(NORTH).encrypt(nonce, b'{"a":1}', associated)
    assert value.sealed.hex() == PINNED.hex() + "bf4040ad80663fbc708a3a816e44bad9608d4a6c6e17d0"
    assert place_of(KEY, "prod") == b"\x00\x04prod\x00\x05login\x00\x09state-123"


@on_every_row
async def test_a_value_never_opens_as_a_token_nor_a_token_as_a_value(store: AuthTokenStore) -> None:
    """Also not if their names agree as far as they can."""
    row = TokenKey("login", "state-123")
    await store.store_tokens(*row[:2], "at", "rt", None, extra={"a": 1})
    await store.put_value(*KEY, SECRET)
    tokens = await store._backend.get(row)
    assert tokens is not None
    for sealed in (tokens.tokens.access_token, tokens.tokens.refresh_token, tokens.tokens.extra):
        assert sealed is not None
        await _backend(store).put_value(KEY, SealedValue(sealed, "k1"), ttl=None)
        with pytest.raises(TamperedError, match="value of namespace 'login', name 'state-123' does not open"):
            await store.get_value(*KEY)
    await store.put_value(*KEY, SECRET)
    value = (await _row(store)).value.sealed
    for bad in (
        replace(tokens.tokens, access_token=value),
        replace(tokens.tokens, refresh_token=value),
        replace(tokens.tokens, extra=value),
    ):
        await store._backend.put(row, bad)
        with pytest.raises(TamperedError, match="does not open"):
            await store.load_tokens(*row[:2])


def test_no_field_of_a_token_row_has_the_name_of_a_value() -> None:
    """It would open as a token if the number of texts were the same one day."""
    assert "value" not in SealedTokens.__slots__


@on_every_row
async def test_a_value_opens_only_for_its_own_place(store: AuthTokenStore) -> None:
    """It does not open under another namespace or name, nor for the same letters split differently, nor elsewhere."""
    await store.put_value("ab", "cd", SECRET)
    sealed = (await _row(store, ValueKey("ab", "cd"))).value
    for key in (ValueKey("ab", "ce"), ValueKey("a", "bcd"), ValueKey("abc", "d"), ValueKey("cd", "ab")):
        await _backend(store).put_value(key, sealed, ttl=None)
        for call in (store.get_value, store.reseal_value, store.pop_value):
            with pytest.raises(TamperedError, match="altered, moved, or sealed in another namespace") as caught:
                await call(*key)
            assert SECRET not in str(caught.value)
        assert await store.get_value(*key) is None, "a value that cannot be opened was popped, and is gone"
    assert await store.get_value("ab", "cd") == SECRET


@on_every_row
async def test_an_altered_value_does_not_open(store: AuthTokenStore) -> None:
    await store.put_value(*KEY, SECRET)
    good = (await _row(store)).value
    flipped = bytearray(good.sealed)
    flipped[-1] ^= 1
    for bad in (
        replace(good, sealed=bytes(flipped)),
        replace(good, sealed=good.sealed[:-1]),
        replace(good, sealed=SECRET.encode()),
        replace(good, sealed=b""),
        replace(good, key_id="other"),
        replace(good, key_id=""),
    ):
        await _backend(store).put_value(KEY, bad, ttl=None)
        for call in (store.get_value, store.reseal_value):
            with pytest.raises(TamperedError, match="namespace 'login', name 'state-123'"):
                await call(*KEY)
    await _backend(store).put_value(KEY, good, ttl=None)
    assert await store.get_value(*KEY) == SECRET


@on_every_row
async def test_a_value_of_another_namespace_of_a_store_does_not_open(store: AuthTokenStore) -> None:
    ours, theirs, none = (_on(store, NORTH_ALONE, namespace) for namespace in ("ours", "theirs", ""))
    await ours.put_value(*KEY, SECRET)
    assert await ours.get_value(*KEY) == SECRET
    for other in (theirs, none):
        with pytest.raises(TamperedError, match="sealed in another namespace"):
            await other.get_value(*KEY)
    # The same letters as the store's namespace and the value's.
    await _on(store, NORTH_ALONE, "a").put_value("bc", "d", SECRET)
    with pytest.raises(TamperedError):
        await _on(store, NORTH_ALONE, "ab").get_value("bc", "d")


@on_every_row
async def test_resealing_changes_only_the_sealed_value(store: AuthTokenStore) -> None:
    """The value and its expiry stay; afterwards the old key can be removed."""
    north, both, south = (_on(store, keyring, "prod") for keyring in (NORTH_ALONE, BOTH, SOUTH_ALONE))
    await north.put_value(*KEY, {"verifier": SECRET}, ttl=3600)
    await north.put_value("clients", "github", None)
    for call in (south.get_value, south.reseal_value):
        with pytest.raises(UnknownKeyError, match="'north'"):
            await call(*KEY)
    before = await _row(store)
    stale = [entry["name"] async for entry in both.list_values() if both.needs_reseal(entry)]
    assert stale == ["github", "state-123"]
    assert await both.reseal_value(*KEY)
    assert await both.reseal_value("clients", "github")
    assert not await both.reseal_value(*KEY)
    assert not await both.reseal_value("login", "nobody")
    after = await _row(store)
    assert replace(after, value=before.value) == before
    assert after.value.key_id == "south"
    assert [entry["name"] async for entry in both.list_values() if both.needs_reseal(entry)] == []
    assert await south.get_value("clients", "github", "missing") is None
    assert await south.pop_value(*KEY) == {"verifier": SECRET}


class _WritesMeanwhile(MemoryBackend):
    """Another process writes or pops the value after each read of it."""

    meanwhile: Callable[[], Awaitable[object]] | None = None

    async def get_value(self, key: ValueKey) -> ValueRow | None:
        row = await super().get_value(key)
        if self.meanwhile is not None:
            await self.meanwhile()
        return row


def test_resealing_loses_to_a_newer_write() -> None:
    async def main() -> None:
        backend = _WritesMeanwhile()
        north, both = (AuthTokenStore(backend=backend, keyring=keyring) for keyring in (NORTH_ALONE, BOTH))

        async def pop_and_put() -> None:
            await north.pop_value(*KEY)
            await north.put_value(*KEY, "newer")

        for meanwhile in (lambda: north.put_value(*KEY, "newer"), pop_and_put, lambda: north.pop_value(*KEY)):
            await north.put_value(*KEY, "old")
            backend.meanwhile = meanwhile
            assert not await both.reseal_value(*KEY)
            backend.meanwhile = None
            assert await north.get_value(*KEY) in ("newer", None)

    asyncio.run(main())


class _Answering(MemoryBackend):
    """Answers with a row that a test has changed."""

    changed: dict[str, Any]

    async def get_value(self, key: ValueKey) -> ValueRow | None:
        row = await super().get_value(key)
        return None if row is None else replace(row, **self.changed)

    async def pop_value(self, key: ValueKey) -> ValueRow | None:
        return await self.get_value(key)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key": ValueKey("login", "other")}, "answered with another value, that of namespace 'login', name 'other'"),
        ({"key": ValueKey("other", "state-123")}, "answered with another value"),
        ({"version": 2**62}, "version has a value that no store has written"),
        ({"version": None}, "version"),
        ({"version": True}, "version"),
        ({"expires_at": 2**62}, "expires_at"),
        ({"expires_at": "soon"}, "expires_at"),
        ({"created_at": None}, "created_at"),
        ({"updated_at": -(2**62)}, "updated_at"),
        ({"value": SealedValue("text", "k1")}, "value has a value that no store has written"),  # type: ignore[arg-type]
        ({"value": SealedValue(b"sealed", "a\nb")}, "key_id"),
    ],
)
def test_an_answer_that_no_store_has_written_is_refused(changed: dict[str, Any], message: str) -> None:
    async def main() -> None:
        backend = _Answering()
        async with AuthTokenStore(backend=backend, keyring=BOTH) as store:
            await store.put_value(*KEY, SECRET)
            backend.changed = changed
            for call in (store.get_value, store.pop_value, store.reseal_value):
                with pytest.raises(TamperedError, match=message):
                    await call(*KEY)

    asyncio.run(main())


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "nothing"])
def test_a_sealed_text_that_is_no_json_is_refused(text: str) -> None:
    """A program with the key has sealed it, but not this library."""

    async def main() -> None:
        backend = MemoryBackend()
        async with AuthTokenStore(backend=backend, keyring=BOTH) as store:
            await backend.put_value(KEY, Sealer(BOTH).seal_value(KEY, text), ttl=None)
            with pytest.raises(TamperedError) as caught:
                await store.get_value(*KEY)
            assert caught.value.__context__ is None

    asyncio.run(main())
