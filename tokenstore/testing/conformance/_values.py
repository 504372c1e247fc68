"""Tests of values: sealed bytes under a group and a name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import product
from typing import Protocol, cast

import pytest

from tokenstore.errors import StoreClosedError, TableMissingError
from tokenstore.protocol import Backend, SupportsValues
from tokenstore.testing.conformance._helpers import LONG, SEALING_OVERHEAD, SHORT, TIMEOUT, raises, until
from tokenstore.testing.conformance._rows import DISTINCT_TEXTS
from tokenstore.testing.conformance._testbed import Testbed, on_one_backend, on_two_backends, on_url
from tokenstore.value_records import (
    MAX_VALUE_BYTES,
    MAX_VALUE_GROUP_BYTES,
    MAX_VALUE_NAME_BYTES,
    ScannedValue,
    SealedValue,
    ValueKey,
    ValueRow,
)

KEY = ValueKey("login", "state-1")
OTHER = ValueKey("login", "state-2")
STRANGER = ValueKey("clients", "state-1")


class ValueBackend(Backend, SupportsValues, Protocol):
    """A backend that also keeps values."""


def sealed_value(tag: str = "a") -> SealedValue:
    """Invent a sealed value; both fields are derived from ``tag``."""
    return SealedValue(f"value-{tag}".encode(), f"key-{tag}")


async def _read(backend: ValueBackend, key: ValueKey = KEY) -> ValueRow:
    row = await backend.get_value(key)
    assert row is not None, f"no value for {key}"
    return row


async def _put_all(backend: ValueBackend, *keys: ValueKey, ttl: float | None = None) -> None:
    for key in keys:
        await backend.put_value(key, sealed_value(), ttl=ttl)


async def _wait_for_expiry(backend: ValueBackend, *keys: ValueKey) -> None:
    async def expired() -> bool:
        return [await backend.get_value(key) for key in keys] == [None] * len(keys)

    await until(expired, "the values have expired")


async def _listed(backend: ValueBackend, limit: int, group: str | None = None) -> list[ScannedValue]:
    found: list[ScannedValue] = []
    while True:
        page = await backend.scan_values(group=group, after=found[-1].key if found else None, limit=limit)
        assert len(page) <= limit
        found += page
        if len(page) < limit:
            return found


def _each_operation(backend: ValueBackend) -> list[Callable[[], Awaitable[object]]]:
    """Return one call of each operation on values."""
    return [
        lambda: backend.put_value(KEY, sealed_value(), ttl=None),
        lambda: backend.get_value(KEY),
        lambda: backend.pop_value(KEY),
        lambda: backend.insert_value(KEY, sealed_value(), ttl=None),
        lambda: backend.delete_values(KEY.group),
        lambda: backend.purge_values(limit=1),
        lambda: backend.scan_values(limit=1),
        lambda: backend.rewrap_value(KEY, sealed_value(), version=1),
    ]


class ValueConformance(Testbed):
    """The tests of :class:`tokenstore.protocol.SupportsValues`, for backends that keep values."""

    @on_one_backend
    async def test_keeps_values(self, backend: ValueBackend) -> None:
        assert isinstance(backend, SupportsValues)

    @on_one_backend
    async def test_put_value_inserts_a_value(self, backend: ValueBackend) -> None:
        await backend.put_value(KEY, sealed_value(), ttl=None)
        row = await _read(backend)
        assert (row.key, row.value, row.expires_at) == (KEY, sealed_value(), None)
        assert type(row.value.sealed) is bytes
        assert type(row.version) is int
        assert row.version > 0
        assert 0 <= row.updated_at - row.created_at < 1_000_000
        # Half an hour allows for a badly set clock, but not for a time in the wrong time zone.
        assert abs(row.created_at / 1_000_000 - time.time()) < 1800

    @on_one_backend
    async def test_a_value_expires_so_many_seconds_after_it_was_put(self, backend: ValueBackend) -> None:
        await backend.put_value(KEY, sealed_value(), ttl=LONG)
        row = await _read(backend)
        assert row.expires_at is not None
        assert abs(row.expires_at - row.updated_at - LONG * 1_000_000) < 1_000_000

    @on_one_backend
    async def test_put_value_replaces_everything_but_the_first_time(self, backend: ValueBackend) -> None:
        """The value, its key's name and its expiry are those of the last write, which gets another version."""
        await _put_all(backend, KEY)
        created_at = (await _read(backend)).created_at
        versions = set()
        for number, ttl in enumerate((None, LONG, None, 2 * LONG, 0.5 * LONG)):
            await backend.put_value(KEY, sealed_value(str(number)), ttl=ttl)
            row = await _read(backend)
            versions.add(row.version)
            assert (row.value, row.created_at) == (sealed_value(str(number)), created_at)
            left = None if row.expires_at is None else (row.expires_at - row.updated_at) / 1_000_000
            assert left == (None if ttl is None else pytest.approx(ttl, abs=1))
        assert len(versions) == 5

    @on_one_backend
    async def test_a_value_put_after_an_earlier_one_expired_is_a_new_one(self, backend: ValueBackend) -> None:
        """Its ``created_at`` is that of this put, whether or not the expired value was purged before."""
        await _put_all(backend, KEY, ttl=SHORT)
        await _wait_for_expiry(backend, KEY)
        started = await backend.clock()
        await _put_all(backend, KEY, ttl=LONG)
        row = await _read(backend)
        assert started - 1000 <= row.created_at, "it has the time of the expired value"
        assert 0 <= row.updated_at - row.created_at < 1_000_000
        await _put_all(backend, KEY)
        assert (await _read(backend)).created_at == row.created_at

    @on_one_backend
    async def test_values_are_read_back_byte_for_byte(self, backend: ValueBackend) -> None:
        """So are the largest ones, under the longest keys."""
        key = ValueKey("g" * MAX_VALUE_GROUP_BYTES, "n" * MAX_VALUE_NAME_BYTES)
        every_byte = bytes(range(256))
        large = every_byte * ((MAX_VALUE_BYTES + SEALING_OVERHEAD) // 256 + 1)
        for sealed in (every_byte, b"\0", large):
            value = SealedValue(sealed, "k" * 32)
            await backend.put_value(key, value, ttl=None)
            assert (await _read(backend, key)).value == value
        popped = await backend.pop_value(key)
        assert popped is not None
        assert popped.value.sealed == large

    @on_one_backend
    async def test_keys_of_values_are_compared_byte_for_byte(self, backend: ValueBackend) -> None:
        keys = [ValueKey(*pair) for text in DISTINCT_TEXTS for pair in ((text, "n"), ("g", text))]
        for number, key in enumerate(keys):
            await backend.put_value(key, sealed_value(str(number)), ttl=None)
        for number, key in enumerate(keys):
            row = await _read(backend, key)
            assert (row.key, row.value) == (key, sealed_value(str(number)))
        for number, key in enumerate(keys):
            popped = await backend.pop_value(key)
            assert popped is not None
            assert (popped.key, popped.value) == (key, sealed_value(str(number)))
        assert await backend.scan_values(limit=1) == []

    @on_one_backend
    async def test_an_expired_value_is_never_returned(self, backend: ValueBackend) -> None:
        await _put_all(backend, KEY, ttl=SHORT)
        await _put_all(backend, OTHER)
        await _wait_for_expiry(backend, KEY)
        assert await backend.pop_value(KEY) is None
        assert [row.key for row in await _listed(backend, 10)] == [OTHER]
        assert await backend.get_value(KEY) is None
        await backend.put_value(KEY, sealed_value("anew"), ttl=None)
        assert (await _read(backend)).value == sealed_value("anew")

    @on_one_backend
    async def test_pop_value_deletes_what_it_returns(self, backend: ValueBackend) -> None:
        await _put_all(backend, KEY, OTHER, STRANGER, ttl=LONG)
        row = await _read(backend)
        assert await backend.pop_value(KEY) == row
        assert await backend.pop_value(KEY) is None
        assert await backend.get_value(KEY) is None
        assert [row.key for row in await _listed(backend, 10)] == [STRANGER, OTHER]

    @on_one_backend
    async def test_delete_values_deletes_one_group(self, backend: ValueBackend) -> None:
        await _put_all(backend, KEY, OTHER, STRANGER)
        assert await backend.delete_values("logi") == 0
        assert await backend.delete_values(KEY.group) == 2
        assert await backend.delete_values(KEY.group) == 0
        assert [row.key for row in await _listed(backend, 10)] == [STRANGER]

    @on_one_backend
    async def test_purge_values_deletes_expired_values_in_batches(self, backend: ValueBackend) -> None:
        """Not more at once than asked for; live values stay."""
        expired = [ValueKey("login", f"old-{number}") for number in range(25)]
        for number, key in enumerate(expired):
            # Each one expires in a millisecond of its own, the resolution of the coarsest clock.
            await backend.put_value(key, sealed_value(), ttl=SHORT + number / 500)
        await _put_all(backend, KEY, ttl=LONG)
        await _put_all(backend, OTHER)
        await _wait_for_expiry(backend, *expired)
        batches: list[int] = []
        while not batches or batches[-1] >= 10:
            batches.append(await backend.purge_values(limit=10))
        assert batches == [10, 10, 5]
        assert await backend.purge_values(limit=10) == 0
        assert [row.key for row in await _listed(backend, 10)] == [KEY, OTHER]

    @on_one_backend
    async def test_a_value_put_anew_is_not_purged(self, backend: ValueBackend) -> None:
        await _put_all(backend, KEY, ttl=SHORT)
        await _wait_for_expiry(backend, KEY)
        await _put_all(backend, KEY, ttl=LONG)
        assert await backend.purge_values(limit=10) == 0
        await _read(backend)

    @on_one_backend
    async def test_scan_values_lists_pages_in_the_order_of_bytes(self, backend: ValueBackend) -> None:
        texts = ["a", "B", "é", "z", "\ufb00", "🔑"]
        keys = [ValueKey(*pair) for pair in product(texts, texts[:4])]
        await _put_all(backend, *keys, ttl=LONG)
        in_order = sorted(keys, key=lambda key: tuple(part.encode() for part in key))
        for limit in (1, 5, 24, 100):
            assert [row.key for row in await _listed(backend, limit)] == in_order
            for text in texts:
                assert [row.key for row in await _listed(backend, limit, text)] == [
                    key for key in in_order if key.group == text
                ]
        assert await _listed(backend, 5, "nothing") == []
        row = await _read(backend, in_order[0])
        [first] = await backend.scan_values(limit=1)
        assert first == ScannedValue(row.key, row.expires_at, row.value.key_id, row.created_at, row.updated_at)

    @on_one_backend
    async def test_insert_value_replaces_no_live_value(self, backend: ValueBackend) -> None:
        assert await backend.insert_value(KEY, sealed_value("first"), ttl=LONG) is True
        row = await _read(backend)
        assert (row.key, row.value) == (KEY, sealed_value("first"))
        assert row.expires_at is not None
        assert 0 <= row.updated_at - row.created_at < 1_000_000
        assert await backend.insert_value(KEY, sealed_value("second"), ttl=None) is False
        assert await _read(backend) == row
        assert await backend.insert_value(OTHER, sealed_value("second"), ttl=None) is True

    @on_one_backend
    async def test_insert_value_replaces_an_expired_value(self, backend: ValueBackend) -> None:
        await _put_all(backend, KEY, ttl=SHORT)
        await _wait_for_expiry(backend, KEY)
        assert await backend.insert_value(KEY, sealed_value("anew"), ttl=None) is True
        row = await _read(backend)
        assert (row.value, row.expires_at) == (sealed_value("anew"), None)

    @on_one_backend
    async def test_rewrap_value_changes_only_the_sealed_value(self, backend: ValueBackend) -> None:
        await _put_all(backend, KEY, ttl=LONG)
        row = await _read(backend)
        assert await backend.rewrap_value(KEY, sealed_value("anew"), version=row.version) is True
        assert await _read(backend) == replace(row, value=sealed_value("anew"))
        assert await backend.rewrap_value(KEY, sealed_value("again"), version=row.version) is True

    @on_one_backend
    async def test_rewrap_value_does_not_replace_a_newer_value(self, backend: ValueBackend) -> None:
        assert await backend.rewrap_value(KEY, sealed_value("stale"), version=1) is False
        await _put_all(backend, KEY)
        version = (await _read(backend)).version
        await backend.put_value(KEY, sealed_value("newer"), ttl=None)
        assert await backend.rewrap_value(KEY, sealed_value("stale"), version=version) is False
        assert (await _read(backend)).value == sealed_value("newer")
        version = (await _read(backend)).version
        assert await backend.pop_value(KEY) is not None
        assert await backend.rewrap_value(KEY, sealed_value("stale"), version=version) is False
        await backend.put_value(KEY, sealed_value("newest"), ttl=None)
        assert await backend.rewrap_value(KEY, sealed_value("stale"), version=version) is False
        assert (await _read(backend)).value == sealed_value("newest")

    # Concurrent callers

    @on_two_backends()
    async def test_one_of_many_concurrent_pops_gets_the_value(self, backend: ValueBackend, other: ValueBackend) -> None:
        for number in range(10):
            await backend.put_value(KEY, sealed_value(str(number)), ttl=LONG)
            found = await asyncio.gather(*((backend, other)[i % 2].pop_value(KEY) for i in range(16)))
            [winner] = [row for row in found if row is not None]
            assert winner.value == sealed_value(str(number))

    @on_two_backends()
    async def test_one_of_many_concurrent_inserts_stores_its_value(
        self, backend: ValueBackend, other: ValueBackend
    ) -> None:
        """Also where an expired value is in the way."""
        for number in range(10):
            key = ValueKey("login", str(number))
            if number % 2:
                await _put_all(backend, key, ttl=SHORT)
                await _wait_for_expiry(backend, key)
            sealed = [sealed_value(f"{number}-{i}") for i in range(16)]
            inserted = await asyncio.gather(
                *((backend, other)[i % 2].insert_value(key, value, ttl=LONG) for i, value in enumerate(sealed))
            )
            [winner] = [value for value, won in zip(sealed, inserted, strict=True) if won]
            assert (await _read(other, key)).value == winner

    @on_two_backends()
    async def test_each_put_is_popped_once_or_replaced(self, backend: ValueBackend, other: ValueBackend) -> None:
        """Puts and pops at the same time: no pop returns what another one has returned."""
        popped: list[ValueRow | None] = []

        async def pop(one: ValueBackend) -> None:
            popped.append(await one.pop_value(KEY))

        async with asyncio.TaskGroup() as group:
            for number in range(24):
                one = (backend, other)[number % 2]
                group.create_task(one.put_value(KEY, sealed_value(str(number)), ttl=LONG))
                group.create_task(pop((other, backend)[number % 2]))
        popped.append(await backend.pop_value(KEY))
        sealed = [row.value.sealed for row in popped if row is not None]
        assert sealed
        assert len(set(sealed)) == len(sealed)

    @on_two_backends()
    async def test_concurrent_puts_leave_one_complete_value(self, backend: ValueBackend, other: ValueBackend) -> None:
        await asyncio.gather(
            *((backend, other)[i % 2].put_value(KEY, sealed_value(str(i)), ttl=None) for i in range(16))
        )
        assert (await _read(backend)).value in [sealed_value(str(i)) for i in range(16)]
        assert len(await _listed(other, 5)) == 1

    @on_two_backends()
    async def test_concurrent_purges_delete_each_value_once(self, backend: ValueBackend, other: ValueBackend) -> None:
        """While others put values, and some of those that expired anew."""
        expired = [ValueKey("login", f"old-{number}") for number in range(40)]
        await _put_all(backend, *expired, ttl=SHORT)
        await _wait_for_expiry(backend, *expired)
        anew = expired[::4]
        *counts, _, _ = await asyncio.gather(
            *((backend, other)[i % 2].purge_values(limit=15) for i in range(8)),
            _put_all(backend, *anew, ttl=LONG),
            _put_all(other, KEY, OTHER, ttl=LONG),
        )
        last = await backend.purge_values(limit=100)
        # A value that was put anew was purged before that, or not at all.
        assert len(expired) - len(anew) <= sum(filter(None, counts)) + last <= len(expired)
        assert {row.key for row in await _listed(backend, 100)} == {*anew, KEY, OTHER}

    # Setting up and closing

    @on_url
    async def test_without_setup_every_operation_on_values_raises_table_missing_error(self, url: str) -> None:
        async with self.opened(url, setup=False) as backend:
            values = cast(ValueBackend, backend)
            if not self.needs_setup:
                assert await values.get_value(KEY) is None
                return
            for operation in _each_operation(values):
                with raises(TableMissingError):
                    await operation()

    @on_one_backend
    async def test_operations_on_values_after_aclose_raise_store_closed_error(self, backend: ValueBackend) -> None:
        await backend.aclose()
        for operation in _each_operation(backend):
            with raises(StoreClosedError):
                await operation()

    @on_one_backend
    async def test_cancelled_calls_release_locks_and_connections_of_values(self, backend: ValueBackend) -> None:
        for steps in range(0, 40, 2):
            for operation in _each_operation(backend)[:4]:
                task = asyncio.ensure_future(operation())
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
        async with asyncio.timeout(TIMEOUT):
            await asyncio.gather(*(backend.get_value(KEY) for _ in range(32)))
            await asyncio.gather(*(backend.put_value(KEY, sealed_value("d"), ttl=None) for _ in range(8)))
        assert (await _read(backend)).value == sealed_value("d")
