"""Jobs of worker processes on values, and operations with faults that their races must find."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from support.broken_backends import Fault
from support.workers import Link
from tokenstore.value_records import SealedValue, ValueKey, ValueRow

__all__ = ["NAMESPACE", "InsertThatReadsThenPuts", "PopThatReadsThenDeletes", "insert_each", "pop_each", "put_each"]

NAMESPACE = "login"


async def put_each(link: Link, url: str, names: Sequence[str]) -> None:
    """Put a value under each name: the name itself."""
    (one, *_) = await link.open(url)
    link.meet()
    for name in names:
        await one.tokens.put_value(NAMESPACE, name, name, ttl=600)


async def pop_each(link: Link, url: str, names: Sequence[str], tasks: int, fault: Fault | None = None) -> list[str]:
    """Let so many tasks pop each value, one name after the other; return the values that they got."""
    (one, *_) = await link.open(url, fault)
    _ = await one.tokens.get_value(NAMESPACE, names[0])  # connects, so that all processes begin at the same time
    link.meet()
    found: list[Any] = []
    for name in names:
        found += await asyncio.gather(*(one.tokens.pop_value(NAMESPACE, name) for _ in range(tasks)))
    return [value for value in found if value is not None]


async def insert_each(link: Link, url: str, names: Sequence[str], tasks: int, fault: Fault | None = None) -> list[str]:
    """Let so many tasks put a value under each name if there is none; return the names for which they did."""
    (one, *_) = await link.open(url, fault)
    _ = await one.tokens.get_value(NAMESPACE, names[0])
    link.meet()
    found: list[str] = []
    for name in names:
        puts = (one.tokens.put_value(NAMESPACE, name, name, if_absent=True) for _ in range(tasks))
        found += [name for stored in await asyncio.gather(*puts) if stored]
    return found


class _ReadsThenDeletes:
    """A pop that reads the value, and then deletes it by its key: two callers may read it before one deletes it."""

    async def pop_value(self, key: ValueKey) -> ValueRow | None:
        backend: Any = super()
        row: ValueRow | None = await backend.get_value(key)
        if row is not None:
            await backend.pop_value(key)
        return row


class _ReadsThenPuts:
    """An insert that reads, and then puts the value: two callers may find none before one puts its value."""

    async def insert_value(self, key: ValueKey, value: SealedValue, *, ttl: float | None) -> bool:
        backend: Any = super()
        if await backend.get_value(key) is not None:
            return False
        await backend.put_value(key, value, ttl=ttl)
        return True


class InsertThatReadsThenPuts(Fault):
    """The fault, for `Link.open`, as the next one."""

    def __init__(self) -> None:
        super().__init__(
            "insert that reads, then puts",
            frozenset(),
            (),
            lambda real: type(f"Broken{real.__name__}", (_ReadsThenPuts, real), {}),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class PopThatReadsThenDeletes(Fault):
    """The fault, for `Link.open`. It has no place in FAULTS: the property tests there use no values."""

    def __init__(self) -> None:
        super().__init__(
            "pop that reads, then deletes",
            frozenset(),
            (),
            lambda real: type(f"Broken{real.__name__}", (_ReadsThenDeletes, real), {}),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
