"""What every backend must do, as test classes to inherit from. They need pytest, and no plugin of it.

A backend's whole test is a subclass that says how to reach a store with nothing in it::

    from tokenstore.testing.conformance import BackendConformance, RowLockConformance, SharedBackendConformance


    class TestMine(BackendConformance, RowLockConformance):
        def make_url(self, tmp_path):
            return f"mine://{tmp_path}"


    class TestMineShared(SharedBackendConformance, RowLockConformance):
        make_url = TestMine.make_url

:class:`BackendConformance` is for all, :class:`RowLockConformance` for those with ``transaction()``.
:class:`SharedBackendConformance` is for data that several processes can open: beside it the row locks are tested
between two backend objects, which share nothing but the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, cast

from tokenstore.errors import (
    ConflictError,
    LockTimeoutError,
    MissingDependencyError,
    StoreClosedError,
    TableMissingError,
)
from tokenstore.protocol import Backend, BackendTransaction, SupportsRowLocks, SupportsWatching
from tokenstore.records import (
    MAX_PROVIDER_BYTES,
    MAX_TOKEN_BYTES,
    MAX_USER_ID_BYTES,
    Failure,
    ScannedRow,
    SealedRecord,
    SealedTokens,
    TokenKey,
)
from tokenstore.registry import backend_for_url

try:
    import pytest
except ImportError:
    raise MissingDependencyError(
        'tokenstore.testing.conformance needs pytest: pip install "tokenstore[testing]"'
    ) from None

__all__ = ["BackendConformance", "RowLockConformance", "SharedBackendConformance", "Testbed", "sealed"]

T = TypeVar("T")

KEY = TokenKey("github", "user-1")
OTHER = TokenKey("github", "user-2")
THIRD = TokenKey("gitlab", "user-1")
LONG = 3600.0
"""A lease that outlives the test."""
SHORT = 0.03
"""A lease that ends within it."""
PATIENCE = 20.0
"""How long something that must happen may take on a busy machine."""
PAUSE = 0.1
"""How long something that must not happen is watched."""
_SEALING_OVERHEAD = 2 + 32 + 12 + 16


class LockingBackend(Backend, SupportsRowLocks, Protocol):
    """A backend with both capabilities."""


def sealed(tag: str = "a", **changes: Any) -> SealedTokens:
    """Made-up sealed tokens, every field of which tells the tag."""
    number = sum(tag.encode()) + 1_000_000
    tokens = SealedTokens(
        access_token=f"access-{tag}".encode(),
        refresh_token=f"refresh-{tag}".encode(),
        extra=f"extra-{tag}".encode(),
        access_token_expires_at=number,
        refresh_token_expires_at=number + 1,
        key_id=f"key-{tag}",
    )
    return replace(tokens, **changes)


class Testbed:
    """How the tests reach a backend. Override :meth:`make_url`; the rest has defaults."""

    __test__ = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # pytest would also collect the classes that a test's module imports to inherit from.
        cls.__test__ = cls.make_url is not Testbed.make_url

    needs_setup: ClassVar[bool] = True
    """Whether the backend fails with TableMissingError until ``setup()`` has run."""

    def make_url(self, tmp_path: Path) -> str:
        """A URL with nothing behind it: a new file, or the name of a table that does not exist yet."""
        raise NotImplementedError(f"{type(self).__name__} must define make_url(self, tmp_path)")

    def open(self, url: str, **options: Any) -> Backend:
        """Make a backend; by default through the registry, as ``open_store(url)`` does."""
        return backend_for_url(url, options)

    async def close(self, backend: Backend) -> None:
        """Close a backend that :meth:`open` made, and what had to be made for it."""
        await backend.aclose()

    @asynccontextmanager
    async def opened(self, url: str, *, setup: bool = True, **options: Any) -> AsyncIterator[Backend]:
        backend = self.open(url, **options)
        try:
            if setup:
                await backend.setup()
            yield backend
        finally:
            await self.close(backend)

    @asynccontextmanager
    async def second(self, url: str, backend: Backend, **options: Any) -> AsyncIterator[Backend]:  # noqa: ARG002
        """The backend of the second caller: the same object, unless the data is shared."""
        yield backend


def _check(
    arguments: Callable[..., Any], test: Callable[..., Coroutine[Any, Any, None]]
) -> Callable[[Testbed, Path], None]:
    """Turn a coroutine function into a test, run in a loop of its own on what ``arguments`` opens."""

    @functools.wraps(test)
    def run(self: Testbed, tmp_path: Path) -> None:
        url = self.make_url(tmp_path)  # outside the loop: it may start a server

        async def main() -> None:
            async with asyncio.timeout(3 * PATIENCE), arguments(self, url) as opened:
                await test(self, *opened)
            await _eventually(_only_this_task, "every task of the backend's has ended")

        asyncio.run(main())

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", "tmp_path")]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what pytest reads
    return cast(Callable[[Testbed, Path], None], run)


async def _only_this_task() -> bool:
    return asyncio.all_tasks() == {asyncio.current_task()}


def _on_backend(test: Callable[[Any, Any], Coroutine[Any, Any, None]]) -> Callable[[Testbed, Path], None]:
    """A test of one backend that has been set up."""

    @asynccontextmanager
    async def arguments(bed: Testbed, url: str) -> AsyncIterator[tuple[Backend]]:
        async with bed.opened(url) as backend:
            yield (backend,)

    return _check(arguments, test)


def _on_url(test: Callable[[Any, str], Coroutine[Any, Any, None]]) -> Callable[[Testbed, Path], None]:
    """A test that opens backends by itself."""

    @asynccontextmanager
    async def arguments(_bed: Testbed, url: str) -> AsyncIterator[tuple[str]]:
        yield (url,)

    return _check(arguments, test)


def _on_two(
    **options: Any,
) -> Callable[[Callable[[Any, Any, Any], Coroutine[Any, Any, None]]], Callable[[Testbed, Path], None]]:
    """A test of two callers, each with a backend."""

    @asynccontextmanager
    async def arguments(bed: Testbed, url: str) -> AsyncIterator[tuple[Backend, Backend]]:
        async with bed.opened(url, **options) as backend, bed.second(url, backend, **options) as other:
            yield backend, other

    return lambda test: _check(arguments, test)


async def _row(backend: Backend | BackendTransaction, key: TokenKey = KEY) -> SealedRecord:
    record = await backend.get(key)
    assert record is not None, f"there is no row of {key}"
    return record


async def _rows(backend: Backend | BackendTransaction, *keys: TokenKey) -> list[SealedRecord | None]:
    return [await backend.get(key) for key in keys]


async def _put_all(backend: Backend | BackendTransaction, entries: Mapping[TokenKey, SealedTokens]) -> None:
    for key, tokens in entries.items():
        await backend.put(key, tokens)


async def _stored(backend: Backend, key: TokenKey = KEY, tag: str = "a") -> int:
    """Store a row; its generation."""
    await backend.put(key, sealed(tag))
    return (await _row(backend, key)).generation


async def _eventually(check: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not await check():
        assert time.monotonic() < deadline, f"within {PATIENCE} s: {what}"
        await asyncio.sleep(0.002)


async def _at_least(number: int, count: Callable[[], int]) -> bool:
    return count() >= number


async def _expire(backend: Backend, key: TokenKey = KEY) -> None:
    async def expired() -> bool:
        left = (await _row(backend, key)).lease_expires_in
        assert left is not None, "there is no lease that could expire"
        return left < 0

    await _eventually(expired, "the lease expires")


async def _still_waits(*tasks: asyncio.Task[Any]) -> None:
    done, _ = await asyncio.wait(tasks, timeout=PAUSE, return_when=asyncio.FIRST_COMPLETED)
    assert not done, f"did not wait for the lock: {done}"


async def _all_keys(backend: Backend, limit: int, **where: Any) -> list[TokenKey]:
    """Every key, read page by page."""
    keys: list[TokenKey] = []
    after = where.pop("after", None)
    while True:
        page = await backend.scan(after=after, limit=limit, **where)
        assert len(page) <= limit
        keys += (row.key for row in page)
        if len(page) < limit:
            return keys
        after = page[-1].key


def _each_operation(backend: Backend) -> list[Callable[[], Awaitable[object]]]:
    """One call of each operation on rows."""
    held: dict[str, Any] = {"generation": 1, "holder": "h"}
    return [
        lambda: backend.get(KEY),
        lambda: backend.put(KEY, sealed()),
        lambda: backend.delete(KEY),
        lambda: backend.scan(limit=1),
        lambda: backend.claim_lease(KEY, duration=LONG, **held),
        lambda: backend.complete_lease(KEY, sealed(), **held),
        lambda: backend.release_lease(KEY, **held),
        lambda: backend.release_lease(KEY, failure=Failure("invalid_grant"), **held),
        lambda: backend.rewrap(KEY, sealed(), generation=1),
    ]


async def _fail(backend: Backend, generation: int, failure: Failure | None, key: TokenKey = KEY) -> None:
    """Claim the row's lease and release it with a failure."""
    assert await backend.claim_lease(key, generation=generation, holder="failing", duration=LONG)
    assert await backend.release_lease(key, generation=generation, holder="failing", failure=failure)


