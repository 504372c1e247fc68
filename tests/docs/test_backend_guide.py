"""The table of writes in the guide for authors of backends says what the reference model does."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from support.pages import BACKENDS, codes, table
from tokenstore import protocol
from tokenstore.protocol import Backend
from tokenstore.records import Failure, SealedMetadata, TokenKey
from tokenstore.testing.conformance import sealed
from tokenstore_memory import MemoryBackend

KEY = TokenKey("github", "user-1")
COLUMNS = ("tokens", "generation", "due_at", "lease", "failure", "metadata", "created_at", "updated_at")
ROWS = [(cells[0], dict(zip(COLUMNS, cells[1:], strict=True))) for cells in table(BACKENDS, "write")]

Write = Callable[[Backend, int], Awaitable[object]]
OLD, NEW = SealedMetadata(b"old", "k1"), SealedMetadata(b"new", "k2")
DEAD, RETRIED = Failure("invalid_grant"), Failure("server_error", 0.0)
WRITES: dict[str, Write] = {
    "`put`": lambda backend, _: backend.put(KEY, sealed("b"), metadata=NEW),
    "`complete_lease`": lambda backend, generation: backend.complete_lease(
        KEY, sealed("b"), generation=generation, holder="h", metadata=NEW
    ),
    "`claim_lease`": lambda backend, generation: backend.claim_lease(
        KEY, generation=generation, holder="i", duration=9
    ),
    "`release_lease`": lambda backend, generation: backend.release_lease(KEY, generation=generation, holder="h"),
    "`release_lease` with a failure": lambda backend, generation: backend.release_lease(
        KEY, generation=generation, holder="h", failure=DEAD
    ),
    "`clear_failure`": lambda backend, _: backend.clear_failure(KEY),
    "`rewrap`": lambda backend, generation: backend.rewrap(
        KEY, replace(sealed("a"), key_id="k2"), generation=generation
    ),
    "`set_metadata`": lambda backend, _: backend.set_metadata(KEY, NEW, replacing=OLD.value),
}


async def row(backend: Backend) -> dict[str, Any]:
    record = await backend.get(KEY)
    assert record is not None
    due = await backend.scan_due(provider="github", within=1e9, limit=1)
    return {
        "tokens": record.tokens,
        "generation": record.generation,
        "due_at": due[0].due_at if due else None,
        "lease": record.lease_holder,
        "failure": record.failure and record.failure.code,
        "metadata": record.metadata,
        "created_at": record.created_at,
        "updated_at": record.updated_at,
    }


async def changed_by(write: Write, failure: Failure, *, leased: bool) -> set[str]:
    """Return the columns that a write changes in a row whose last refresh failed."""
    seconds = count(1_800_000_000)
    backend = MemoryBackend(clock=lambda: next(seconds))
    await backend.put(KEY, sealed("a"), metadata=OLD)
    generation = (await row(backend))["generation"]
    assert await backend.claim_lease(KEY, generation=generation, holder="g", duration=1e6)
    assert await backend.release_lease(KEY, generation=generation, holder="g", failure=failure)
    if leased:
        assert await backend.claim_lease(KEY, generation=generation, holder="h", duration=1e6)
    before = await row(backend)
    assert await write(backend, generation) in {True, None}
    after = await row(backend)
    return {column for column in COLUMNS if before[column] != after[column]}


def test_the_guide_names_every_capability() -> None:
    named = re.findall(r"^- `(Supports\w+)`", BACKENDS.read_text("utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(name for name in protocol.__all__ if name.startswith("Supports"))


def test_the_table_has_every_write() -> None:
    names = [name for write, _ in ROWS for name in write.split(", ")]
    assert names == [*WRITES]
    assert {name for write in names for name in codes(write)} <= {*vars(Backend)}


@pytest.mark.parametrize(("writes", "cells"), ROWS, ids=[write for write, _ in ROWS])
def test_a_write_changes_what_the_table_says(writes: str, cells: dict[str, str]) -> None:
    expected = {column for column, cell in cells.items() if cell != "\N{EN DASH}"}
    for name in writes.split(", "):
        changed = asyncio.run(changed_by(WRITES[name], RETRIED, leased=name != "`claim_lease`"))
        if name == "`clear_failure`":
            changed |= asyncio.run(changed_by(WRITES[name], DEAD, leased=False))
        assert changed == expected, name
