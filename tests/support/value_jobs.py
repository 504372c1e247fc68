"""Jobs of worker processes on values, and a pop with a fault that their race must find."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from support.broken_backends import Fault
from support.workers import Link
from tokenstore.value_records import ValueKey, ValueRow

__all__ = ["NAMESPACE", "PopThatReadsThenDeletes", "pop_each", "put_each"]

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


class _ReadsThenDeletes:
    """A pop that reads the value, and then deletes it by its key: two callers may read it before one deletes it."""

    async def pop_value(self, key: ValueKey) -> ValueRow | None:
        backend: Any = super()
        row: ValueRow | None = await backend.get_value(key)
        if row is not None:
            await backend.pop_value(key)
        return row


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
