"""Tests of reading, writing and listing rows."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from itertools import product

from tokenstore.protocol import Backend
from tokenstore.records import (
    MAX_ACCOUNT_BYTES,
    MAX_PROVIDER_BYTES,
    MAX_TOKEN_BYTES,
    MAX_USER_ID_BYTES,
    Failure,
    ScannedRow,
    TokenKey,
)
from tokenstore.testing.conformance._helpers import (
    KEY,
    LONG,
    OTHER,
    SEALING_OVERHEAD,
    THIRD,
    TIMEOUT,
    all_keys,
    assert_cannot_change,
    fail_refresh,
    in_key_order,
    put_all,
    read_row,
    read_rows,
    sealed,
    store_row,
    until,
    without_times,
)
from tokenstore.testing.conformance._testbed import Testbed, on_one_backend, on_two_backends

DISTINCT_TEXTS = [
    "alice",
    "Alice",
    "ALICE",
    "bob",
    "bob ",
    " bob",
    "bob\t",
    "bob\n",
    "é",  # one code point
    "e\u0301",  # two code points that look the same, and are equal after Unicode normalisation
    "e",
    "ß",
    "ss",
    "\u0131",  # dotless i
    "i",
    "İ",
    "K",
    "\u212a",  # the Kelvin sign
    "\ufb00",  # sorts after all emoji as UTF-16, but before them as UTF-8
    "🔑",
    "👩‍👩‍👧",
    "👩",
    "\u200b",
    "\ufeff",
    "\x01",
    "\x7f",
    "%",
    "_",
    "a_b",
    "axb",
    "a%",
    "\\",
    "\\\\",
    "'",
    "''",
    '"',
    "`",
    "$1",
    ":p",
    "%s",
    "%(p)s",
    "?",
    "; --",
    "0",
    "00",
    "1e0",
    "1",
    "null",
    "\uffff",
    "\U0010ffff",
]
"""Different texts, some of which are equal under some collation, driver or LIKE pattern."""


class RowTests(Testbed):
    """Tests of reading, writing and listing rows."""

    @on_one_backend
    async def test_put_inserts_a_row(self, backend: Backend) -> None:
        await backend.put(KEY, sealed())
        record = await read_row(backend)
        assert (record.key, record.tokens) == (KEY, sealed())
        assert type(record.tokens.access_token) is bytes
        assert type(record.generation) is int
        assert record.generation > 0
        assert (record.lease_holder, record.lease_expires_in, record.failure) == (None, None, None)
        assert 0 <= record.updated_at - record.created_at < 1_000_000
        assert type(record.as_of) is int
        assert 0 <= record.as_of - record.updated_at < TIMEOUT * 1_000_000
        # Half an hour allows for a badly set clock, but not for a time in the wrong time zone.
        assert abs(record.created_at / 1_000_000 - time.time()) < 1800

    @on_one_backend
    async def test_insert_changes_no_row_that_exists(self, backend: Backend) -> None:
        assert await backend.insert(KEY, sealed("first")) is True
        record = await read_row(backend)
        assert (record.tokens, record.lease_holder, record.failure) == (sealed("first"), None, None)
        assert await backend.claim_lease(KEY, generation=record.generation, holder="h", duration=LONG)
        before = await read_row(backend)
        assert await backend.insert(KEY, sealed("second")) is False
        assert without_times(await read_row(backend)) == without_times(before)
        assert await backend.insert(OTHER, sealed("other")) is True
        assert await backend.delete(KEY)
        assert await backend.insert(KEY, sealed("third")) is True
        again = await read_row(backend)
        assert (again.tokens, again.lease_holder) == (sealed("third"), None)
        assert again.generation != record.generation

    @on_two_backends()
    async def test_one_of_many_inserts_succeeds(self, backend: Backend, other: Backend) -> None:
        for turn in range(5):
            key = KEY._replace(account=f"{turn}")
            versions = [sealed(f"{turn}-{number}") for number in range(8)]
            inserted = await asyncio.gather(
                *((backend, other)[number % 2].insert(key, tokens) for number, tokens in enumerate(versions))
            )
            assert inserted.count(True) == 1
            assert (await read_row(backend, key)).tokens == versions[inserted.index(True)]

    @on_one_backend
    async def test_the_clock_is_the_one_that_rows_are_read_with(self, backend: Backend) -> None:
        _ = await store_row(backend)
        earlier = (await read_row(backend)).as_of
        now = await backend.clock()
        assert type(now) is int
        assert earlier <= now <= (await read_row(backend)).as_of

    @on_one_backend
    async def test_absent_fields_are_read_as_none(self, backend: Backend) -> None:
        tokens = sealed(
            refresh_token=None,
            extra=None,
            access_token_expires_at=None,
            refresh_token_expires_at=None,
            access_token_expiry_known=False,
        )
        await backend.put(KEY, tokens)
        assert (await read_row(backend)).tokens == tokens
        await backend.put(KEY, sealed())
        await backend.put(KEY, tokens)
        assert (await read_row(backend)).tokens == tokens, "a field of the replaced row was kept"

    @on_one_backend
    async def test_put_replaces_a_row(self, backend: Backend) -> None:
        """The generation grows by one, ``created_at`` stays, and ``updated_at`` becomes later."""
        await backend.put(KEY, sealed("a"))
        old = await read_row(backend)

        async def later() -> bool:
            await backend.put(OTHER, sealed())
            return (await read_row(backend, OTHER)).updated_at > old.updated_at

        await until(later, "the database's clock has advanced")
        await backend.put(KEY, sealed("b"))
        new = await read_row(backend)
        assert new.tokens == sealed("b")
        assert new.generation == old.generation + 1
        assert new.created_at == old.created_at
        assert new.updated_at > old.updated_at

    @on_one_backend
    async def test_put_of_the_same_values_changes_the_generation(self, backend: Backend) -> None:
        generation = await store_row(backend)
        await backend.put(KEY, sealed())
        assert (await read_row(backend)).generation == generation + 1

    @on_one_backend
    async def test_put_clears_lease_and_failure(self, backend: Backend) -> None:
        generation = await store_row(backend)
        await fail_refresh(backend, generation, Failure("invalid_grant"))
        await backend.put(KEY, sealed("b"))
        record = await read_row(backend)
        assert (record.lease_holder, record.lease_expires_in, record.failure) == (None, None, None)
        assert await backend.claim_lease(KEY, generation=generation + 1, holder="h", duration=LONG)
        await backend.put(KEY, sealed("c"))
        record = await read_row(backend)
        assert (record.lease_holder, record.lease_expires_in, record.failure) == (None, None, None)

    @on_one_backend
    async def test_delete_removes_one_row_and_its_lease(self, backend: Backend) -> None:
        """``delete`` returns whether there was a row."""
        await store_row(backend, OTHER)
        assert await backend.delete(KEY) is False
        generation = await store_row(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        assert await backend.delete(KEY) is True
        assert await backend.get(KEY) is None
        assert await backend.delete(KEY) is False
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG) is False
        assert (await read_row(backend, OTHER)).tokens == sealed()

    @on_one_backend
    async def test_generations_are_not_reused_after_a_delete(self, backend: Backend) -> None:
        """A caller that still has a generation of a deleted row cannot change the new row."""
        seen: set[int] = set()
        for _ in range(3):
            generation = await store_row(backend)
            assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
            assert generation not in seen
            seen.add(generation)
            await backend.delete(KEY)
        generation = await store_row(backend, tag="new")
        for old in seen:
            await assert_cannot_change(backend, old, "h")
        record = await read_row(backend)
        assert (record.tokens, record.generation, record.lease_holder) == (sealed("new"), generation, None)

    @on_one_backend
    async def test_keys_compare_byte_for_byte(self, backend: Backend) -> None:
        """Providers, user ids and accounts are not case-folded, normalised, trimmed or matched as patterns."""
        keys = [
            key
            for text in DISTINCT_TEXTS
            for key in (TokenKey(text, "u"), TokenKey("p", text), TokenKey("p", "u", text))
        ]
        keys.append(TokenKey("p", "u"))
        assert len(set(keys)) == len(keys)
        expected = {key: sealed(str(number)) for number, key in enumerate(keys)}
        await put_all(backend, expected)
        assert {record.key: record.tokens for record in await read_rows(backend, *keys) if record} == expected
        assert await all_keys(backend, 1000) == in_key_order(keys)
        for key in keys[::5]:
            found = await backend.scan(provider=key.provider, user_id=key.user_id, limit=1000)
            assert key in [row.key for row in found]
            assert {row.key[:2] for row in found} == {key[:2]}
            assert await backend.delete(key)
            assert not await backend.delete(key)
        left = [key for number, key in enumerate(keys) if number % 5]
        assert await all_keys(backend, 1000) == in_key_order(left)

    @on_one_backend
    async def test_keys_of_maximum_length(self, backend: Backend) -> None:
        """A provider and an account of 255 bytes and a user id of 512 bytes.

        Keys that differ only in the last byte of a part are different.
        """
        limits = (MAX_PROVIDER_BYTES, MAX_USER_ID_BYTES, MAX_ACCOUNT_BYTES)
        keys = [
            TokenKey(*("x" * (limit - 1) + end for limit, end in zip(limits, ends, strict=True)))
            for ends in product("ab", repeat=3)
        ]
        keys.append(TokenKey(*("🔑" * (limit // 4) for limit in limits)))
        await put_all(backend, {key: sealed("".join(part[-1] for part in key)) for key in keys})
        for key in keys:
            assert (await read_row(backend, key)).tokens == sealed("".join(part[-1] for part in key))
        assert await all_keys(backend, 2) == in_key_order(keys)

    @on_one_backend
    async def test_extreme_times(self, backend: Backend) -> None:
        """Times from the year 1 to the year 9999 keep their microseconds; 0 is a time and does not mean None."""
        first, last = -62_135_596_800_000_000, 253_402_300_799_999_999
        for number in (first, last, 0, 1, -1, 2**31 * 1_000_000, None):
            tokens = sealed(access_token_expires_at=number, refresh_token_expires_at=number)
            await backend.put(KEY, tokens)
            assert (await read_row(backend)).tokens == tokens
            [row] = await backend.scan(limit=2)
            assert (row.access_token_expires_at, row.refresh_token_expires_at) == (number, number)

    @on_one_backend
    async def test_tokens_of_maximum_size_and_any_bytes(self, backend: Backend) -> None:
        """Tokens of the maximum size, with what sealing adds, are read back unchanged."""
        blob = bytes(range(256)) * (MAX_TOKEN_BYTES // 256) + b"\0\xff'\"\\%" * 20
        assert len(blob) >= MAX_TOKEN_BYTES + SEALING_OVERHEAD
        big = sealed(access_token=blob, refresh_token=blob[::-1], extra=blob[1:], key_id="k" * 32)
        small = sealed(access_token=b"\0", refresh_token=b"\xff\0", extra=b"\\x00")
        await put_all(backend, {KEY: big, OTHER: small})
        assert [(await read_row(backend, key)).tokens for key in (KEY, OTHER)] == [big, small]
        generation = (await read_row(backend)).generation
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        swapped = replace(big, access_token=blob[::-1])
        assert await backend.complete_lease(KEY, swapped, generation=generation, holder="h")
        assert (await read_row(backend)).tokens == swapped

    @on_one_backend
    async def test_as_of_is_the_database_time_of_the_read(self, backend: Backend) -> None:
        """``get`` and ``scan`` set ``as_of`` from the clock by which leases and failures expire."""
        generation = await store_row(backend)
        await store_row(backend, OTHER)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)

        async def clocks() -> list[int]:
            # One read alone, and two at the same time, which may share a statement.
            one, (_, many), (row, *_) = (
                await read_row(backend),
                await asyncio.gather(read_row(backend, OTHER), read_row(backend)),
                await backend.scan(limit=1),
            )
            for record in (one, many):
                assert record.lease_expires_in is not None
                ends.add(round(record.lease_expires_in * 1_000_000 + record.as_of))
            return [one.as_of, many.as_of, row.as_of]

        ends: set[int] = set()
        before = await clocks()

        async def later() -> bool:
            return min(await clocks()) > max(before)

        assert before == sorted(before)
        await until(later, "the database's clock has advanced")
        assert len(ends) == 1, "as_of + lease_expires_in differs between reads of one lease"

    # scan

    @on_one_backend
    async def test_scan_by_provider_and_user(self, backend: Backend) -> None:
        keys = [TokenKey(provider, user) for provider in ("a", "b", "c") for user in ("1", "2", "3")]
        await put_all(backend, {key: sealed() for key in reversed(keys)})
        for limit in (1, 2, 3, 9, 10):
            assert await all_keys(backend, limit) == keys
            assert await all_keys(backend, limit, provider="b") == keys[3:6]
            assert await all_keys(backend, limit, user_id="2") == keys[1::3]
            assert await all_keys(backend, limit, provider="b", user_id="2") == [keys[4]]
            assert await all_keys(backend, limit, provider="d") == []
            assert await all_keys(backend, limit, provider="a", user_id="4") == []

    @on_one_backend
    async def test_scan_over_rows_that_differ_in_the_account(self, backend: Backend) -> None:
        """Pages begin and end within one user's accounts; the empty account comes first."""
        keys = in_key_order(
            TokenKey(provider, user, account)
            for provider, user in (("a", "2"), ("b", "1"), ("b", "2"), ("c", "1"))
            for account in ("", "A", "a", "a ", "é", "😀")
        )
        await put_all(backend, {key: sealed() for key in reversed(keys)})
        for limit in (1, 2, 4, 5, 6, 7, 24, 25):
            assert await all_keys(backend, limit) == keys
            assert await all_keys(backend, limit, provider="b") == keys[6:18]
            assert await all_keys(backend, limit, user_id="2") == [*keys[:6], *keys[12:18]]
            assert await all_keys(backend, limit, provider="b", user_id="2") == keys[12:18]
        for after in (*keys, *(key._replace(account=f"{key.account}!") for key in keys)):
            expected = [key for key in keys if key > after]
            assert await all_keys(backend, 5, after=after) == expected
            assert await all_keys(backend, 5, after=after, provider="b") == [k for k in expected if k.provider == "b"]
            assert await all_keys(backend, 5, after=after, user_id="2") == [k for k in expected if k.user_id == "2"]

    @on_one_backend
    async def test_scan_after_a_key_that_does_not_exist(self, backend: Backend) -> None:
        keys = [TokenKey(provider, user) for provider in ("b", "d") for user in ("2", "4")]
        await put_all(backend, {key: sealed() for key in keys})
        places = [TokenKey(provider, user) for provider in "abcde" for user in "12345"]
        for after in places:
            expected = [key for key in keys if key > after]
            assert await all_keys(backend, 3, after=after) == expected
            assert await all_keys(backend, 3, after=after, provider="d") == [k for k in expected if k.provider == "d"]
            assert await all_keys(backend, 3, after=after, user_id="4") == [k for k in expected if k.user_id == "4"]

    @on_one_backend
    async def test_scan_returns_all_fields_but_the_tokens(self, backend: Backend) -> None:
        await put_all(
            backend,
            {
                KEY: sealed("1"),
                OTHER: sealed("2", refresh_token=None, refresh_token_expires_at=None, access_token_expiry_known=False),
                THIRD: sealed("3", refresh_token=None, issued=True),
            },
        )
        expected = []
        for key in (KEY, OTHER, THIRD):
            record = await read_row(backend, key)
            expected.append(
                ScannedRow(
                    key=key,
                    has_refresh_token=record.tokens.refresh_token is not None,
                    issued=key == THIRD,
                    access_token_expires_at=record.tokens.access_token_expires_at,
                    refresh_token_expires_at=record.tokens.refresh_token_expires_at,
                    access_token_expiry_known=record.tokens.access_token_expiry_known,
                    key_id=record.tokens.key_id,
                    generation=record.generation,
                    created_at=record.created_at,
                    updated_at=record.updated_at,
                    as_of=0,
                    metadata_key_id=record.metadata.key_id,
                )
            )
        found = await backend.scan(limit=10)
        assert [replace(row, as_of=0) for row in found] == expected
        assert {type(row.has_refresh_token) for row in found} == {bool}
        assert {type(row.issued) for row in found} == {bool}
        assert {type(row.access_token_expiry_known) for row in found} == {bool}

    # Leases