async def _assert_powerless(backend: Backend, generation: int, holder: str, key: TokenKey = KEY) -> None:
    """A stale generation changes nothing, nor does a stale holder beside a live lease; without one it can complete."""
    before = await _row(backend, key)
    stale: dict[str, Any] = {"generation": generation, "holder": holder}
    if generation != before.generation or (before.lease_expires_in or 0) > 0:
        assert await backend.complete_lease(key, sealed("stale"), **stale) is False
    assert await backend.release_lease(key, **stale) is False
    assert await backend.release_lease(key, failure=Failure("stale"), **stale) is False
    if generation != before.generation:
        assert await backend.rewrap(key, sealed("stale"), generation=generation) is False
        assert await backend.claim_lease(key, duration=LONG, **stale) is False
    assert _lasting(await _row(backend, key)) == _lasting(before)


def _lasting(record: SealedRecord) -> SealedRecord:
    """A record without what the passing of time changes."""
    failure = record.failure and Failure(record.failure.code, None)
    return replace(record, lease_expires_in=None, failure=failure, as_of=0)


def _in_order(keys: Iterable[TokenKey]) -> list[TokenKey]:
    return sorted(keys, key=lambda key: (key.provider.encode(), key.user_id.encode()))


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
    "e\u0301",  # two: the same to the eye, and after normalising
    "e",
    "ß",
    "ss",
    "\u0131",  # dotless
    "i",
    "İ",
    "K",
    "\u212a",  # the Kelvin sign
    "\ufb00",  # sorts after every emoji as UTF-16, before them as UTF-8
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
"""Texts that some collation, driver or pattern takes for one another."""


