"""Conformance tests for backends, as test classes to inherit from. They need pytest, but no pytest plugin.

To test a backend, write a subclass that returns the URL of an empty store::

    from tokenstore.testing.conformance import BackendConformance, RowLockConformance, SharedBackendConformance


    class TestMine(BackendConformance, RowLockConformance):
        def make_url(self, tmp_path):
            return f"mine://{tmp_path}"


    class TestMineShared(SharedBackendConformance, RowLockConformance):
        make_url = TestMine.make_url

:class:`BackendConformance` is for every backend, :class:`RowLockConformance` for backends that have ``transaction()``,
and :class:`SharedBackendConformance` for backends whose data several processes can open. Together with the last one,
the tests of two callers use two backend objects, which share nothing but the database.
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
"""Duration in seconds of a lease that does not expire during the test."""
SHORT = 0.03
"""Duration in seconds of a lease that expires during the test."""
TIMEOUT = 20.0
"""Seconds within which an expected event must happen, also on a busy machine."""
PAUSE = 0.1
"""Seconds for which a test watches that an event does not happen."""
_SEALING_OVERHEAD = 2 + 32 + 12 + 16


class LockingBackend(Backend, SupportsRowLocks, Protocol):
    """A backend that also has row locks."""


def sealed(tag: str = "a", **changes: Any) -> SealedTokens:
    """Invent sealed tokens; every field is derived from ``tag``, unless ``changes`` replaces it."""
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
    """Opens and closes the backend under test. Override :meth:`make_url`; the other methods have defaults."""

    __test__ = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Without this, pytest would also collect the base classes that a test module imports.
        cls.__test__ = cls.make_url is not Testbed.make_url

    needs_setup: ClassVar[bool] = True
    """Whether the backend fails with TableMissingError until ``setup()`` has run."""

    def make_url(self, tmp_path: Path) -> str:
        """Return the URL of an empty store: a new file, or a table that does not exist yet."""
        raise NotImplementedError(f"{type(self).__name__} must define make_url(self, tmp_path)")

    def open(self, url: str, **options: Any) -> Backend:
        """Make a backend. The default looks the URL up in the registry, as ``open_store(url)`` does."""
        return backend_for_url(url, options)

    async def close(self, backend: Backend) -> None:
        """Close a backend that :meth:`open` made, and everything else that ``open`` made for it."""
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
        """Yield the second caller's backend: the same object, unless several processes can open the data."""
        yield backend


def _check(
    arguments: Callable[..., Any], test: Callable[..., Coroutine[Any, Any, None]]
) -> Callable[[Testbed, Path], None]:
    """Make a test of a coroutine function; it runs in a new event loop with the backends that ``arguments`` opens."""

    @functools.wraps(test)
    def run(self: Testbed, tmp_path: Path) -> None:
        url = self.make_url(tmp_path)  # called outside the event loop because it may start a server

        async def main() -> None:
            async with asyncio.timeout(3 * TIMEOUT), arguments(self, url) as opened:
                await test(self, *opened)
            await _eventually(_only_this_task, "all tasks that the backend started have ended")

        asyncio.run(main())

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", "tmp_path")]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what pytest reads
    return cast(Callable[[Testbed, Path], None], run)


async def _only_this_task() -> bool:
    return asyncio.all_tasks() == {asyncio.current_task()}


def _on_one_backend(test: Callable[[Any, Any], Coroutine[Any, Any, None]]) -> Callable[[Testbed, Path], None]:
    """Decorate a test of one backend on which ``setup()`` has run."""

    @asynccontextmanager
    async def arguments(bed: Testbed, url: str) -> AsyncIterator[tuple[Backend]]:
        async with bed.opened(url) as backend:
            yield (backend,)

    return _check(arguments, test)


def _on_url(test: Callable[[Any, str], Coroutine[Any, Any, None]]) -> Callable[[Testbed, Path], None]:
    """Decorate a test that opens its backends itself."""

    @asynccontextmanager
    async def arguments(_bed: Testbed, url: str) -> AsyncIterator[tuple[str]]:
        yield (url,)

    return _check(arguments, test)


def _on_two_backends(
    **options: Any,
) -> Callable[[Callable[[Any, Any, Any], Coroutine[Any, Any, None]]], Callable[[Testbed, Path], None]]:
    """Decorate a test of two callers that have a backend each, made with these options."""

    @asynccontextmanager
    async def arguments(bed: Testbed, url: str) -> AsyncIterator[tuple[Backend, Backend]]:
        async with bed.opened(url, **options) as backend, bed.second(url, backend, **options) as other:
            yield backend, other

    return lambda test: _check(arguments, test)


async def _row(backend: Backend | BackendTransaction, key: TokenKey = KEY) -> SealedRecord:
    record = await backend.get(key)
    assert record is not None, f"no row for {key}"
    return record


async def _rows(backend: Backend | BackendTransaction, *keys: TokenKey) -> list[SealedRecord | None]:
    return [await backend.get(key) for key in keys]


async def _put_all(backend: Backend | BackendTransaction, entries: Mapping[TokenKey, SealedTokens]) -> None:
    for key, tokens in entries.items():
        await backend.put(key, tokens)


