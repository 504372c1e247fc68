"""Tests of rows that have no tokens yet, and of rows whose provider issues tokens without a refresh token."""

from __future__ import annotations

import asyncio

from tokenstore.health import RowFilter
from tokenstore.protocol import Backend, SupportsRowLocks
from tokenstore.records import NO_METADATA, Failure, SealedMetadata, SealedRecord, TokenKey, empty_tokens
from tokenstore.testing.conformance._helpers import (
    KEY,
    LONG,
    OTHER,
    THIRD,
    LockingBackend,
    fail_refresh,
    read_row,
    sealed,
    without_times,
)
from tokenstore.testing.conformance._testbed import Testbed, on_one_backend, on_two_backends

_EMPTY = empty_tokens(1)
_US = 1_000_000


async def insert_empty(backend: Backend, key: TokenKey = KEY) -> SealedRecord:
    assert await backend.insert(key, _EMPTY) is True
    return await read_row(backend, key)


class EmptyRowTests(Testbed):
    """Tests of empty rows: :class:`tokenstore.records.SealedTokens` says what they are."""

    @on_one_backend
    async def test_an_empty_row_is_leased_and_completed_like_any_other(self, backend: Backend) -> None:
        empty = await insert_empty(backend)
        assert (empty.tokens, empty.tokens.is_empty) == (_EMPTY, True)
        assert type(empty.tokens.access_token) is bytes
        generation = empty.generation
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        assert not await backend.claim_lease(KEY, generation=generation, holder="other", duration=LONG)
        assert await backend.complete_lease(KEY, sealed(), generation=generation, holder="h")
        record = await read_row(backend)
        assert (record.tokens, record.generation, record.lease_holder) == (sealed(), generation + 1, None)

    @on_one_backend
    async def test_a_failed_refresh_leaves_an_empty_row_with_a_failure(self, backend: Backend) -> None:
        generation = (await insert_empty(backend)).generation
        failure = Failure("refused/invalid_client", LONG)
        await fail_refresh(backend, generation, failure)
        record = await read_row(backend)
        assert (record.tokens, record.failure and record.failure.code) == (_EMPTY, failure.code)
        assert await backend.clear_failure(KEY)
        assert (await read_row(backend)).failure is None

    @on_one_backend
    async def test_an_empty_row_is_in_no_list(self, backend: Backend) -> None:
        await backend.put(OTHER, sealed())
        _ = await insert_empty(backend)
        _ = await insert_empty(backend, THIRD)
        assert [row.key for row in await backend.scan(limit=1)] == [OTHER]
        assert [row.key for row in await backend.scan(limit=10)] == [OTHER]
        assert [row.key for row in await backend.scan(user_id=OTHER.user_id, limit=10)] == [OTHER]
        for where in (RowFilter(), RowFilter(expiring_within=1e9), RowFilter("reauthorization_required")):
            page = await backend.search(where, limit=10)
            assert ([row.key for row in page.rows], page.end) == ([OTHER], None)

    @on_one_backend
    async def test_an_insert_replaces_an_empty_row_and_nothing_else(self, backend: Backend) -> None:
        """The tokens of an empty row replace nothing, not even another empty row, which may be leased."""
        empty = await insert_empty(backend)
        assert await backend.claim_lease(KEY, generation=empty.generation, holder="h", duration=LONG)
        before = await read_row(backend)
        assert await backend.insert(KEY, empty_tokens(2)) is False
        assert without_times(await read_row(backend)) == without_times(before)
        assert await backend.insert(KEY, sealed("a")) is True
        record = await read_row(backend)
        assert (record.tokens, record.generation, record.lease_holder) == (sealed("a"), empty.generation + 1, None)
        assert not await backend.complete_lease(KEY, sealed("late"), generation=empty.generation, holder="h")
        for later in (sealed("b"), _EMPTY):
            assert await backend.insert(KEY, later) is False
        assert without_times(await read_row(backend)) == without_times(record)

    @on_one_backend
    async def test_an_insert_replaces_the_metadata_of_an_empty_row(self, backend: Backend) -> None:
        """Without metadata of its own, the row has none afterwards."""
        for key, metadata in ((KEY, None), (OTHER, SealedMetadata(b"new", "k2"))):
            _ = await insert_empty(backend, key)
            assert await backend.set_metadata(key, SealedMetadata(b"old", "k1"), replacing=None)
            assert await backend.insert(key, sealed(), metadata=metadata) is True
            assert (await read_row(backend, key)).metadata == (metadata or NO_METADATA)

    @on_two_backends()
    async def test_one_of_many_inserts_into_an_empty_row_succeeds(self, backend: Backend, other: Backend) -> None:
        for turn in range(5):
            key = KEY._replace(account=f"{turn}")
            versions = [sealed(f"{turn}-{number}") for number in range(6)]
            _, _, *inserted = await asyncio.gather(
                *(
                    (backend, other)[number % 2].insert(key, tokens)
                    for number, tokens in enumerate([_EMPTY, _EMPTY, *versions])
                )
            )
            assert inserted.count(True) == 1
            assert (await read_row(backend, key)).tokens == versions[inserted.index(True)]

    @on_one_backend
    async def test_tokens_replace_an_empty_row(self, backend: Backend) -> None:
        generation = (await insert_empty(backend)).generation
        await backend.put(KEY, sealed())
        record = await read_row(backend)
        assert (record.tokens, record.generation) == (sealed(), generation + 1)

    @on_one_backend
    async def test_an_empty_row_can_be_deleted(self, backend: Backend) -> None:
        generation = (await insert_empty(backend)).generation
        assert await backend.delete(KEY) is True
        assert await backend.get(KEY) is None
        assert (await insert_empty(backend)).generation != generation

    @on_one_backend
    async def test_an_empty_row_is_due_when_it_may_be_deleted(self, backend: Backend) -> None:
        now = await backend.clock()
        assert await backend.insert(KEY, empty_tokens(now + 1000 * _US))
        assert await backend.scan_due(provider=KEY.provider, within=900.0, limit=10) == []
        await backend.put(OTHER, sealed(access_token_expires_at=now))
        rows = await backend.scan_due(provider=KEY.provider, within=1100.0, limit=10)
        assert [(row.key, row.is_empty) for row in rows] == [(OTHER, False), (KEY, True)]
        assert {type(row.is_empty) for row in rows} == {bool}
        await backend.put(KEY, sealed(access_token_expires_at=now))
        rows = await backend.scan_due(provider=KEY.provider, within=0.0, limit=10)
        assert [row.is_empty for row in rows] == [False, False]

    @on_one_backend
    async def test_issued_tokens_are_due_without_a_refresh_token(self, backend: Backend) -> None:
        issued = sealed(refresh_token=None, refresh_token_expires_at=None, issued=True)
        assert issued.due_at == issued.access_token_expires_at
        generation = (await insert_empty(backend)).generation
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        assert await backend.complete_lease(KEY, issued, generation=generation, holder="h")
        [row] = await backend.scan_due(provider=KEY.provider, within=0.0, limit=10)
        assert (row.key, row.due_at, row.is_empty) == (KEY, issued.access_token_expires_at, False)
        [listed] = await backend.scan(limit=10)
        assert (listed.has_refresh_token, listed.issued) == (False, True)
        assert [row.key for row in (await backend.search(RowFilter("expired"), limit=10)).rows] == [KEY]
        assert (await backend.search(RowFilter("reauthorization_required"), limit=10)).rows == []
        await backend.put(KEY, sealed(refresh_token=None))
        assert await backend.scan_due(provider=KEY.provider, within=0.0, limit=10) == []
        assert [row.issued for row in await backend.scan(limit=10)] == [False]


class LockedEmptyRowTests(Testbed):
    """Tests of empty rows in transactions."""

    @on_one_backend
    async def test_a_transaction_sees_and_fills_an_empty_row(self, backend: LockingBackend) -> None:
        assert isinstance(backend, SupportsRowLocks)
        generation = (await insert_empty(backend)).generation
        async with backend.transaction() as transaction:
            locked = await transaction.lock(KEY)
            assert locked is not None
            assert locked.tokens.is_empty
            assert await transaction.insert(KEY, _EMPTY) is False
            assert await transaction.insert(KEY, sealed("a")) is True
            assert await transaction.insert(KEY, sealed("b")) is False
            assert await transaction.insert(OTHER, _EMPTY) is True
            assert await transaction.insert(OTHER, sealed("c")) is True
        record = await read_row(backend)
        assert (record.tokens, record.generation) == (sealed("a"), generation + 1)
        assert (await read_row(backend, OTHER)).tokens == sealed("c")