class BackendConformance(Testbed):
    """Every sentence of :class:`tokenstore.protocol.Backend`."""

    @_on_backend
    async def test_is_a_backend(self, backend: Backend) -> None:
        assert isinstance(backend, Backend)

    # Life

    @_on_url
    async def test_without_setup_the_table_is_missing(self, url: str) -> None:
        """Every operation says so, rather than failing in the driver's words."""
        async with self.opened(url, setup=False) as backend:
            if not self.needs_setup:
                assert await backend.get(KEY) is None
                return
            for operation in _each_operation(backend):
                with pytest.raises(TableMissingError):
                    await operation()

    @_on_backend
    async def test_setup_is_idempotent(self, backend: Backend) -> None:
        """Repeated, or called by eight tasks at once, it creates nothing twice and touches no row."""
        generation = await _stored(backend)
        await backend.setup()
        await asyncio.gather(*(backend.setup() for _ in range(8)))
        assert (await _row(backend)).generation == generation

    @_on_url
    async def test_setup_by_many_tasks_at_once(self, url: str) -> None:
        async with self.opened(url, setup=False) as backend:
            await asyncio.gather(*(backend.setup() for _ in range(8)))
            await _stored(backend)

    @_on_backend
    async def test_closed_is_closed(self, backend: Backend) -> None:
        """``aclose`` is idempotent, and every operation after it is a StoreClosedError."""
        await _stored(backend)
        await backend.aclose()
        await backend.aclose()
        for operation in [*_each_operation(backend), backend.setup]:
            with pytest.raises(StoreClosedError):
                await operation()
        if isinstance(backend, SupportsRowLocks):
            with pytest.raises(StoreClosedError):
                async with backend.transaction() as transaction:
                    await transaction.get(KEY)

    @_on_url
    async def test_closing_what_was_never_used(self, url: str) -> None:
        backend = self.open(url)
        await backend.aclose()
        await self.close(backend)

    # get, put, delete

    @_on_backend
    async def test_very_many_calls_at_once(self, backend: Backend) -> None:
        """Each caller gets its own answer, however the backend shares statements between them."""
        keys = [TokenKey("github", f"user-{number}") for number in range(600)]
        stored = dict.fromkeys(keys[::3])
        await asyncio.gather(*(backend.put(key, sealed(key.user_id)) for key in stored))
        records = await asyncio.gather(*(backend.get(key) for key in [*keys, *reversed(keys)]))
        for key, record in zip([*keys, *reversed(keys)], records, strict=True):
            if key in stored:
                assert record is not None
                assert (record.key, record.tokens) == (key, sealed(key.user_id))
            else:
                assert record is None

    @_on_backend
    async def test_a_new_row(self, backend: Backend) -> None:
        await backend.put(KEY, sealed())
        record = await _row(backend)
        assert (record.key, record.tokens) == (KEY, sealed())
        assert type(record.tokens.access_token) is bytes
        assert type(record.generation) is int
        assert record.generation > 0
        assert (record.lease_holder, record.lease_expires_in, record.failure) == (None, None, None)
        assert 0 <= record.updated_at - record.created_at < 1_000_000
        assert type(record.as_of) is int
        assert 0 <= record.as_of - record.updated_at < PATIENCE * 1_000_000
        # Wide enough for a badly set clock, too narrow for a time zone.
        assert abs(record.created_at / 1_000_000 - time.time()) < 1800

    @_on_backend
    async def test_what_is_absent_is_none(self, backend: Backend) -> None:
        tokens = sealed(refresh_token=None, extra=None, access_token_expires_at=None, refresh_token_expires_at=None)
        await backend.put(KEY, tokens)
        assert (await _row(backend)).tokens == tokens
        await backend.put(KEY, sealed())
        await backend.put(KEY, tokens)
        assert (await _row(backend)).tokens == tokens, "nothing of the earlier row is kept"

    @_on_backend
    async def test_put_replaces(self, backend: Backend) -> None:
        """The next generation is one more; ``created_at`` stays and ``updated_at`` goes on."""
        await backend.put(KEY, sealed("a"))
        old = await _row(backend)

        async def later() -> bool:
            await backend.put(OTHER, sealed())
            return (await _row(backend, OTHER)).updated_at > old.updated_at

        await _eventually(later, "the database's clock moves")
        await backend.put(KEY, sealed("b"))
        new = await _row(backend)
        assert new.tokens == sealed("b")
        assert new.generation == old.generation + 1
        assert new.created_at == old.created_at
        assert new.updated_at > old.updated_at

    @_on_backend
    async def test_put_of_the_same_values_is_a_write(self, backend: Backend) -> None:
        generation = await _stored(backend)
        await backend.put(KEY, sealed())
        assert (await _row(backend)).generation == generation + 1

    @_on_backend
    async def test_put_clears_lease_and_failure(self, backend: Backend) -> None:
        generation = await _stored(backend)
        await _fail(backend, generation, Failure("invalid_grant"))
        await backend.put(KEY, sealed("b"))
        record = await _row(backend)
        assert (record.lease_holder, record.lease_expires_in, record.failure) == (None, None, None)
        assert await backend.claim_lease(KEY, generation=generation + 1, holder="h", duration=LONG)
        await backend.put(KEY, sealed("c"))
        record = await _row(backend)
        assert (record.lease_holder, record.lease_expires_in, record.failure) == (None, None, None)

    @_on_backend
    async def test_delete(self, backend: Backend) -> None:
        """Tells whether there was a row, and takes the lease with it."""
        await _stored(backend, OTHER)
        assert await backend.delete(KEY) is False
        generation = await _stored(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        assert await backend.delete(KEY) is True
        assert await backend.get(KEY) is None
        assert await backend.delete(KEY) is False
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG) is False
        assert (await _row(backend, OTHER)).tokens == sealed()

    @_on_backend
    async def test_no_generation_comes_back_after_a_delete(self, backend: Backend) -> None:
        """Who still holds an old generation can do nothing to the new row."""
        seen: set[int] = set()
        for _ in range(3):
            generation = await _stored(backend)
            assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
            assert generation not in seen
            seen.add(generation)
            await backend.delete(KEY)
        generation = await _stored(backend, tag="new")
        for old in seen:
            await _assert_powerless(backend, old, "h")
        record = await _row(backend)
        assert (record.tokens, record.generation, record.lease_holder) == (sealed("new"), generation, None)

    @_on_backend
    async def test_keys_compare_byte_for_byte(self, backend: Backend) -> None:
        """No case folding, no normalising, no trimming, no patterns; in either part of the key."""
        keys = [TokenKey(text, "u") for text in DISTINCT_TEXTS] + [TokenKey("p", text) for text in DISTINCT_TEXTS]
        assert len(set(keys)) == len(keys)
        expected = {key: sealed(str(number)) for number, key in enumerate(keys)}
        await _put_all(backend, expected)
        assert {record.key: record.tokens for record in await _rows(backend, *keys) if record} == expected
        assert await _all_keys(backend, 1000) == _in_order(keys)
        for key in keys[::5]:
            assert [row.key for row in await backend.scan(**key._asdict(), limit=9)] == [key]
            assert await backend.delete(key)
            assert not await backend.delete(key)
        left = [key for number, key in enumerate(keys) if number % 5]
        assert await _all_keys(backend, 1000) == _in_order(left)

    @_on_backend
    async def test_the_longest_keys(self, backend: Backend) -> None:
        """Of 128 and 512 bytes, told apart by their last byte."""
        keys = [
            TokenKey("p" * (MAX_PROVIDER_BYTES - 1) + end, "u" * (MAX_USER_ID_BYTES - 1) + last)
            for end in "ab"
            for last in "ab"
        ]
        keys.append(TokenKey("🔑" * (MAX_PROVIDER_BYTES // 4), "🔑" * (MAX_USER_ID_BYTES // 4)))
        await _put_all(backend, {key: sealed(key.provider[-1] + key.user_id[-1]) for key in keys})
        for key in keys:
            assert (await _row(backend, key)).tokens == sealed(key.provider[-1] + key.user_id[-1])
        assert await _all_keys(backend, 2) == _in_order(keys)

    @_on_backend
    async def test_extreme_times(self, backend: Backend) -> None:
        """From the year 1 to 9999, to the microsecond; zero is a time, not "never"."""
        first, last = -62_135_596_800_000_000, 253_402_300_799_999_999
        for number in (first, last, 0, 1, -1, 2**31 * 1_000_000, None):
            tokens = sealed(access_token_expires_at=number, refresh_token_expires_at=number)
            await backend.put(KEY, tokens)
            assert (await _row(backend)).tokens == tokens
            [row] = await backend.scan(limit=2)
            assert (row.access_token_expires_at, row.refresh_token_expires_at) == (number, number)

    @_on_backend
    async def test_big_blobs_of_any_bytes(self, backend: Backend) -> None:
        """The longest tokens with the sealing's overhead come back as they are."""
        blob = bytes(range(256)) * (MAX_TOKEN_BYTES // 256) + b"\0\xff'\"\\%" * 20
        assert len(blob) >= MAX_TOKEN_BYTES + _SEALING_OVERHEAD
        big = sealed(access_token=blob, refresh_token=blob[::-1], extra=blob[1:], key_id="k" * 32)
        small = sealed(access_token=b"\0", refresh_token=b"\xff\0", extra=b"\\x00")
        await _put_all(backend, {KEY: big, OTHER: small})
        assert [(await _row(backend, key)).tokens for key in (KEY, OTHER)] == [big, small]
        generation = (await _row(backend)).generation
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        swapped = replace(big, access_token=blob[::-1])
        assert await backend.complete_lease(KEY, swapped, generation=generation, holder="h")
        assert (await _row(backend)).tokens == swapped

    @_on_backend
    async def test_a_read_tells_the_database_s_clock(self, backend: Backend) -> None:
        """In every kind of read: the clock that leases and failures run on, as it was when the row was read."""
        generation = await _stored(backend)
        await _stored(backend, OTHER)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)

        async def clocks() -> list[int]:
            # Two at once, which may share a statement.
            one, (_, many), (row, *_) = (
                await _row(backend),
                await asyncio.gather(_row(backend, OTHER), _row(backend)),
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
        await _eventually(later, "the database's clock moves")
        assert len(ends) == 1, "the lease's end stands still"

    # scan

    @_on_backend
    async def test_scan_by_provider_and_user(self, backend: Backend) -> None:
        keys = [TokenKey(provider, user) for provider in ("a", "b", "c") for user in ("1", "2", "3")]
        await _put_all(backend, {key: sealed() for key in reversed(keys)})
        for limit in (1, 2, 3, 9, 10):
            assert await _all_keys(backend, limit) == keys
            assert await _all_keys(backend, limit, provider="b") == keys[3:6]
            assert await _all_keys(backend, limit, user_id="2") == keys[1::3]
            assert await _all_keys(backend, limit, provider="b", user_id="2") == [keys[4]]
            assert await _all_keys(backend, limit, provider="d") == []
            assert await _all_keys(backend, limit, provider="a", user_id="4") == []

    @_on_backend
    async def test_scan_after_a_key_that_does_not_exist(self, backend: Backend) -> None:
        keys = [TokenKey(provider, user) for provider in ("b", "d") for user in ("2", "4")]
        await _put_all(backend, {key: sealed() for key in keys})
        places = [TokenKey(provider, user) for provider in "abcde" for user in "12345"]
        for after in places:
            expected = [key for key in keys if key > after]
            assert await _all_keys(backend, 3, after=after) == expected
            assert await _all_keys(backend, 3, after=after, provider="d") == [k for k in expected if k.provider == "d"]
            assert await _all_keys(backend, 3, after=after, user_id="4") == [k for k in expected if k.user_id == "4"]

    @_on_backend
    async def test_scan_shows_what_is_stored_without_the_tokens(self, backend: Backend) -> None:
        await _put_all(
            backend, {KEY: sealed("1"), OTHER: sealed("2", refresh_token=None, refresh_token_expires_at=None)}
        )
        expected = []
        for key in (KEY, OTHER):
            record = await _row(backend, key)
            expected.append(
                ScannedRow(
                    key=key,
                    has_refresh_token=record.tokens.refresh_token is not None,
                    access_token_expires_at=record.tokens.access_token_expires_at,
                    refresh_token_expires_at=record.tokens.refresh_token_expires_at,
                    key_id=record.tokens.key_id,
                    generation=record.generation,
                    created_at=record.created_at,
                    updated_at=record.updated_at,
                    as_of=0,
                )
            )
        found = await backend.scan(limit=10)
        assert [replace(row, as_of=0) for row in found] == expected
        assert [type(row.has_refresh_token) for row in found] == [bool, bool]

    # Leases

    @_on_backend
    async def test_a_claim_shows_and_changes_nothing_else(self, backend: Backend) -> None:
        await _stored(backend)
        before = await _row(backend)
        assert await backend.claim_lease(KEY, generation=before.generation, holder="h" * 32, duration=60) is True
        record = await _row(backend)
        assert record.lease_holder == "h" * 32
        assert record.lease_expires_in is not None
        assert 60 - PATIENCE < record.lease_expires_in <= 60
        assert _lasting(replace(record, lease_holder=None)) == _lasting(before)

    @_on_backend
    async def test_a_claim_needs_the_row_and_its_generation(self, backend: Backend) -> None:
        assert await backend.claim_lease(KEY, generation=1, holder="h", duration=LONG) is False
        generation = await _stored(backend)
        for other in (generation - 1, generation + 1):
            assert await backend.claim_lease(KEY, generation=other, holder="h", duration=LONG) is False
        assert (await _row(backend)).lease_holder is None

    @_on_backend
    async def test_a_live_lease_refuses_everybody(self, backend: Backend) -> None:
        """Its own holder, too: two claims are two refreshes."""
        generation = await _stored(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        for holder in ("h", "H", "h ", "other"):
            assert await backend.claim_lease(KEY, generation=generation, holder=holder, duration=LONG) is False
        assert (await _row(backend)).lease_holder == "h"

    @_on_backend
    async def test_a_completed_lease(self, backend: Backend) -> None:
        """New tokens, the next generation, no lease, no failure."""
        generation = await _stored(backend)
        before = await _row(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        tokens = sealed("new", refresh_token=None)
        assert await backend.complete_lease(KEY, tokens, generation=generation, holder="h") is True
        record = await _row(backend)
        assert (record.tokens, record.generation) == (tokens, generation + 1)
        assert (record.lease_holder, record.lease_expires_in, record.failure) == (None, None, None)
        assert record.created_at == before.created_at
        assert record.updated_at >= before.updated_at
        await _assert_powerless(backend, generation, "h")

    @_on_backend
    async def test_only_its_holder_can_end_a_lease(self, backend: Backend) -> None:
        generation = await _stored(backend)
        await _assert_powerless(backend, generation, "h")  # there is no lease at all
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        for holder in ("H", "h ", "other"):
            await _assert_powerless(backend, generation, holder)
        await _assert_powerless(backend, generation + 1, "h")
        await _stored(backend, OTHER)
        await _assert_powerless(backend, generation, "h", OTHER)
        nobody: dict[str, Any] = {"generation": generation, "holder": "h"}
        assert await backend.complete_lease(THIRD, sealed(), **nobody) is False
        assert await backend.release_lease(THIRD, **nobody) is False
        assert await backend.get(THIRD) is None

    @_on_backend
    async def test_a_released_lease_can_be_claimed_at_once(self, backend: Backend) -> None:
        generation = await _stored(backend)
        before = await _row(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        assert await backend.release_lease(KEY, generation=generation, holder="h") is True
        assert _lasting(await _row(backend)) == _lasting(before)
        assert await backend.release_lease(KEY, generation=generation, holder="h") is False
        assert await backend.claim_lease(KEY, generation=generation, holder="other", duration=LONG)

    @_on_backend
    async def test_a_failure_for_good_holds_until_new_tokens(self, backend: Backend) -> None:
        generation = await _stored(backend)
        before = await _row(backend)
        await _fail(backend, generation, Failure("c" * 64))
        assert _lasting(await _row(backend)) == _lasting(replace(before, failure=Failure("c" * 64)))
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG) is False
        await backend.put(KEY, sealed())
        assert await backend.claim_lease(KEY, generation=generation + 1, holder="h", duration=LONG) is True
        assert await backend.complete_lease(KEY, sealed(), generation=generation + 1, holder="h")

    @_on_backend
    async def test_a_failure_for_a_while_refuses_claims_until_then(self, backend: Backend) -> None:
        generation = await _stored(backend)
        await _fail(backend, generation, Failure("unavailable", LONG))
        failure = (await _row(backend)).failure
        assert failure is not None
        assert failure.code == "unavailable"
        assert failure.retry_in is not None
        assert LONG - PATIENCE < failure.retry_in <= LONG
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG) is False
        generation = await _stored(backend)
        await _fail(backend, generation, Failure("unavailable", SHORT))

        async def granted() -> bool:
            return await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)

        await _eventually(granted, "the failure lapses")
        assert await backend.complete_lease(KEY, sealed("b"), generation=generation, holder="h")
        assert (await _row(backend)).failure is None

    @_on_backend
    async def test_a_release_replaces_the_failure_that_was_there(self, backend: Backend) -> None:
        generation = await _stored(backend)
        outcomes = [Failure("first", SHORT), Failure("second", SHORT), None, Failure("third")]
        for failure in outcomes:

            async def granted() -> bool:
                return await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)

            await _eventually(granted, "the failure lapses")
            assert await backend.release_lease(KEY, generation=generation, holder="h", failure=failure)
            found = (await _row(backend)).failure
            assert (found and found.code) == (failure and failure.code)
            assert (found and found.retry_in) is None or (failure and failure.retry_in) is not None

    @_on_backend
    async def test_an_expired_lease_still_completes(self, backend: Backend) -> None:
        """If nobody took it over: its tokens may be the only copy."""
        generation = await _stored(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="slow", duration=SHORT)
        await _expire(backend)
        assert await backend.complete_lease(KEY, sealed("late"), generation=generation, holder="slow") is True
        record = await _row(backend)
        assert (record.tokens, record.generation, record.lease_holder) == (sealed("late"), generation + 1, None)

    @_on_backend
    async def test_an_expired_lease_still_ends_with_its_failure(self, backend: Backend) -> None:
        generation = await _stored(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="slow", duration=SHORT)
        await _expire(backend)
        refused = Failure("invalid_grant")
        assert await backend.release_lease(KEY, generation=generation, holder="slow", failure=refused) is True
        assert (await _row(backend)).failure == refused

    @_on_backend
    async def test_an_expired_lease_is_taken_over_once(self, backend: Backend) -> None:
        """Of many claims one is granted, and the former holder has lost all power over the row."""
        generation = await _stored(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="dead", duration=SHORT)
        await _expire(backend)
        holders = [f"holder-{number}" for number in range(8)]
        granted = await asyncio.gather(
            *(backend.claim_lease(KEY, generation=generation, holder=holder, duration=LONG) for holder in holders)
        )
        assert granted.count(True) == 1
        winner = holders[granted.index(True)]
        for loser in {"dead", *holders} - {winner}:
            await _assert_powerless(backend, generation, loser)
        assert (await _row(backend)).lease_holder == winner
        assert await backend.complete_lease(KEY, sealed("new"), generation=generation, holder=winner) is True

    @_on_backend
    async def test_who_lost_the_lease_completes_once_the_new_holder_has_given_up(self, backend: Backend) -> None:
        """For good or for a while: tokens that came late end the failure, as they are newer than what failed."""
        for failure in (Failure("invalid_grant"), Failure("unavailable", LONG), None):
            generation = await _stored(backend, tag="old")
            assert await backend.claim_lease(KEY, generation=generation, holder="late", duration=SHORT)
            await _expire(backend)
            assert await backend.claim_lease(KEY, generation=generation, holder="new", duration=LONG)
            of: dict[str, Any] = {"generation": generation, "holder": "late"}
            assert await backend.complete_lease(KEY, sealed("late"), **of) is False, "beside a live lease"
            assert (await _row(backend)).tokens == sealed("old")
            assert await backend.release_lease(KEY, generation=generation, holder="new", failure=failure)
            assert await backend.release_lease(KEY, **of, failure=Failure("late")) is False
            assert await backend.complete_lease(KEY, sealed("late"), **of) is True
            record = await _row(backend)
            assert (record.tokens, record.generation) == (sealed("late"), generation + 1)
            assert (record.lease_holder, record.lease_expires_in, record.failure) == (None, None, None)
            assert await backend.complete_lease(KEY, sealed("twice"), **of) is False
            assert await backend.claim_lease(KEY, generation=generation + 1, holder="next", duration=LONG)

    @_on_backend
    async def test_who_lost_the_lease_completes_when_the_new_one_has_expired(self, backend: Backend) -> None:
        """The first of the two to bring tokens wins."""
        generation = await _stored(backend, tag="old")
        for holder in ("late", "new"):
            assert await backend.claim_lease(KEY, generation=generation, holder=holder, duration=SHORT)
            await _expire(backend)
        assert await backend.complete_lease(KEY, sealed("late"), generation=generation, holder="late") is True
        assert await backend.complete_lease(KEY, sealed("new"), generation=generation, holder="new") is False
        record = await _row(backend)
        assert (record.tokens, record.generation, record.lease_holder) == (sealed("late"), generation + 1, None)

    @_on_backend
    async def test_a_late_completion_loses_to_newer_tokens(self, backend: Backend) -> None:
        """The new holder's, a put's, and those of a row that was deleted and stored again."""

        async def by_new_holder(generation: int) -> None:
            assert await backend.complete_lease(KEY, sealed("newer"), generation=generation, holder="new")

        async def by_put(_generation: int) -> None:
            await backend.put(KEY, sealed("newer"))

        async def anew(generation: int) -> None:
            await backend.delete(KEY)
            assert await backend.complete_lease(KEY, sealed("late"), generation=generation, holder="late") is False
            assert await backend.get(KEY) is None
            await backend.put(KEY, sealed("newer"))

        for newer in (by_new_holder, by_put, anew):
            generation = await _stored(backend, tag="old")
            assert await backend.claim_lease(KEY, generation=generation, holder="late", duration=SHORT)
            await _expire(backend)
            assert await backend.claim_lease(KEY, generation=generation, holder="new", duration=LONG)
            await newer(generation)
            assert await backend.complete_lease(KEY, sealed("late"), generation=generation, holder="late") is False
            assert (await _row(backend)).tokens == sealed("newer")

    @_on_backend
    async def test_newer_tokens_end_a_lease(self, backend: Backend) -> None:
        """After a put, or a delete and a put, the holder of the old version can neither complete nor release."""
        generation = await _stored(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        await backend.put(KEY, sealed("newer"))
        await _assert_powerless(backend, generation, "h")
        await _assert_powerless(backend, generation + 1, "h")
        await backend.delete(KEY)
        assert await backend.complete_lease(KEY, sealed("stale"), generation=generation, holder="h") is False
        assert await backend.get(KEY) is None
        renewed = await _stored(backend, tag="renewed")
        for old in (generation, generation + 1, renewed):
            await _assert_powerless(backend, old, "h")

    @_on_two()
    async def test_one_of_many_claims_is_granted(self, backend: Backend, other: Backend) -> None:
        generation = await _stored(backend)
        for turn in range(3):
            granted = await asyncio.gather(
                *(
                    (backend, other)[number % 2].claim_lease(
                        KEY, generation=generation, holder=f"{turn}-{number}", duration=LONG
                    )
                    for number in range(16)
                )
            )
            assert granted.count(True) == 1
            holder = f"{turn}-{granted.index(True)}"
            assert await other.complete_lease(KEY, sealed(str(turn)), generation=generation, holder=holder)
            generation += 1

    @_on_two()
    async def test_a_completion_and_a_take_over_exclude_each_other(self, backend: Backend, other: Backend) -> None:
        """However they meet: the late holder writes, or the new one holds the lease, never both."""
        for turn in range(5):
            generation = await _stored(backend, tag="old")
            assert await backend.claim_lease(KEY, generation=generation, holder="late", duration=SHORT)
            await _expire(backend)
            completed, claimed = await asyncio.gather(
                backend.complete_lease(KEY, sealed("late"), generation=generation, holder="late"),
                other.claim_lease(KEY, generation=generation, holder="new", duration=LONG),
            )
            assert completed is not claimed, f"turn {turn}"
            record = await _row(backend)
            expected = (sealed("late"), None) if completed else (sealed("old"), "new")
            assert (record.tokens, record.lease_holder) == expected

    # rewrap

    @_on_backend
    async def test_rewrap_changes_the_sealed_values_alone(self, backend: Backend) -> None:
        """No generation, no lease, no failure, no time: the holder of a lease can still complete it."""
        generation = await _stored(backend, tag="old")
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        before = await _row(backend)
        anew = sealed("anew")
        assert await backend.rewrap(KEY, anew, generation=generation) is True
        kept = replace(
            anew,
            access_token_expires_at=before.tokens.access_token_expires_at,
            refresh_token_expires_at=before.tokens.refresh_token_expires_at,
        )
        record = await _row(backend)
        assert _lasting(record) == _lasting(replace(before, tokens=kept))
        assert record.lease_expires_in is not None
        assert before.lease_expires_in is not None
        assert LONG - PATIENCE < record.lease_expires_in <= before.lease_expires_in
        assert await backend.release_lease(KEY, generation=generation, holder="h", failure=Failure("invalid_grant"))
        assert await backend.rewrap(KEY, sealed("again"), generation=generation) is True
        assert (await _row(backend)).failure == Failure("invalid_grant")

    @_on_backend
    async def test_rewrap_loses_to_newer_tokens(self, backend: Backend) -> None:
        assert await backend.rewrap(KEY, sealed(), generation=1) is False
        assert await backend.get(KEY) is None
        generation = await _stored(backend, tag="old")
        await backend.put(KEY, sealed("newer"))
        assert await backend.rewrap(KEY, sealed("stale"), generation=generation) is False
        assert (await _row(backend)).tokens == sealed("newer")

    # Waiting for somebody else's lease

    @_on_two()
    async def test_watching(self, backend: Backend, other: Backend) -> None:
        """Ends by itself and takes no connection from others, however many watch; whoever is cancelled leaves."""
        if not isinstance(backend, SupportsWatching):
            return
        generation = await _stored(backend)
        assert await other.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        for key in (KEY, THIRD):  # there is no such row
            async with asyncio.timeout(3):
                await asyncio.gather(*(backend.watch(key) for _ in range(40)))
        watching = [asyncio.ensure_future(backend.watch(KEY)) for _ in range(40)]
        await asyncio.sleep(0)
        async with asyncio.timeout(2):
            await asyncio.gather(*(backend.get(KEY) for _ in range(8)))
        for watch in watching[::2]:
            watch.cancel()
        await asyncio.wait(watching, timeout=3)
        assert all(watch.done() for watch in watching)
        await backend.put(KEY, sealed("b"))
        assert (await _row(other)).tokens == sealed("b")

    # Many callers

    @_on_two()
    async def test_no_write_is_lost(self, backend: Backend, other: Backend) -> None:
        """32 concurrent puts of one row are 32 generations."""
        generation = await _stored(backend)
        await asyncio.gather(*((backend, other)[i % 2].put(KEY, sealed(str(i))) for i in range(32)))
        record = await _row(backend)
        assert record.generation == generation + 32
        assert record.tokens in [sealed(str(i)) for i in range(32)]

    @_on_two()
    async def test_many_first_inserts_of_one_row(self, backend: Backend, other: Backend) -> None:
        for number in range(3):
            key = TokenKey("github", f"new-{number}")
            await asyncio.gather(*((backend, other)[i % 2].put(key, sealed(str(i))) for i in range(8)))
            assert (await _row(backend, key)).tokens in [sealed(str(i)) for i in range(8)]
            assert len(await backend.scan(user_id=key.user_id, limit=3)) == 1

    @_on_two()
    async def test_every_read_is_of_one_write(self, backend: Backend, other: Backend) -> None:
        await _stored(backend, tag="0")
        versions = [sealed(str(i), access_token=str(i).encode() * 20_000) for i in range(12)]
        seen: list[SealedTokens] = []
        written = asyncio.Event()

        async def read() -> None:
            while not written.is_set():
                seen.append((await _row(other)).tokens)
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            for tokens in versions:
                await backend.put(KEY, tokens)
            written.set()
        assert set(seen) <= {sealed("0"), *versions}

    @_on_backend
    async def test_cancelled_calls_leave_nothing_behind(self, backend: Backend) -> None:
        """Wherever a call is cancelled, the row is whole, nothing stays locked, and no connection is lost."""
        generation = await _stored(backend)
        attempts = 0
        for steps in range(0, 40, 2):
            for operation in _each_operation(backend)[:2]:
                task = asyncio.ensure_future(operation())
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                attempts += 1
        # A statement may have been on its way: cancelled does not mean undone.
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(backend.get(KEY) for _ in range(32)))
            await asyncio.gather(*(backend.put(KEY, sealed("d")) for _ in range(8)))
        record = await _row(backend)
        assert record.tokens == sealed("d")
        assert generation + 8 <= record.generation <= generation + 8 + attempts


class SharedBackendConformance(Testbed):
    """Two backend objects on the same data: what processes are to each other.

    Inherit from it beside :class:`BackendConformance` or :class:`RowLockConformance`: the tests of two callers then
    give each of them a backend object of its own.
    """

    @asynccontextmanager
    async def second(self, url: str, backend: Backend, **options: Any) -> AsyncIterator[Backend]:  # noqa: ARG002
        """An object of its own."""
        async with self.opened(url, **options) as other:
            yield other

    @_on_two()
    async def test_one_reads_what_the_other_wrote(self, backend: Backend, other: Backend) -> None:
        await backend.put(KEY, sealed("a"))
        assert (await _row(other)).tokens == sealed("a")
        await other.put(KEY, sealed("b"))
        assert (await _row(backend)).tokens == sealed("b")
        assert await other.delete(KEY)
        assert await backend.get(KEY) is None

    @_on_two()
    async def test_closing_one_leaves_the_other_open(self, backend: Backend, other: Backend) -> None:
        await backend.put(KEY, sealed())
        await other.aclose()
        assert (await _row(backend)).tokens == sealed()

    @_on_two()
    async def test_a_lease_binds_both(self, backend: Backend, other: Backend) -> None:
        generation = await _stored(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        assert (await _row(other)).lease_holder == "h"
        assert await other.claim_lease(KEY, generation=generation, holder="other", duration=LONG) is False
        assert await backend.release_lease(KEY, generation=generation, holder="h")
        assert await other.claim_lease(KEY, generation=generation, holder="other", duration=LONG) is True
        await _assert_powerless(backend, generation, "h")

    @_on_url
    async def test_setup_from_eight_at_once(self, url: str) -> None:
        backends = [self.open(url) for _ in range(8)]
        try:
            await asyncio.gather(*(backend.setup() for backend in backends))
            await asyncio.gather(*(backend.put(KEY, sealed()) for backend in backends))
            assert len(await backends[0].scan(limit=2)) == 1
        finally:
            for backend in backends:
                await self.close(backend)


class RowLockConformance(Testbed):
    """Every sentence of :class:`tokenstore.protocol.SupportsRowLocks` and its transactions.

    The backend must take the option ``lock_timeout``, in seconds.
    """

    @_on_two()
    async def test_is_a_backend_with_row_locks(self, backend: LockingBackend, other: LockingBackend) -> None:
        for each in (backend, other):
            assert isinstance(each, SupportsRowLocks)
            async with each.transaction() as transaction:
                assert isinstance(transaction, BackendTransaction)

    @_on_two()
    async def test_a_transaction_sees_its_own_writes_and_others_see_them_once_committed(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """READ COMMITTED, and readers never wait for the holder of a lock."""
        generation = await _stored(backend, tag="old")
        await _stored(backend, OTHER)
        async with backend.transaction() as transaction:
            locked = await transaction.lock(KEY)
            assert locked is not None
            assert _lasting(locked) == _lasting(await _row(other))
            await _put_all(transaction, {KEY: sealed("new"), THIRD: sealed("new")})
            assert await transaction.delete(OTHER) is True
            assert await transaction.delete(TokenKey("no", "body")) is False
            own = await _rows(transaction, KEY, OTHER, THIRD)
            assert [record and record.tokens for record in own] == [sealed("new"), None, sealed("new")]
            assert own[0] is not None
            assert own[0].generation == generation + 1
            relocked = await transaction.lock(KEY)
            assert relocked is not None
            assert relocked.tokens == sealed("new")
            async with asyncio.timeout(2):
                seen = await _rows(other, KEY, OTHER, THIRD)
                assert [record and record.tokens for record in seen] == [sealed("old"), sealed(), None]
                assert [row.key for row in await other.scan(limit=5)] == [KEY, OTHER]
        assert [row.key for row in await other.scan(limit=5)] == [KEY, THIRD]
        record = await _row(other)
        assert (record.tokens, record.generation) == (sealed("new"), generation + 1)

    @_on_two()
    async def test_a_transaction_sees_what_others_commit(self, backend: LockingBackend, other: LockingBackend) -> None:
        """What it has read before neither hides the new row nor stands in the way of its own writes."""
        generation = await _stored(backend, tag="old")
        async with backend.transaction() as transaction:
            assert (await _row(transaction)).tokens == sealed("old")
            await other.put(KEY, sealed("new"))
            assert (await _row(transaction)).tokens == sealed("new")
            locked = await transaction.lock(KEY)
            assert locked is not None
            assert locked.tokens == sealed("new")
            await transaction.put(KEY, sealed("own"))
        record = await _row(other)
        assert (record.tokens, record.generation) == (sealed("own"), generation + 2)

    @_on_two()
    async def test_an_error_rolls_back(self, backend: LockingBackend, other: LockingBackend) -> None:
        """The caller's exception comes out as it is, and nothing is stored, locked or taken."""
        await _stored(backend, tag="old")
        before = await _row(backend)
        for _ in range(12):  # more often than a usual pool has connections
            with pytest.raises(KeyError, match="the caller's own"):  # noqa: PT012
                async with backend.transaction() as transaction:
                    await transaction.lock(KEY)
                    await _put_all(transaction, {KEY: sealed("new"), OTHER: sealed("new")})
                    await transaction.delete(KEY)
                    raise KeyError("the caller's own")
        found, missing = await _rows(other, KEY, OTHER)
        assert missing is None
        assert found is not None
        assert _lasting(found) == _lasting(before)
        async with asyncio.timeout(5):
            await other.put(KEY, sealed("next"))

    @_on_two()
    async def test_a_waiter_reads_what_the_holder_stored(self, backend: LockingBackend, other: LockingBackend) -> None:
        """Nobody goes on with an old row; of one that the holder deleted there is nothing."""
        generation = await _stored(backend, tag="0")
        await _stored(backend, OTHER)

        async def wait(key: TokenKey) -> tuple[SealedRecord | None, SealedRecord | None]:
            async with other.transaction() as transaction:
                return await transaction.lock(key), await transaction.get(key)

        async with backend.transaction() as transaction:
            for key in (KEY, OTHER):
                await transaction.lock(key)
            waiters = [asyncio.create_task(wait(key)) for key in (KEY, OTHER)]
            await _still_waits(*waiters)
            await transaction.put(KEY, sealed("1"))
            await transaction.delete(OTHER)
            await _still_waits(*waiters)
        (locked, read), gone = await asyncio.gather(*waiters)
        assert locked is not None
        assert read is not None
        assert (locked.tokens, locked.generation) == (sealed("1"), generation + 1)
        assert _lasting(read) == _lasting(locked)
        assert gone == (None, None)

    @_on_two()
    async def test_counting_under_the_lock_loses_nothing(self, backend: LockingBackend, other: LockingBackend) -> None:
        """Twenty tasks read, add one and write."""
        await backend.put(KEY, sealed(access_token_expires_at=0))

        async def add_one(mine: LockingBackend) -> None:
            async with mine.transaction() as transaction:
                record = await transaction.lock(KEY)
                assert record is not None
                number = record.tokens.access_token_expires_at
                assert number is not None
                await asyncio.sleep(0)
                await transaction.put(KEY, replace(record.tokens, access_token_expires_at=number + 1))

        await asyncio.gather(*(add_one((backend, other)[i % 2]) for i in range(20)))
        assert (await _row(backend)).tokens.access_token_expires_at == 20

    @_on_two()
    async def test_lone_writes_wait_for_the_holder(self, backend: LockingBackend, other: LockingBackend) -> None:
        """And then win, or lose to its newer tokens: a row lock and a lease exclude each other."""
        keys = {name: TokenKey("github", name) for name in ("put", "delete", "changed", "unchanged", "rewrap")}
        await _put_all(backend, {key: sealed("old") for key in keys.values()})
        generations = {name: (await _row(backend, key)).generation for name, key in keys.items()}

        def claim(name: str) -> Awaitable[bool]:
            return other.claim_lease(keys[name], generation=generations[name], holder="h", duration=1.0)

        async with backend.transaction() as transaction:
            for key in keys.values():
                await transaction.lock(key)
            tasks = {
                "put": asyncio.ensure_future(other.put(keys["put"], sealed("lone"))),
                "delete": asyncio.ensure_future(other.delete(keys["delete"])),
                "changed": asyncio.ensure_future(claim("changed")),
                "unchanged": asyncio.ensure_future(claim("unchanged")),
                "rewrap": asyncio.ensure_future(
                    other.rewrap(keys["rewrap"], sealed("stale"), generation=generations["rewrap"])
                ),
            }
            await _still_waits(*tasks.values())
            await _put_all(transaction, {keys[name]: sealed("held") for name in ("put", "delete", "changed", "rewrap")})
            await _still_waits(*tasks.values())
            held = time.monotonic()
        outcomes = dict(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))
        assert outcomes == {"put": None, "delete": True, "changed": False, "unchanged": True, "rewrap": False}
        record = await _row(backend, keys["unchanged"])
        elapsed = time.monotonic() - held
        assert record.lease_expires_in is not None
        # Granted on the clock after the wait of two pauses, not on the one before it.
        assert record.lease_expires_in >= 1.0 - elapsed - PAUSE
        record = await _row(backend, keys["put"])
        assert (record.tokens, record.generation) == (sealed("lone"), generations["put"] + 2)
        assert await backend.get(keys["delete"]) is None
        assert (await _row(backend, keys["rewrap"])).tokens == sealed("held")

    @_on_two(lock_timeout=1)
    async def test_a_lock_that_is_not_free_in_time(self, backend: LockingBackend, other: LockingBackend) -> None:
        """LockTimeoutError within the bound; nothing of the call is stored; then the row can be locked at once."""
        await _stored(backend, OTHER, "old")

        async def lock() -> None:
            async with other.transaction() as transaction:
                await transaction.lock(OTHER)

        async def lone_put() -> None:
            await other.put(OTHER, sealed("timed out"))

        async def bounded(operation: Callable[[], Awaitable[None]]) -> float:
            started = time.monotonic()
            with pytest.raises(LockTimeoutError) as caught:
                await operation()
            assert isinstance(caught.value, TimeoutError)
            return time.monotonic() - started

        async with backend.transaction() as transaction:
            await transaction.lock(OTHER)
            for waited in await asyncio.gather(bounded(lock), bounded(lone_put)):
                assert 0.8 <= waited <= 2.5
            await transaction.put(OTHER, sealed("held"))
        async with asyncio.timeout(2):
            async with other.transaction() as transaction:
                locked = await transaction.lock(OTHER)
        assert locked is not None
        assert locked.tokens == sealed("held"), "the holder was not disturbed"

    @_on_two()
    async def test_a_cancelled_waiter(self, backend: LockingBackend, other: LockingBackend) -> None:
        """It returns within a second, and leaves nothing locked and no connection behind."""
        await _stored(backend)

        async def lock() -> None:
            async with other.transaction() as transaction:
                await transaction.lock(KEY)

        async with backend.transaction() as transaction:
            await transaction.lock(KEY)
            waiters = [asyncio.create_task(lock()) for _ in range(12)]
            waiters.append(asyncio.ensure_future(other.put(KEY, sealed("cancelled"))))
            await _still_waits(*waiters)
            for waiter in waiters:
                waiter.cancel()
            _, pending = await asyncio.wait(waiters, timeout=1)
            assert not pending
            assert all(waiter.cancelled() for waiter in waiters)
            await transaction.put(KEY, sealed("held"))
        assert (await _row(other)).tokens == sealed("held")
        async with asyncio.timeout(5):
            await lock()

    @_on_two()
    async def test_cancellation_inside_rolls_back(self, backend: LockingBackend, other: LockingBackend) -> None:
        await _stored(backend, tag="old")
        inside = asyncio.Event()

        async def hold() -> None:
            async with backend.transaction() as transaction:
                await transaction.lock(KEY)
                await transaction.put(KEY, sealed("new"))
                inside.set()
                await asyncio.Event().wait()

        for _ in range(12):
            inside.clear()
            holder = asyncio.create_task(hold())
            await inside.wait()
            holder.cancel()
            await asyncio.wait([holder], timeout=1)
            assert holder.cancelled()
            assert (await _row(other)).tokens == sealed("old")
        async with asyncio.timeout(5):
            await other.put(KEY, sealed("next"))

    @_on_two()
    async def test_a_cancelled_transaction_at_any_point(self, backend: LockingBackend, other: LockingBackend) -> None:
        """Committed or not, it is over: the row is whole, and the next one does not wait."""
        await _stored(backend, tag="old")

        async def replace_row() -> None:
            async with backend.transaction() as transaction:
                await transaction.lock(KEY)
                await _put_all(transaction, {KEY: sealed("new"), OTHER: sealed("new")})

        for steps in range(0, 60, 4):
            task = asyncio.create_task(replace_row())
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            async with asyncio.timeout(5), other.transaction() as transaction:
                locked = await transaction.lock(KEY)
                assert locked is not None
                found = await transaction.get(OTHER)
                assert (locked.tokens == sealed("new")) is (found is not None), "both rows or neither"
                await transaction.put(KEY, sealed("old"))
                await transaction.delete(OTHER)

    @_on_two()
    async def test_locking_a_missing_row_is_no_obstacle(self, backend: LockingBackend, other: LockingBackend) -> None:
        """Two transactions that both find nothing both insert, one after the other; the same row or two."""
        found: list[SealedRecord | None] = []

        async def first_insert(mine: LockingBackend, key: TokenKey, tag: str) -> None:
            async with mine.transaction() as transaction:
                found.append(await transaction.lock(key))
                # Where locks allow it, both get here before either writes.
                together.release()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(both.wait(), PAUSE)
                await transaction.put(key, sealed(tag))

        for keys in ((KEY, KEY), (OTHER, THIRD)):
            together, both = asyncio.Semaphore(0), asyncio.Event()

            async def meet(together: asyncio.Semaphore = together, both: asyncio.Event = both) -> None:
                for _ in range(2):
                    await together.acquire()
                both.set()

            await asyncio.gather(first_insert(backend, keys[0], "1"), first_insert(other, keys[1], "2"), meet())
            for key in keys:
                assert (await _row(backend, key)).tokens in (sealed("1"), sealed("2"))
        assert found.count(None) >= 3, "only the second one for the same row may have found it"

    @_on_two(lock_timeout=1)
    async def test_two_that_lock_in_opposite_orders(self, backend: LockingBackend, other: LockingBackend) -> None:
        """The dead-lock ends in an error of ours for one of them or both; what failed has written nothing."""
        await _put_all(backend, {KEY: sealed("old"), OTHER: sealed("old")})

        async def lock_both(mine: LockingBackend, keys: list[TokenKey], tag: str) -> None:
            async with mine.transaction() as transaction:
                for key in keys:
                    await transaction.lock(key)
                    await transaction.put(key, sealed(tag))
                    await asyncio.sleep(0.05)

        async with asyncio.timeout(6):
            outcomes = await asyncio.gather(
                lock_both(backend, [KEY, OTHER], "1"), lock_both(other, [OTHER, KEY], "2"), return_exceptions=True
            )
        assert all(outcome is None or isinstance(outcome, ConflictError | LockTimeoutError) for outcome in outcomes)
        rows = [await _row(backend, KEY), await _row(backend, OTHER)]
        assert len({row.tokens for row in rows}) == 1
        assert (rows[0].tokens == sealed("old")) is (None not in outcomes)
        async with asyncio.timeout(2):
            await lock_both(other, [KEY, OTHER], "next")

    @_on_two()
    async def test_an_idle_transaction_takes_no_connection(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """Before its first call: many more than a pool has can be open at once."""
        await _stored(backend)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(60):
                await stack.enter_async_context(backend.transaction())
            async with asyncio.timeout(5):
                assert (await _row(backend)).tokens == sealed()
                await other.put(KEY, sealed("b"))

    @_on_two()
    async def test_the_clock_is_read_after_the_wait(self, backend: LockingBackend, other: LockingBackend) -> None:
        """A lease that ends while somebody waits for the row's lock has ended, whoever waits and for whatever."""
        generation = await _stored(backend, tag="old")
        await _stored(backend, OTHER, "old")
        assert await backend.claim_lease(KEY, generation=generation, holder="late", duration=SHORT)
        await _expire(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="new", duration=2 * PAUSE)

        async def lock() -> SealedRecord | None:
            async with other.transaction() as transaction:
                return await transaction.lock(KEY)

        async with backend.transaction() as transaction:
            held = await transaction.lock(KEY)
            locking = asyncio.create_task(lock())
            await _still_waits(locking)
            # Nothing is written, so that the waiter gets the very version that it began to wait for.
            await asyncio.sleep(2 * PAUSE)
        record = await locking
        assert record is not None
        assert held is not None
        assert record.as_of - held.as_of >= 2.5 * PAUSE * 1_000_000
        assert record.lease_expires_in is not None
        assert record.lease_expires_in < 0

        generation = await _stored(backend, tag="old")
        assert await backend.claim_lease(KEY, generation=generation, holder="new", duration=2 * PAUSE)
        async with backend.transaction() as transaction:
            await transaction.lock(KEY)
            completing = asyncio.ensure_future(
                other.complete_lease(KEY, sealed("late"), generation=generation, holder="late")
            )
            await asyncio.wait([completing], timeout=PAUSE)
            refused_at_once = completing.done()  # right as well: the lease was live at that moment
            await asyncio.sleep(2 * PAUSE)
        assert await completing is not refused_at_once
        assert (await _row(backend)).generation == generation + (not refused_at_once)

    @_on_two()
    async def test_a_rollback_in_the_middle(self, backend: LockingBackend, other: LockingBackend) -> None:
        """Undoes what came before, frees the rows, and is the start of a new transaction; more than once."""
        generation = await _stored(backend, tag="old")
        async with backend.transaction() as transaction:
            await transaction.rollback()  # nothing has begun
            for tag in "12":
                await transaction.lock(KEY)
                await _put_all(transaction, {KEY: sealed("undone"), OTHER: sealed("undone")})
                await transaction.delete(KEY)
                await transaction.rollback()
                await transaction.rollback()
                # Others can lock and write at once, and the transaction sees it.
                async with asyncio.timeout(2):
                    async with other.transaction() as another:
                        locked = await another.lock(KEY)
                        assert locked is not None
                        assert locked.tokens == sealed("old" if tag == "1" else "1")
                    await other.put(KEY, sealed(tag))
                assert [record and record.tokens for record in await _rows(transaction, KEY, OTHER)] == [
                    sealed(tag),
                    None,
                ]
            locked = await transaction.lock(KEY)
            assert locked is not None
            assert (locked.tokens, locked.generation) == (sealed("2"), generation + 2)
            writing = asyncio.ensure_future(other.put(KEY, sealed("last")))
            await _still_waits(writing)
            await _put_all(transaction, {KEY: sealed("kept"), THIRD: sealed("kept")})
        await writing
        found = await _rows(other, KEY, OTHER, THIRD)
        assert [record and record.tokens for record in found] == [sealed("last"), None, sealed("kept")]
        assert (await _row(other)).generation == generation + 4
        async with backend.transaction() as transaction:
            await transaction.put(KEY, sealed("undone"))
            await transaction.rollback()
        assert (await _row(other)).tokens == sealed("last"), "nothing came after the rollback"

    @_on_two()
    async def test_waiting_for_a_lease_with_rollbacks(self, backend: LockingBackend, other: LockingBackend) -> None:
        """What the core does: lock, find a live lease, roll back, and lock again until its holder has completed."""
        generation = await _stored(backend, tag="old")
        assert await other.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        tries = 0

        async def lock_unleased() -> SealedTokens:
            nonlocal tries
            async with backend.transaction() as transaction:
                while True:
                    record = await transaction.lock(KEY)
                    assert record is not None
                    if record.lease_holder is None:
                        return record.tokens
                    tries += 1
                    await transaction.rollback()
                    await asyncio.sleep(0.005)

        waiters = [asyncio.create_task(lock_unleased()) for _ in range(12)]  # more than a usual pool has connections
        await _eventually(lambda: _at_least(12, lambda: tries), "everybody has found the lease")
        assert await other.complete_lease(KEY, sealed("new"), generation=generation, holder="h") is True
        async with asyncio.timeout(PATIENCE):
            assert await asyncio.gather(*waiters) == [sealed("new")] * 12

    @_on_two()
    async def test_a_cancelled_rollback(self, backend: LockingBackend, other: LockingBackend) -> None:
        """Wherever it is cancelled: nothing of the transaction stays, neither writes nor locks nor connections."""
        await _stored(backend, tag="old")

        async def undo() -> None:
            async with backend.transaction() as transaction:
                await transaction.lock(KEY)
                await transaction.put(KEY, sealed("undone"))
                begun.set()
                await transaction.rollback()

        for steps in range(12):
            begun = asyncio.Event()
            task = asyncio.create_task(undo())
            await begun.wait()
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task], timeout=1)
            assert task.done()
            async with asyncio.timeout(5), other.transaction() as transaction:
                locked = await transaction.lock(KEY)
                assert locked is not None
                assert locked.tokens == sealed("old")

    @_on_two()
    async def test_a_transaction_and_leases(self, backend: LockingBackend, other: LockingBackend) -> None:
        """A locking read shows the lease; a write in the transaction ends it; a roll-back brings it back."""
        generation = await _stored(backend)
        assert await other.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        with pytest.raises(KeyError):  # noqa: PT012
            async with backend.transaction() as transaction:
                locked = await transaction.lock(KEY)
                assert locked is not None
                assert locked.lease_holder == "h"
                await transaction.put(KEY, sealed("undone"))
                raise KeyError
        record = await _row(backend)
        assert (record.tokens, record.generation, record.lease_holder) == (sealed(), generation, "h")
        async with backend.transaction() as transaction:
            await transaction.put(KEY, sealed("new"))
        await _assert_powerless(other, generation, "h")
        assert (await _row(backend)).lease_holder is None
