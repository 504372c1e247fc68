"""What the processes of the conformance tests do. Each job opens a backend of its own."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from tokenstore.protocol import Backend, SupportsRowLocks, SupportsValues
from tokenstore.records import TokenKey
from tokenstore.registry import backend_for_url
from tokenstore.testing.conformance._helpers import KEY, LONG, OTHER, read_row, sealed
from tokenstore.testing.conformance._workers import Link
from tokenstore.value_records import SealedValue, ValueKey

GROUP = "race"

Opener = Callable[[str], Backend]


def open_url(url: str) -> Backend:
    """Make the backend for a URL, without options."""
    return backend_for_url(url, {})


@asynccontextmanager
async def _opened(opener: Opener, url: str, link: Link) -> AsyncIterator[Any]:
    """Open a backend and connect it, so that the processes begin at the same time; the protocols are the caller's."""
    backend = opener(url)
    try:
        _ = await backend.get(KEY)
        link.meet()
        yield backend
    finally:
        await backend.aclose()


async def set_up(link: Link, opener: Opener, url: str, name: str) -> None:
    """Set up, and write a row."""
    backend = opener(url)
    try:
        link.meet()
        await backend.setup()
        await backend.put(TokenKey("github", name), sealed())
    finally:
        await backend.aclose()


async def prepare(link: Link, opener: Opener, url: str, rows: Sequence[TokenKey], values: Sequence[str]) -> list[int]:
    """Set up, and write rows, whose generations are returned, and values."""
    backend: Any = opener(url)
    try:
        link.meet()
        await backend.setup()
        for key in rows:
            await backend.put(key, sealed(access_token_expires_at=0))
        for name in values:
            await backend.put_value(ValueKey(GROUP, name), SealedValue(name.encode(), "k"), ttl=LONG)
        return [(await read_row(backend, key)).generation for key in rows]
    finally:
        await backend.aclose()


async def capabilities(link: Link, opener: Opener, url: str) -> tuple[bool, bool]:
    """Return whether the backend has row locks, and whether it keeps values."""
    backend = opener(url)
    link.meet()
    await backend.aclose()
    return isinstance(backend, SupportsRowLocks), isinstance(backend, SupportsValues)


async def read(link: Link, opener: Opener, url: str) -> tuple[int, int | None]:
    """Return a row's generation and the number in it."""
    async with _opened(opener, url, link) as backend:
        record = await read_row(backend)
        return record.generation, record.tokens.access_token_expires_at


async def insert(link: Link, opener: Opener, url: str, rows: Sequence[TokenKey], tag: str) -> list[TokenKey]:
    """Insert each row; return those that this process inserted and finds unchanged."""
    async with _opened(opener, url, link) as backend:
        inserted = [key for key in rows if await backend.insert(key, sealed(tag))]
        return [key for key in inserted if (await read_row(backend, key)).tokens == sealed(tag)]


async def put(link: Link, opener: Opener, url: str, times: int) -> None:
    """Write one row again and again."""
    async with _opened(opener, url, link) as backend:
        for number in range(times):
            await backend.put(KEY, sealed(str(number)))


async def claim(
    link: Link, opener: Opener, url: str, rows: Sequence[TokenKey], generations: Sequence[int], holder: str
) -> list[TokenKey]:
    """Claim the lease of each row; return the rows whose claim was granted."""
    async with _opened(opener, url, link) as backend:
        return [
            key
            for key, generation in zip(rows, generations, strict=True)
            if await backend.claim_lease(key, generation=generation, holder=holder, duration=LONG)
        ]


async def increment(link: Link, opener: Opener, url: str, times: int) -> None:
    """Lock a row, add one to the number in it, and write it, again and again."""
    async with _opened(opener, url, link) as backend:
        for _ in range(times):
            async with backend.transaction() as transaction:
                record = await transaction.lock(KEY)
                number = record.tokens.access_token_expires_at + 1
                await transaction.put(KEY, replace(record.tokens, access_token_expires_at=number))


async def pop(link: Link, opener: Opener, url: str, values: Sequence[str]) -> list[str]:
    """Pop each value; return those that this process got."""
    async with _opened(opener, url, link) as backend:
        popped = [await backend.pop_value(ValueKey(GROUP, name)) for name in values]
        return [row.value.sealed.decode() for row in popped if row is not None]


async def hold_lock(link: Link, opener: Opener, url: str) -> None:
    """Lock a row, write it, and wait, without a commit, until the process is killed."""
    async with _opened(opener, url, link) as backend, backend.transaction() as transaction:
        record = await transaction.lock(KEY)
        await transaction.put(KEY, replace(record.tokens, access_token_expires_at=1))
        link.meet()


def use_two_event_loops(link: Link, opener: Opener, url: str) -> None:
    """Use one backend object in three event loops, one after the other."""
    link.meet()
    backend = opener(url)
    # A connection of an event loop that has ended warns when it is garbage-collected.
    with warnings.catch_warnings(action="ignore"):
        for _ in range(2):
            asyncio.run(_use(backend, KEY))
        asyncio.run(backend.aclose())


def use_after_fork(link: Link, opener: Opener, url: str) -> int:
    """Fork after the backend was used, and use it in both processes; return the child's exit code."""
    link.meet()
    backend = opener(url)
    with asyncio.Runner() as runner:
        runner.run(_use(backend, KEY))
        if (pid := os.fork()) == 0:
            code = 1
            try:
                # A connection of the parent warns when it is garbage-collected.
                warnings.simplefilter("ignore")
                asyncio.run(_use(backend, OTHER))
                code = 0
            finally:
                os._exit(code)
        runner.run(_use(backend, KEY))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        runner.run(_use(backend, KEY))
        runner.run(backend.aclose())
    return code


async def _use(backend: Backend, key: TokenKey) -> None:
    await backend.setup()
    for tag in "ab":
        await backend.put(key, sealed(tag))
        assert (await read_row(backend, key)).tokens == sealed(tag)
    if isinstance(backend, SupportsRowLocks):
        async with backend.transaction() as transaction:
            assert await transaction.lock(key) is not None