async def _stored(backend: Backend, key: TokenKey = KEY, tag: str = "a") -> int:
    """Store a row and return its generation."""
    await backend.put(key, sealed(tag))
    return (await _row(backend, key)).generation


async def _eventually(check: Callable[[], Awaitable[bool]], expected: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not await check():
        assert time.monotonic() < deadline, f"not true within {TIMEOUT} s: {expected}"
        await asyncio.sleep(0.002)


async def _at_least(number: int, count: Callable[[], int]) -> bool:
    return count() >= number


async def _wait_for_expiry(backend: Backend, key: TokenKey = KEY) -> None:
    async def expired() -> bool:
        left = (await _row(backend, key)).lease_expires_in
        assert left is not None, "the row has no lease"
        return left < 0

    await _eventually(expired, "the lease has expired")


async def _assert_waiting(*tasks: asyncio.Task[Any]) -> None:
    done, _ = await asyncio.wait(tasks, timeout=PAUSE, return_when=asyncio.FIRST_COMPLETED)
    assert not done, f"tasks that did not wait for the row's lock: {done}"


async def _all_keys(backend: Backend, limit: int, **where: Any) -> list[TokenKey]:
    """Read all keys, ``limit`` rows a page."""
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
    """Return one call of each operation on rows."""
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


async def _assert_cannot_change(backend: Backend, generation: int, holder: str, key: TokenKey = KEY) -> None:
    """Assert that calls with this generation and holder change nothing in the row.

    One exception is not asserted: a former holder may complete its lease if the row still has that generation and no
    live lease.
    """
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
    """Remove the fields whose values change as time passes."""
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


class BackendConformance(Testbed):
    """The tests of :class:`tokenstore.protocol.Backend`."""

    @_on_one_backend
    async def test_is_a_backend(self, backend: Backend) -> None:
        assert isinstance(backend, Backend)

    # Setting up and closing

    @_on_url
    async def test_without_setup_every_operation_raises_table_missing_error(self, url: str) -> None:
        """No operation lets the driver's own exception through."""
        async with self.opened(url, setup=False) as backend:
            if not self.needs_setup:
                assert await backend.get(KEY) is None
                return
            for operation in _each_operation(backend):
                with pytest.raises(TableMissingError):
                    await operation()

    @_on_one_backend
    async def test_repeated_setup_changes_nothing(self, backend: Backend) -> None:
        """A second ``setup()``, and eight more at the same time, succeed and leave existing rows as they are."""
        generation = await _stored(backend)
        await backend.setup()
        await asyncio.gather(*(backend.setup() for _ in range(8)))
        assert (await _row(backend)).generation == generation

    @_on_url
    async def test_first_setup_from_eight_tasks_at_once(self, url: str) -> None:
        async with self.opened(url, setup=False) as backend:
            await asyncio.gather(*(backend.setup() for _ in range(8)))
            await _stored(backend)

    @_on_one_backend
    async def test_operations_after_aclose_raise_store_closed_error(self, backend: Backend) -> None:
        """``aclose()`` can be called twice; every later operation raises StoreClosedError."""
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
    async def test_closing_a_backend_that_was_never_used(self, url: str) -> None:
        backend = self.open(url)
        await backend.aclose()
        await self.close(backend)

    # get, put, delete

    @_on_one_backend
    async def test_many_concurrent_calls_get_their_own_answers(self, backend: Backend) -> None:
        """Each of 1200 callers gets the row it asked for, even if the backend reads several rows in one statement."""
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

    @_on_one_backend
    async def test_put_inserts_a_row(self, backend: Backend) -> None:
        await backend.put(KEY, sealed())
        record = await _row(backend)
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

    @_on_one_backend
    async def test_absent_fields_are_read_as_none(self, backend: Backend) -> None:
        tokens = sealed(refresh_token=None, extra=None, access_token_expires_at=None, refresh_token_expires_at=None)
        await backend.put(KEY, tokens)
        assert (await _row(backend)).tokens == tokens
        await backend.put(KEY, sealed())
        await backend.put(KEY, tokens)
        assert (await _row(backend)).tokens == tokens, "a field of the replaced row was kept"

    @_on_one_backend
    async def test_put_replaces_a_row(self, backend: Backend) -> None:
        """The generation grows by one, ``created_at`` stays, and ``updated_at`` becomes later."""
        await backend.put(KEY, sealed("a"))
        old = await _row(backend)

        async def later() -> bool:
            await backend.put(OTHER, sealed())
            return (await _row(backend, OTHER)).updated_at > old.updated_at

        await _eventually(later, "the database's clock has advanced")
        await backend.put(KEY, sealed("b"))
        new = await _row(backend)
        assert new.tokens == sealed("b")
        assert new.generation == old.generation + 1
        assert new.created_at == old.created_at
        assert new.updated_at > old.updated_at

    @_on_one_backend
    async def test_put_of_the_same_values_changes_the_generation(self, backend: Backend) -> None:
        generation = await _stored(backend)
        await backend.put(KEY, sealed())
        assert (await _row(backend)).generation == generation + 1

    @_on_one_backend
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

    @_on_one_backend
    async def test_delete_removes_one_row_and_its_lease(self, backend: Backend) -> None:
        """``delete`` returns whether there was a row."""
        await _stored(backend, OTHER)
        assert await backend.delete(KEY) is False
        generation = await _stored(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        assert await backend.delete(KEY) is True
        assert await backend.get(KEY) is None
        assert await backend.delete(KEY) is False
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG) is False
        assert (await _row(backend, OTHER)).tokens == sealed()

    @_on_one_backend
    async def test_generations_are_not_reused_after_a_delete(self, backend: Backend) -> None:
        """A caller that still has a generation of a deleted row cannot change the new row."""
        seen: set[int] = set()
        for _ in range(3):
            generation = await _stored(backend)
            assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
            assert generation not in seen
            seen.add(generation)
            await backend.delete(KEY)
        generation = await _stored(backend, tag="new")
        for old in seen:
            await _assert_cannot_change(backend, old, "h")
        record = await _row(backend)
        assert (record.tokens, record.generation, record.lease_holder) == (sealed("new"), generation, None)

    @_on_one_backend
    async def test_keys_compare_byte_for_byte(self, backend: Backend) -> None:
        """Providers and user ids are not case-folded, normalised, trimmed or matched as patterns."""
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

    @_on_one_backend
    async def test_keys_of_maximum_length(self, backend: Backend) -> None:
        """A provider of 128 bytes and a user id of 512 bytes; keys that differ only in the last byte are different."""
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

    @_on_one_backend
    async def test_extreme_times(self, backend: Backend) -> None:
        """Times from the year 1 to the year 9999 keep their microseconds; 0 is a time and does not mean None."""
        first, last = -62_135_596_800_000_000, 253_402_300_799_999_999
        for number in (first, last, 0, 1, -1, 2**31 * 1_000_000, None):
            tokens = sealed(access_token_expires_at=number, refresh_token_expires_at=number)
            await backend.put(KEY, tokens)
            assert (await _row(backend)).tokens == tokens
            [row] = await backend.scan(limit=2)
            assert (row.access_token_expires_at, row.refresh_token_expires_at) == (number, number)

    @_on_one_backend
    async def test_tokens_of_maximum_size_and_any_bytes(self, backend: Backend) -> None:
        """Tokens of the maximum size, with what sealing adds, are read back unchanged."""
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

    @_on_one_backend
    async def test_as_of_is_the_database_time_of_the_read(self, backend: Backend) -> None:
        """``get`` and ``scan`` set ``as_of`` from the clock by which leases and failures expire."""
        generation = await _stored(backend)
        await _stored(backend, OTHER)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)

        async def clocks() -> list[int]:
            # One read alone, and two at the same time, which may share a statement.
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
        await _eventually(later, "the database's clock has advanced")
        assert len(ends) == 1, "as_of + lease_expires_in differs between reads of one lease"

    # scan

    @_on_one_backend
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

    @_on_one_backend
    async def test_scan_after_a_key_that_does_not_exist(self, backend: Backend) -> None:
        keys = [TokenKey(provider, user) for provider in ("b", "d") for user in ("2", "4")]
        await _put_all(backend, {key: sealed() for key in keys})
        places = [TokenKey(provider, user) for provider in "abcde" for user in "12345"]
        for after in places:
            expected = [key for key in keys if key > after]
            assert await _all_keys(backend, 3, after=after) == expected
            assert await _all_keys(backend, 3, after=after, provider="d") == [k for k in expected if k.provider == "d"]
            assert await _all_keys(backend, 3, after=after, user_id="4") == [k for k in expected if k.user_id == "4"]

    @_on_one_backend
    async def test_scan_returns_all_fields_but_the_tokens(self, backend: Backend) -> None:
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

    @_on_one_backend
    async def test_a_claim_sets_the_lease_and_no_other_field(self, backend: Backend) -> None:
        await _stored(backend)
        before = await _row(backend)
        assert await backend.claim_lease(KEY, generation=before.generation, holder="h" * 32, duration=60) is True
        record = await _row(backend)
        assert record.lease_holder == "h" * 32
        assert record.lease_expires_in is not None
        assert 60 - TIMEOUT < record.lease_expires_in <= 60
        assert _lasting(replace(record, lease_holder=None)) == _lasting(before)

    @_on_one_backend
    async def test_a_claim_is_refused_without_a_row_of_that_generation(self, backend: Backend) -> None:
        assert await backend.claim_lease(KEY, generation=1, holder="h", duration=LONG) is False
        generation = await _stored(backend)
        for other in (generation - 1, generation + 1):
            assert await backend.claim_lease(KEY, generation=other, holder="h", duration=LONG) is False
        assert (await _row(backend)).lease_holder is None

    @_on_one_backend
    async def test_a_live_lease_refuses_every_claim(self, backend: Backend) -> None:
        """Its own holder's claim is refused too, because a second claim would be a second refresh."""
        generation = await _stored(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        for holder in ("h", "H", "h ", "other"):
            assert await backend.claim_lease(KEY, generation=generation, holder=holder, duration=LONG) is False
        assert (await _row(backend)).lease_holder == "h"

    @_on_one_backend
    async def test_completing_a_lease_stores_the_tokens_and_ends_the_lease(self, backend: Backend) -> None:
        """The row gets the next generation, and has no lease and no failure."""
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
        await _assert_cannot_change(backend, generation, "h")

    @_on_one_backend
    async def test_only_the_lease_holder_can_end_a_lease(self, backend: Backend) -> None:
        generation = await _stored(backend)
        await _assert_cannot_change(backend, generation, "h")  # the row has no lease yet
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        for holder in ("H", "h ", "other"):
            await _assert_cannot_change(backend, generation, holder)
        await _assert_cannot_change(backend, generation + 1, "h")
        await _stored(backend, OTHER)
        await _assert_cannot_change(backend, generation, "h", OTHER)
        lease: dict[str, Any] = {"generation": generation, "holder": "h"}
        assert await backend.complete_lease(THIRD, sealed(), **lease) is False
        assert await backend.release_lease(THIRD, **lease) is False
        assert await backend.get(THIRD) is None

    @_on_one_backend
    async def test_a_released_lease_can_be_claimed_at_once(self, backend: Backend) -> None:
        generation = await _stored(backend)
        before = await _row(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        assert await backend.release_lease(KEY, generation=generation, holder="h") is True
        assert _lasting(await _row(backend)) == _lasting(before)
        assert await backend.release_lease(KEY, generation=generation, holder="h") is False
        assert await backend.claim_lease(KEY, generation=generation, holder="other", duration=LONG)

    @_on_one_backend
    async def test_a_failure_without_retry_time_refuses_claims_until_new_tokens(self, backend: Backend) -> None:
        generation = await _stored(backend)
        before = await _row(backend)
        await _fail(backend, generation, Failure("c" * 64))
        assert _lasting(await _row(backend)) == _lasting(replace(before, failure=Failure("c" * 64)))
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG) is False
        await backend.put(KEY, sealed())
        assert await backend.claim_lease(KEY, generation=generation + 1, holder="h", duration=LONG) is True
        assert await backend.complete_lease(KEY, sealed(), generation=generation + 1, holder="h")

    @_on_one_backend
    async def test_a_failure_with_retry_time_refuses_claims_until_then(self, backend: Backend) -> None:
        generation = await _stored(backend)
        await _fail(backend, generation, Failure("unavailable", LONG))
        failure = (await _row(backend)).failure
        assert failure is not None
        assert failure.code == "unavailable"
        assert failure.retry_in is not None
        assert LONG - TIMEOUT < failure.retry_in <= LONG
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG) is False
        generation = await _stored(backend)
        await _fail(backend, generation, Failure("unavailable", SHORT))

        async def granted() -> bool:
            return await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)

        await _eventually(granted, "a claim after the failure's retry time was granted")
        assert await backend.complete_lease(KEY, sealed("b"), generation=generation, holder="h")
        assert (await _row(backend)).failure is None

    @_on_one_backend
    async def test_a_release_replaces_an_earlier_failure(self, backend: Backend) -> None:
        generation = await _stored(backend)
        outcomes = [Failure("first", SHORT), Failure("second", SHORT), None, Failure("third")]
        for failure in outcomes:

            async def granted() -> bool:
                return await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)

            await _eventually(granted, "a claim after the failure's retry time was granted")
            assert await backend.release_lease(KEY, generation=generation, holder="h", failure=failure)
            found = (await _row(backend)).failure
            assert (found and found.code) == (failure and failure.code)
            assert (found and found.retry_in) is None or (failure and failure.retry_in) is not None

    @_on_one_backend
    async def test_an_expired_lease_can_be_completed(self, backend: Backend) -> None:
        """If no other holder claimed the lease, the late tokens are stored: they may be the only copy."""
        generation = await _stored(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="slow", duration=SHORT)
        await _wait_for_expiry(backend)
        assert await backend.complete_lease(KEY, sealed("late"), generation=generation, holder="slow") is True
        record = await _row(backend)
        assert (record.tokens, record.generation, record.lease_holder) == (sealed("late"), generation + 1, None)

    @_on_one_backend
    async def test_an_expired_lease_can_be_released_with_a_failure(self, backend: Backend) -> None:
        generation = await _stored(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="slow", duration=SHORT)
        await _wait_for_expiry(backend)
        refused = Failure("invalid_grant")
        assert await backend.release_lease(KEY, generation=generation, holder="slow", failure=refused) is True
        assert (await _row(backend)).failure == refused

    @_on_one_backend
    async def test_one_claim_of_an_expired_lease_is_granted(self, backend: Backend) -> None:
        """Of eight claims one is granted; after it, the former holder can neither complete nor release."""
        generation = await _stored(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="dead", duration=SHORT)
        await _wait_for_expiry(backend)
        holders = [f"holder-{number}" for number in range(8)]
        granted = await asyncio.gather(
            *(backend.claim_lease(KEY, generation=generation, holder=holder, duration=LONG) for holder in holders)
        )
        assert granted.count(True) == 1
        winner = holders[granted.index(True)]
        for loser in {"dead", *holders} - {winner}:
            await _assert_cannot_change(backend, generation, loser)
        assert (await _row(backend)).lease_holder == winner
        assert await backend.complete_lease(KEY, sealed("new"), generation=generation, holder=winner) is True

    @_on_one_backend
    async def test_a_former_holder_can_complete_after_the_new_holder_released(self, backend: Backend) -> None:
        """The late tokens also clear a failure of the new holder: they are newer than the tokens that failed."""
        for failure in (Failure("invalid_grant"), Failure("unavailable", LONG), None):
            generation = await _stored(backend, tag="old")
            assert await backend.claim_lease(KEY, generation=generation, holder="late", duration=SHORT)
            await _wait_for_expiry(backend)
            assert await backend.claim_lease(KEY, generation=generation, holder="new", duration=LONG)
            of: dict[str, Any] = {"generation": generation, "holder": "late"}
            completed = await backend.complete_lease(KEY, sealed("late"), **of)
            assert completed is False, "completed although another holder has a live lease"
            assert (await _row(backend)).tokens == sealed("old")
            assert await backend.release_lease(KEY, generation=generation, holder="new", failure=failure)
            assert await backend.release_lease(KEY, **of, failure=Failure("late")) is False
            assert await backend.complete_lease(KEY, sealed("late"), **of) is True
            record = await _row(backend)
            assert (record.tokens, record.generation) == (sealed("late"), generation + 1)
            assert (record.lease_holder, record.lease_expires_in, record.failure) == (None, None, None)
            assert await backend.complete_lease(KEY, sealed("twice"), **of) is False
            assert await backend.claim_lease(KEY, generation=generation + 1, holder="next", duration=LONG)

    @_on_one_backend
    async def test_a_former_holder_can_complete_after_the_new_lease_expired(self, backend: Backend) -> None:
        """The first of the two holders to complete stores its tokens; the other one's call returns False."""
        generation = await _stored(backend, tag="old")
        for holder in ("late", "new"):
            assert await backend.claim_lease(KEY, generation=generation, holder=holder, duration=SHORT)
            await _wait_for_expiry(backend)
        assert await backend.complete_lease(KEY, sealed("late"), generation=generation, holder="late") is True
        assert await backend.complete_lease(KEY, sealed("new"), generation=generation, holder="new") is False
        record = await _row(backend)
        assert (record.tokens, record.generation, record.lease_holder) == (sealed("late"), generation + 1, None)

    @_on_one_backend
    async def test_a_late_completion_does_not_replace_newer_tokens(self, backend: Backend) -> None:
        """The newer tokens are those of a new lease holder, of a put, or of a row deleted and stored again."""

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
            await _wait_for_expiry(backend)
            assert await backend.claim_lease(KEY, generation=generation, holder="new", duration=LONG)
            await newer(generation)
            assert await backend.complete_lease(KEY, sealed("late"), generation=generation, holder="late") is False
            assert (await _row(backend)).tokens == sealed("newer")

    @_on_one_backend
    async def test_a_put_ends_a_lease(self, backend: Backend) -> None:
        """After a put, or a delete and a put, the former holder can neither complete nor release."""
        generation = await _stored(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        await backend.put(KEY, sealed("newer"))
        await _assert_cannot_change(backend, generation, "h")
        await _assert_cannot_change(backend, generation + 1, "h")
        await backend.delete(KEY)
        assert await backend.complete_lease(KEY, sealed("stale"), generation=generation, holder="h") is False
        assert await backend.get(KEY) is None
        renewed = await _stored(backend, tag="renewed")
        for old in (generation, generation + 1, renewed):
            await _assert_cannot_change(backend, old, "h")

    @_on_two_backends()
    async def test_one_of_many_concurrent_claims_is_granted(self, backend: Backend, other: Backend) -> None:
        generation = await _stored(backend)
        for attempt in range(3):
            granted = await asyncio.gather(
                *(
                    (backend, other)[number % 2].claim_lease(
                        KEY, generation=generation, holder=f"{attempt}-{number}", duration=LONG
                    )
                    for number in range(16)
                )
            )
            assert granted.count(True) == 1
            holder = f"{attempt}-{granted.index(True)}"
            assert await other.complete_lease(KEY, sealed(str(attempt)), generation=generation, holder=holder)
            generation += 1

    @_on_two_backends()
    async def test_of_a_late_completion_and_a_concurrent_claim_one_succeeds(
        self, backend: Backend, other: Backend
    ) -> None:
        """Either the late holder's tokens are stored, or the new holder gets the lease; never both."""
        for attempt in range(5):
            generation = await _stored(backend, tag="old")
            assert await backend.claim_lease(KEY, generation=generation, holder="late", duration=SHORT)
            await _wait_for_expiry(backend)
            completed, claimed = await asyncio.gather(
                backend.complete_lease(KEY, sealed("late"), generation=generation, holder="late"),
                other.claim_lease(KEY, generation=generation, holder="new", duration=LONG),
            )
            assert completed is not claimed, f"attempt {attempt}"
            record = await _row(backend)
            expected = (sealed("late"), None) if completed else (sealed("old"), "new")
            assert (record.tokens, record.lease_holder) == expected

    # rewrap

    @_on_one_backend
    async def test_rewrap_changes_only_the_sealed_values(self, backend: Backend) -> None:
        """Generation, lease, failure and times stay, so that a lease holder can still end its lease."""
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
        assert LONG - TIMEOUT < record.lease_expires_in <= before.lease_expires_in
        assert await backend.release_lease(KEY, generation=generation, holder="h", failure=Failure("invalid_grant"))
        assert await backend.rewrap(KEY, sealed("again"), generation=generation) is True
        assert (await _row(backend)).failure == Failure("invalid_grant")

    @_on_one_backend
    async def test_rewrap_does_not_replace_newer_tokens(self, backend: Backend) -> None:
        assert await backend.rewrap(KEY, sealed(), generation=1) is False
        assert await backend.get(KEY) is None
        generation = await _stored(backend, tag="old")
        await backend.put(KEY, sealed("newer"))
        assert await backend.rewrap(KEY, sealed("stale"), generation=generation) is False
        assert (await _row(backend)).tokens == sealed("newer")

    # Waiting while another holder has the lease

    @_on_two_backends()
    async def test_watch_returns_in_time_and_holds_no_connection(self, backend: Backend, other: Backend) -> None:
        """40 watchers of one row, or of a row that does not exist, do not delay reads, and can be cancelled."""
        if not isinstance(backend, SupportsWatching):
            return
        generation = await _stored(backend)
        assert await other.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        for key in (KEY, THIRD):  # there is no row for THIRD
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

    # Concurrent callers

    @_on_two_backends()
    async def test_every_concurrent_put_gets_its_own_generation(self, backend: Backend, other: Backend) -> None:
        """After 32 concurrent puts of one row, its generation has grown by 32."""
        generation = await _stored(backend)
        await asyncio.gather(*((backend, other)[i % 2].put(KEY, sealed(str(i))) for i in range(32)))
        record = await _row(backend)
        assert record.generation == generation + 32
        assert record.tokens in [sealed(str(i)) for i in range(32)]

    @_on_two_backends()
    async def test_concurrent_first_puts_make_one_row(self, backend: Backend, other: Backend) -> None:
        for number in range(3):
            key = TokenKey("github", f"new-{number}")
            await asyncio.gather(*((backend, other)[i % 2].put(key, sealed(str(i))) for i in range(8)))
            assert (await _row(backend, key)).tokens in [sealed(str(i)) for i in range(8)]
            assert len(await backend.scan(user_id=key.user_id, limit=3)) == 1

    @_on_two_backends()
    async def test_a_read_never_mixes_two_writes(self, backend: Backend, other: Backend) -> None:
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

    @_on_one_backend
    async def test_cancelled_calls_release_locks_and_connections(self, backend: Backend) -> None:
        """A call is cancelled after any number of steps of the event loop; the row is always one complete write."""
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
        # The database may still execute the statement of a cancelled call, so the number of writes is not known.
        async with asyncio.timeout(TIMEOUT):
            await asyncio.gather(*(backend.get(KEY) for _ in range(32)))
            await asyncio.gather(*(backend.put(KEY, sealed("d")) for _ in range(8)))
        record = await _row(backend)
        assert record.tokens == sealed("d")
        assert generation + 8 <= record.generation <= generation + 8 + attempts


class SharedBackendConformance(Testbed):
    """Tests of two backend objects that open the same data, as two processes do.

    Inherit from it together with :class:`BackendConformance` or :class:`RowLockConformance`. In their tests of two
    callers, each caller then has its own backend object.
    """

    @asynccontextmanager
    async def second(self, url: str, backend: Backend, **options: Any) -> AsyncIterator[Backend]:  # noqa: ARG002
        """Yield a second backend object that opens the same URL."""
        async with self.opened(url, **options) as other:
            yield other

    @_on_two_backends()
    async def test_one_backend_reads_what_the_other_wrote(self, backend: Backend, other: Backend) -> None:
        await backend.put(KEY, sealed("a"))
        assert (await _row(other)).tokens == sealed("a")
        await other.put(KEY, sealed("b"))
        assert (await _row(backend)).tokens == sealed("b")
        assert await other.delete(KEY)
        assert await backend.get(KEY) is None

    @_on_two_backends()
    async def test_closing_one_backend_leaves_the_other_open(self, backend: Backend, other: Backend) -> None:
        await backend.put(KEY, sealed())
        await other.aclose()
        assert (await _row(backend)).tokens == sealed()

    @_on_two_backends()
    async def test_a_lease_claimed_on_one_backend_holds_on_the_other(self, backend: Backend, other: Backend) -> None:
        generation = await _stored(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=LONG)
        assert (await _row(other)).lease_holder == "h"
        assert await other.claim_lease(KEY, generation=generation, holder="other", duration=LONG) is False
        assert await backend.release_lease(KEY, generation=generation, holder="h")
        assert await other.claim_lease(KEY, generation=generation, holder="other", duration=LONG) is True
        await _assert_cannot_change(backend, generation, "h")

    @_on_url
    async def test_setup_from_eight_backends_at_once(self, url: str) -> None:
        backends = [self.open(url) for _ in range(8)]
        try:
            await asyncio.gather(*(backend.setup() for backend in backends))
            await asyncio.gather(*(backend.put(KEY, sealed()) for backend in backends))
            assert len(await backends[0].scan(limit=2)) == 1
        finally:
            for backend in backends:
                await self.close(backend)


class RowLockConformance(Testbed):
    """The tests of :class:`tokenstore.protocol.SupportsRowLocks` and :class:`tokenstore.protocol.BackendTransaction`.

    The backend must accept the option ``lock_timeout``, in seconds.
    """

    @_on_two_backends()
    async def test_is_a_backend_with_row_locks(self, backend: LockingBackend, other: LockingBackend) -> None:
        for each in (backend, other):
            assert isinstance(each, SupportsRowLocks)
            async with each.transaction() as transaction:
                assert isinstance(transaction, BackendTransaction)

    @_on_two_backends()
    async def test_a_transaction_reads_its_own_writes_and_others_read_them_after_the_commit(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """The isolation level is READ COMMITTED, and reads never wait for a row's lock."""
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

    @_on_two_backends()
    async def test_a_transaction_reads_what_others_commit(self, backend: LockingBackend, other: LockingBackend) -> None:
        """An earlier read of the row in the same transaction hides no later commit, and prevents no write."""
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

    @_on_two_backends()
    async def test_an_error_rolls_back(self, backend: LockingBackend, other: LockingBackend) -> None:
        """The caller's exception is raised unchanged; nothing is stored, and no lock or connection stays taken."""
        await _stored(backend, tag="old")
        before = await _row(backend)
        for _ in range(12):  # more transactions than a usual pool has connections
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

    @_on_two_backends()
    async def test_a_waiter_reads_what_the_lock_holder_stored(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """A caller that waited never gets the old row; if the lock holder deleted the row, the caller gets None."""
        generation = await _stored(backend, tag="0")
        await _stored(backend, OTHER)

        async def wait(key: TokenKey) -> tuple[SealedRecord | None, SealedRecord | None]:
            async with other.transaction() as transaction:
                return await transaction.lock(key), await transaction.get(key)

        async with backend.transaction() as transaction:
            for key in (KEY, OTHER):
                await transaction.lock(key)
            waiters = [asyncio.create_task(wait(key)) for key in (KEY, OTHER)]
            await _assert_waiting(*waiters)
            await transaction.put(KEY, sealed("1"))
            await transaction.delete(OTHER)
            await _assert_waiting(*waiters)
        (locked, read), gone = await asyncio.gather(*waiters)
        assert locked is not None
        assert read is not None
        assert (locked.tokens, locked.generation) == (sealed("1"), generation + 1)
        assert _lasting(read) == _lasting(locked)
        assert gone == (None, None)

    @_on_two_backends()
    async def test_increments_under_the_lock_are_not_lost(self, backend: LockingBackend, other: LockingBackend) -> None:
        """Twenty tasks lock the row, add one to a number in it, and write it: the number becomes 20."""
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

    @_on_two_backends()
    async def test_writes_outside_a_transaction_wait_for_the_lock(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """After the wait a put or delete takes effect; a claim or rewrap is refused if the lock holder wrote tokens."""
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
            await _assert_waiting(*tasks.values())
            await _put_all(transaction, {keys[name]: sealed("held") for name in ("put", "delete", "changed", "rewrap")})
            await _assert_waiting(*tasks.values())
            held = time.monotonic()
        outcomes = dict(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))
        assert outcomes == {"put": None, "delete": True, "changed": False, "unchanged": True, "rewrap": False}
        record = await _row(backend, keys["unchanged"])
        elapsed = time.monotonic() - held
        assert record.lease_expires_in is not None
        # The lease must be granted by the clock after the wait of two pauses; otherwise it would expire too soon.
        assert record.lease_expires_in >= 1.0 - elapsed - PAUSE
        record = await _row(backend, keys["put"])
        assert (record.tokens, record.generation) == (sealed("lone"), generations["put"] + 2)
        assert await backend.get(keys["delete"]) is None
        assert (await _row(backend, keys["rewrap"])).tokens == sealed("held")

    @_on_two_backends(lock_timeout=1)
    async def test_waiting_for_a_lock_ends_with_lock_timeout_error(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """The call ends after ``lock_timeout`` and stores nothing; once the lock is free, the row can be locked."""
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
        assert locked.tokens == sealed("held"), "the lock holder's write is missing"

    @_on_two_backends()
    async def test_a_cancelled_waiter_releases_lock_and_connection(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """A call that waits for a row's lock and is cancelled ends within a second and stores nothing."""
        await _stored(backend)

        async def lock() -> None:
            async with other.transaction() as transaction:
                await transaction.lock(KEY)

        async with backend.transaction() as transaction:
            await transaction.lock(KEY)
            waiters = [asyncio.create_task(lock()) for _ in range(12)]
            waiters.append(asyncio.ensure_future(other.put(KEY, sealed("cancelled"))))
            await _assert_waiting(*waiters)
            for waiter in waiters:
                waiter.cancel()
            _, pending = await asyncio.wait(waiters, timeout=1)
            assert not pending
            assert all(waiter.cancelled() for waiter in waiters)
            await transaction.put(KEY, sealed("held"))
        assert (await _row(other)).tokens == sealed("held")
        async with asyncio.timeout(5):
            await lock()

    @_on_two_backends()
    async def test_cancellation_in_a_transaction_rolls_back(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
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

    @_on_two_backends()
    async def test_a_transaction_cancelled_at_any_step_stores_all_or_nothing(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """It is committed or rolled back as a whole, and leaves no lock for which the next transaction would wait."""
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
                assert (locked.tokens == sealed("new")) is (found is not None), "only one of the two rows was stored"
                await transaction.put(KEY, sealed("old"))
                await transaction.delete(OTHER)

    @_on_two_backends()
    async def test_two_transactions_can_lock_a_missing_row_and_insert(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """Both find no row, then both insert without an error, the same row or a row each."""
        found: list[SealedRecord | None] = []

        async def first_insert(mine: LockingBackend, key: TokenKey, tag: str) -> None:
            async with mine.transaction() as transaction:
                found.append(await transaction.lock(key))
                # Unless the backend locks more than a row, both transactions get here before either writes.
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
        assert found.count(None) >= 3, "more than one of the four locking reads found a row"

    @_on_two_backends(lock_timeout=1)
    async def test_a_deadlock_ends_with_an_error(self, backend: LockingBackend, other: LockingBackend) -> None:
        """Two transactions lock two rows in opposite orders: one or both raise, and a failed one stores nothing."""
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

    @_on_two_backends()
    async def test_an_idle_transaction_takes_no_connection(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """Before their first call, 60 transactions can be open, which is more than a usual pool has connections."""
        await _stored(backend)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(60):
                await stack.enter_async_context(backend.transaction())
            async with asyncio.timeout(5):
                assert (await _row(backend)).tokens == sealed()
                await other.put(KEY, sealed("b"))

    @_on_two_backends()
    async def test_the_clock_is_read_after_waiting_for_the_lock(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """A lease that expires while a call waits for the row's lock counts as expired, for reads and completions."""
        generation = await _stored(backend, tag="old")
        await _stored(backend, OTHER, "old")
        assert await backend.claim_lease(KEY, generation=generation, holder="late", duration=SHORT)
        await _wait_for_expiry(backend)
        assert await backend.claim_lease(KEY, generation=generation, holder="new", duration=2 * PAUSE)

        async def lock() -> SealedRecord | None:
            async with other.transaction() as transaction:
                return await transaction.lock(KEY)

        async with backend.transaction() as transaction:
            held = await transaction.lock(KEY)
            locking = asyncio.create_task(lock())
            await _assert_waiting(locking)
            # Nothing is written, so the waiter reads the same row version as before the wait, where a stale time shows.
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
            # A backend may also refuse without waiting, because the lease was live at that moment.
            refused_at_once = completing.done()
            await asyncio.sleep(2 * PAUSE)
        assert await completing is not refused_at_once
        assert (await _row(backend)).generation == generation + (not refused_at_once)

    @_on_two_backends()
    async def test_a_transaction_continues_after_rollback(self, backend: LockingBackend, other: LockingBackend) -> None:
        """``rollback()`` undoes all writes and releases all locks; it can be called several times."""
        generation = await _stored(backend, tag="old")
        async with backend.transaction() as transaction:
            await transaction.rollback()  # before the first statement
            for tag in "12":
                await transaction.lock(KEY)
                await _put_all(transaction, {KEY: sealed("undone"), OTHER: sealed("undone")})
                await transaction.delete(KEY)
                await transaction.rollback()
                await transaction.rollback()
                # Other callers can lock and write without waiting, and this transaction reads what they wrote.
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
            await _assert_waiting(writing)
            await _put_all(transaction, {KEY: sealed("kept"), THIRD: sealed("kept")})
        await writing
        found = await _rows(other, KEY, OTHER, THIRD)
        assert [record and record.tokens for record in found] == [sealed("last"), None, sealed("kept")]
        assert (await _row(other)).generation == generation + 4
        async with backend.transaction() as transaction:
            await transaction.put(KEY, sealed("undone"))
            await transaction.rollback()
        assert (await _row(other)).tokens == sealed("last"), "the write before the rollback was stored"

    @_on_two_backends()
    async def test_waiting_for_a_lease_with_rollbacks(self, backend: LockingBackend, other: LockingBackend) -> None:
        """As in the core: lock, find a live lease, roll back, and repeat until the lease holder has completed."""
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
        await _eventually(lambda: _at_least(12, lambda: tries), "waiting transactions have found the lease 12 times")
        assert await other.complete_lease(KEY, sealed("new"), generation=generation, holder="h") is True
        async with asyncio.timeout(TIMEOUT):
            assert await asyncio.gather(*waiters) == [sealed("new")] * 12

    @_on_two_backends()
    async def test_a_rollback_cancelled_at_any_step_is_complete(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """No write of the transaction is stored, and no lock or connection stays taken."""
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

    @_on_two_backends()
    async def test_a_write_in_a_transaction_ends_a_lease_unless_rolled_back(
        self, backend: LockingBackend, other: LockingBackend
    ) -> None:
        """A locking read returns the lease; after a roll-back the lease is unchanged."""
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
        await _assert_cannot_change(other, generation, "h")
        assert (await _row(backend)).lease_holder is None
