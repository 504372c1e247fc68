"""Values and steps that the conformance tests share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import pytest

from tokenstore.errors import TokenStoreError
from tokenstore.health import RowFilter
from tokenstore.protocol import Backend, BackendTransaction, SupportsRowLocks
from tokenstore.records import NO_METADATA, Failure, SealedRecord, SealedTokens, TokenKey

T = TypeVar("T")

KEY = TokenKey("github", "user-1")
OTHER = TokenKey("github", "user-1", "work")
THIRD = TokenKey("gitlab", "user-2")
LONG = 3600.0
"""Duration in seconds of a lease that does not expire during the test."""
SHORT = 0.03
"""Duration in seconds of a lease that expires during the test."""
TIMEOUT = 20.0
"""Seconds within which an expected event must happen, also on a busy machine."""
PAUSE = 0.1
"""Seconds for which a test watches that an event does not happen."""
SEALING_OVERHEAD = 2 + 32 + 12 + 16


class LockingBackend(Backend, SupportsRowLocks, Protocol):
    """A backend that also has row locks."""


@contextmanager
def raises(kind: type[TokenStoreError]) -> Iterator[pytest.ExceptionInfo[TokenStoreError]]:
    """Assert that the block raises this error, and that no exception of a driver is chained to it."""
    with pytest.raises(kind) as caught:
        yield caught
    assert_unchained(caught.value)


def assert_unchained(raised: BaseException) -> None:
    """Assert that no exception of a driver is chained to an error.

    A traceback, a log or an error tracker shows a chained exception, whose text may contain a row's data. ``from None``
    keeps it from being shown.
    """
    error: BaseException | None = raised
    while error is not None:
        assert isinstance(error, TokenStoreError), f"a {type(error).__name__} is chained to {raised!r}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


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


async def read_row(backend: Backend | BackendTransaction, key: TokenKey = KEY) -> SealedRecord:
    record = await backend.get(key)
    assert record is not None, f"no row for {key}"
    return record


async def read_rows(backend: Backend | BackendTransaction, *keys: TokenKey) -> list[SealedRecord | None]:
    return [await backend.get(key) for key in keys]


async def put_all(backend: Backend | BackendTransaction, entries: Mapping[TokenKey, SealedTokens]) -> None:
    for key, tokens in entries.items():
        await backend.put(key, tokens)


async def store_row(backend: Backend, key: TokenKey = KEY, tag: str = "a") -> int:
    """Store a row and return its generation."""
    await backend.put(key, sealed(tag))
    return (await read_row(backend, key)).generation


async def until(check: Callable[[], Awaitable[bool]], expected: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not await check():
        assert time.monotonic() < deadline, f"not true within {TIMEOUT} s: {expected}"
        await asyncio.sleep(0.002)


async def at_least(number: int, count: Callable[[], int]) -> bool:
    return count() >= number


async def wait_for_expiry(backend: Backend, key: TokenKey = KEY) -> None:
    async def expired() -> bool:
        left = (await read_row(backend, key)).lease_expires_in
        assert left is not None, "the row has no lease"
        return left < 0

    await until(expired, "the lease has expired")


async def assert_waiting(*tasks: asyncio.Task[Any]) -> None:
    done, _ = await asyncio.wait(tasks, timeout=PAUSE, return_when=asyncio.FIRST_COMPLETED)
    assert not done, f"tasks that did not wait for the row's lock: {done}"


async def all_keys(backend: Backend, limit: int, **where: Any) -> list[TokenKey]:
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


def each_operation(backend: Backend) -> list[Callable[[], Awaitable[object]]]:
    """Return one call of each operation on rows, which the database's clock is not."""
    held: dict[str, Any] = {"generation": 1, "holder": "h"}
    return [
        lambda: backend.get(KEY),
        lambda: backend.put(KEY, sealed()),
        lambda: backend.insert(KEY, sealed()),
        lambda: backend.delete(KEY),
        lambda: backend.scan(limit=1),
        lambda: backend.search(RowFilter(), limit=1),
        lambda: backend.scan_due(provider=KEY.provider, within=0.0, limit=1),
        lambda: backend.claim_lease(KEY, duration=LONG, **held),
        lambda: backend.complete_lease(KEY, sealed(), **held),
        lambda: backend.release_lease(KEY, **held),
        lambda: backend.release_lease(KEY, failure=Failure("invalid_grant"), **held),
        lambda: backend.clear_failure(KEY),
        lambda: backend.rewrap(KEY, sealed(), generation=1),
        lambda: backend.set_metadata(KEY, NO_METADATA, replacing=None),
    ]


async def fail_refresh(backend: Backend, generation: int, failure: Failure | None, key: TokenKey = KEY) -> None:
    """Claim the row's lease and release it with a failure."""
    assert await backend.claim_lease(key, generation=generation, holder="failing", duration=LONG)
    assert await backend.release_lease(key, generation=generation, holder="failing", failure=failure)


async def assert_cannot_change(backend: Backend, generation: int, holder: str, key: TokenKey = KEY) -> None:
    """Assert that calls with this generation and holder change nothing in the row.

    One exception is not asserted: a former holder may complete its lease if the row still has that generation and no
    live lease.
    """
    before = await read_row(backend, key)
    stale: dict[str, Any] = {"generation": generation, "holder": holder}
    if generation != before.generation or (before.lease_expires_in or 0) > 0:
        assert await backend.complete_lease(key, sealed("stale"), **stale) is False
    assert await backend.release_lease(key, **stale) is False
    assert await backend.release_lease(key, failure=Failure("stale"), **stale) is False
    if generation != before.generation:
        assert await backend.rewrap(key, sealed("stale"), generation=generation) is False
        assert await backend.claim_lease(key, duration=LONG, **stale) is False
    assert without_times(await read_row(backend, key)) == without_times(before)


def without_times(record: SealedRecord) -> SealedRecord:
    """Remove the fields whose values change as time passes."""
    failure = record.failure and Failure(record.failure.code, None)
    return replace(record, lease_expires_in=None, failure=failure, as_of=0)


def in_key_order(keys: Iterable[TokenKey]) -> list[TokenKey]:
    return sorted(keys, key=lambda key: tuple(part.encode() for part in key))
