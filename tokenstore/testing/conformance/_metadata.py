"""Tests of the metadata beside the tokens: which write changes them, and the compare-and-set on them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from tokenstore.health import RowFilter
from tokenstore.protocol import Backend
from tokenstore.records import MAX_TOKEN_BYTES, NO_METADATA, Failure, ScannedRow, SealedMetadata
from tokenstore.testing.conformance._helpers import (
    KEY,
    LONG,
    OTHER,
    SEALING_OVERHEAD,
    THIRD,
    read_row,
    sealed,
    store_row,
    without_times,
)
from tokenstore.testing.conformance._testbed import Testbed, on_one_backend, on_two_backends


def _metadata(tag: str) -> SealedMetadata:
    return SealedMetadata(f"metadata-{tag}".encode(), f"metadata-key-{tag}")


async def _set(backend: Backend, tag: str) -> SealedMetadata:
    """Replace the row's metadata, whatever it is."""
    replaced = (await read_row(backend)).metadata.value
    assert await backend.set_metadata(KEY, _metadata(tag), replacing=replaced) is True
    return _metadata(tag)


class MetadataTests(Testbed):
    """Tests of the metadata beside the tokens."""

    @on_one_backend
    async def test_a_new_row_has_the_metadata_that_is_passed_with_it(self, backend: Backend) -> None:
        await backend.put(KEY, sealed())
        assert (await read_row(backend)).metadata == NO_METADATA
        await backend.put(OTHER, sealed(), metadata=_metadata("put"))
        assert await backend.insert(THIRD, sealed(), metadata=_metadata("insert")) is True
        assert await backend.insert(THIRD, sealed(), metadata=_metadata("late")) is False
        expected = [_metadata("put"), _metadata("insert")]
        assert [(await read_row(backend, key)).metadata for key in (OTHER, THIRD)] == expected
        assert type((await read_row(backend, OTHER)).metadata.value) is bytes
        scanned = [row.metadata_key_id for row in await backend.scan(limit=10)]
        assert scanned == [None, "metadata-key-put", "metadata-key-insert"]

    @on_one_backend
    async def test_only_a_listing_that_asks_for_metadata_reads_it(self, backend: Backend) -> None:
        """So does a search, in every range of a page."""
        await store_row(backend)
        for key in (OTHER, THIRD):
            await backend.put(key, sealed(), metadata=_metadata(key.user_id))
        everything = RowFilter(expiring_within=1e9)
        for wanted in (False, True):
            expected = {
                key: ((_metadata(key.user_id).value if wanted else None), f"metadata-key-{key.user_id}")
                for key in (OTHER, THIRD)
            } | {KEY: (None, None)}
            for page_size in (1, 2, 10):
                found: list[ScannedRow] = []
                after = None
                while page := await backend.scan(after=after, limit=page_size, with_metadata=wanted):
                    found += page
                    after = page[-1].key
                assert {row.key: (row.metadata, row.metadata_key_id) for row in found} == expected
                found, after = [], None
                while True:
                    several = await backend.search(everything, after=after, limit=page_size, with_metadata=wanted)
                    found += several.rows
                    if (after := several.end) is None:
                        break
                assert {row.key: (row.metadata, row.metadata_key_id) for row in found} == expected
                assert all(row.metadata is None or type(row.metadata) is bytes for row in found)

    @on_one_backend
    async def test_no_write_of_tokens_changes_metadata_by_itself(self, backend: Backend) -> None:
        await store_row(backend)
        metadata = await _set(backend, "a")
        await backend.put(KEY, sealed("b"))
        await asyncio.gather(*(backend.put(key, sealed("c")) for key in (KEY, OTHER, THIRD)))
        assert await backend.insert(KEY, sealed("d")) is False
        generation = (await read_row(backend)).generation
        assert await backend.claim_lease(KEY, duration=LONG, generation=generation, holder="h")
        assert await backend.rewrap(KEY, sealed("e"), generation=generation)
        assert await backend.release_lease(KEY, failure=Failure("unavailable", 0.0), generation=generation, holder="h")
        assert (await read_row(backend)).metadata == metadata
        assert await backend.complete_lease(KEY, sealed("f"), generation=generation, holder="h")
        record = await read_row(backend)
        assert (record.tokens, record.metadata) == (sealed("f"), metadata)

    @on_one_backend
    async def test_a_write_of_tokens_replaces_metadata_that_is_passed_with_it(self, backend: Backend) -> None:
        """Also by no metadata; a refused write changes neither."""
        generation = await store_row(backend)
        for metadata in (_metadata("a"), _metadata("b"), NO_METADATA):
            await backend.put(KEY, sealed(), metadata=metadata)
            generation += 1
            record = await read_row(backend)
            assert (record.metadata, record.generation) == (metadata, generation)
        for metadata in (_metadata("a"), _metadata("b"), NO_METADATA):
            assert await backend.complete_lease(KEY, sealed(), generation=generation, holder="h", metadata=metadata)
            generation += 1
            record = await read_row(backend)
            assert (record.metadata, record.generation) == (metadata, generation)
        assert not await backend.complete_lease(
            KEY, sealed("late"), generation=generation - 1, holder="h", metadata=_metadata("late")
        )
        record = await read_row(backend)
        assert (record.tokens, record.metadata, record.generation) == (sealed(), NO_METADATA, generation)

    @on_one_backend
    async def test_metadata_is_deleted_with_the_row(self, backend: Backend) -> None:
        await backend.put(KEY, sealed(), metadata=_metadata("a"))
        assert await backend.delete(KEY)
        assert await backend.set_metadata(KEY, _metadata("b"), replacing=_metadata("a").value) is False
        assert await backend.set_metadata(KEY, _metadata("b"), replacing=None) is False
        assert await backend.get(KEY) is None
        await backend.put(KEY, sealed())
        assert (await read_row(backend)).metadata == NO_METADATA

    @on_one_backend
    async def test_replacing_metadata_changes_nothing_else(self, backend: Backend) -> None:
        """The lease and the failure stay, and so do the generation and the times."""
        generation = await store_row(backend)
        await store_row(backend, OTHER)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        assert await backend.release_lease(KEY, generation=generation, holder="h", failure=Failure("invalid_grant"))
        for leased in (False, True):
            if leased:
                generation = await store_row(backend)
                assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
            before = await read_row(backend)
            metadata = await _set(backend, f"a-{leased}")
            assert without_times(await read_row(backend)) == without_times(replace(before, metadata=metadata))
        assert (await read_row(backend, OTHER)).metadata == NO_METADATA
        assert await backend.complete_lease(KEY, sealed("new"), generation=generation, holder="h")
        assert (await read_row(backend)).metadata == _metadata("a-True")

    @on_one_backend
    async def test_metadata_is_replaced_only_if_it_is_what_was_read(self, backend: Backend) -> None:
        """The sealed bytes are compared as they are: not as text, and not without blanks at the end."""
        await store_row(backend)
        assert await backend.set_metadata(KEY, _metadata("new"), replacing=b"") is False
        for value in (b"value", b"\0\xff'\"\\%", b"x" * 300_000):
            replaced = (await read_row(backend)).metadata.value
            assert await backend.set_metadata(KEY, SealedMetadata(value, "k"), replacing=replaced) is True
            for other in (None, b"", value + b" ", value + b"\0", value[:-1], value.swapcase() + b"!", replaced):
                assert await backend.set_metadata(KEY, _metadata("new"), replacing=other) is False
            assert (await read_row(backend)).metadata == SealedMetadata(value, "k")
        assert await backend.set_metadata(KEY, NO_METADATA, replacing=value) is True
        assert (await read_row(backend)).metadata == NO_METADATA
        assert await backend.set_metadata(KEY, _metadata("new"), replacing=value) is False

    @on_one_backend
    async def test_metadata_of_maximum_size(self, backend: Backend) -> None:
        blob = bytes(range(256)) * (MAX_TOKEN_BYTES // 256) + b"\0" * SEALING_OVERHEAD
        big, bigger = SealedMetadata(blob, "k" * 32), SealedMetadata(blob[::-1], "K" * 32)
        tokens = sealed(access_token=blob, refresh_token=blob, extra=blob)
        await backend.put(KEY, tokens, metadata=big)
        assert (await read_row(backend)).metadata == big
        assert await backend.set_metadata(KEY, bigger, replacing=blob) is True
        record = await read_row(backend)
        assert (record.tokens, record.metadata) == (tokens, bigger)

    @on_two_backends()
    async def test_of_several_replacements_of_the_same_metadata_one_succeeds(
        self, backend: Backend, other: Backend
    ) -> None:
        await store_row(backend)
        for turn in range(5):
            replaced = (await read_row(backend)).metadata.value
            versions = [_metadata(f"{turn}-{number}") for number in range(8)]
            done = await asyncio.gather(
                *(
                    (backend, other)[number % 2].set_metadata(KEY, metadata, replacing=replaced)
                    for number, metadata in enumerate(versions)
                )
            )
            assert done.count(True) == 1
            assert (await read_row(backend)).metadata == versions[done.index(True)]

    @on_two_backends()
    async def test_concurrent_updates_lose_nothing(self, backend: Backend, other: Backend) -> None:
        """Each caller reads, adds a word and writes, until its write succeeds, while tokens are stored."""
        await store_row(backend)

        async def add(word: bytes, rows: Backend) -> None:
            while True:
                found = (await read_row(rows)).metadata.value
                words = SealedMetadata(word if found is None else found + b" " + word, "k")
                if await rows.set_metadata(KEY, words, replacing=found):
                    return

        words = [b"%d" % number for number in range(12)]
        await asyncio.gather(
            *(add(word, (backend, other)[number % 2]) for number, word in enumerate(words)),
            *(other.put(KEY, sealed(str(number))) for number in range(4)),
        )
        assert sorted(((await read_row(backend)).metadata.value or b"").split()) == sorted(words)
