"""The rows that are due are read by their index: a page costs as much in a table of many rows as in one of few."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from itertools import product
from typing import Any

import pytest

from support.matrix import Row, params
from support.watched_backend import opened_backend
from tokenstore.records import DueKey, TokenKey
from tokenstore.testing.conformance import sealed
from tokenstore_sql.backend import SQLBackend

_ROWS = 2000
_LIMIT = 20
_NOW = int(time.time()) * 1_000_000
_DAY = 86_400_000_000

each_server_software = pytest.mark.parametrize(
    "row", params(names=["sqlite", "postgresql+asyncpg", "mariadb+asyncmy", "mysql9+asyncmy"], shared=True)
)


async def _fill(backend: SQLBackend, due: int) -> None:
    """Store rows of one provider: the first ones are due, several at each time, and the others in a day."""

    def due_at(number: int) -> int:
        return _NOW + (number // 5 - _ROWS if number < due else _DAY + number)

    await asyncio.gather(
        *(
            backend.put(TokenKey("github", f"u{number:05}"), sealed(access_token_expires_at=due_at(number)))
            for number in range(_ROWS)
        ),
        *(backend.put(TokenKey("gitlab", f"u{number:05}"), sealed()) for number in range(20)),
    )


class _Reader:
    """Runs the queries of a page on one of the backend's connections, with their plans and the number of rows read."""

    def __init__(self, row: Row, connection: Any) -> None:
        self._mark = row.mark
        self._connection = connection

    async def _rows(self, sql: str, arguments: Any = ()) -> list[Sequence[Any]]:
        found, _ = await self._connection.send(sql, arguments, True)
        return [tuple(row) for row in found]

    async def analyze(self, backend: SQLBackend) -> None:
        words = {"sqlite": "ANALYZE", "postgres": "ANALYZE", "mysql": "ANALYZE TABLE"}[self._mark]
        await self._connection.send(f"{words} {backend.table.name}", (), True)

    async def read(self, sql: str, arguments: Any, *, indices: Sequence[str]) -> int:
        """Run one query, check that its plan has one of the indices, and return how many entries of it were read."""
        if self._mark == "postgres":
            plan = "\n".join(row[0] for row in await self._rows(f"EXPLAIN (ANALYZE) {sql}", arguments))
            assert any(f"Index Scan using {index}" in plan for index in indices), plan
            assert "Rows Removed" not in plan, plan
            assert "Sort" not in plan, plan
            [scan] = [line for line in plan.splitlines() if "Index Scan" in line]
            actual = re.search(r"actual .*rows=([\d.]+)", scan)
            assert actual is not None, plan
            return int(float(actual[1]))
        if self._mark == "sqlite":
            plan = "\n".join(row[3] for row in await self._rows(f"EXPLAIN QUERY PLAN {sql}", arguments))
            assert any(f"USING INDEX {index} (" in plan for index in indices), plan
            assert "B-TREE" not in plan, plan
            return len(await self._rows(sql, arguments))
        [line] = await self._rows(f"EXPLAIN FORMAT=TRADITIONAL {sql}", arguments)
        assert any(pair in zip(line, line[2:], strict=False) for pair in product(["range"], indices)), line
        assert "filesort" not in str(line), line
        await self._connection.send("FLUSH STATUS", (), True)
        await self._rows(sql, arguments)
        status = await self._rows("SHOW SESSION STATUS LIKE 'Handler_read%'")
        return sum(int(value) for name, value in status if str(name) in ("Handler_read_next", "Handler_read_key"))


@each_server_software
@pytest.mark.parametrize("due", [0, 30, _ROWS], ids=["none", "few", "all"])
def test_a_page_of_due_rows_is_read_by_the_index(row: Row, url: str, due: int) -> None:
    """Neither the first page nor one behind a position sorts rows, or reads many more than it returns."""

    async def main() -> None:
        async with opened_backend(url) as backend, AsyncExitStack() as stack:
            await backend.delete(TokenKey("github", "u1"))
            await _fill(backend, due)
            connection: Any = await backend._source.acquire(transactional=False, write=False)
            stack.push_async_callback(backend._source.release, connection)
            reader = _Reader(row, connection)
            await reader.analyze(backend)
            by_due, by_user = (f"{backend.table.name}_by_{what}" for what in ("due", "user"))
            positions = [None, DueKey(_NOW - _ROWS, "u00001"), DueKey(_NOW - _ROWS + due // 10, "u")]
            for after in positions:
                parameters: dict[str, Any] = {"p": "github", "within": 60_000_000, "as_of": None, "limit": _LIMIT}
                if after is not None:
                    parameters |= {"as_of": _NOW, "after_d": after.due_at, "after_u": after.user_id, "after_a": ""}
                for number, statement in enumerate(backend.statements.scan_due(after=after is not None)):
                    # One user's further accounts are few rows by any index.
                    indices = [by_due, by_user, "PRIMARY"] if after is not None and number == 0 else [by_due]
                    compiled = connection._compiler(statement)
                    read = await reader.read(compiled.sql, compiled.arguments(parameters), indices=indices)
                    assert read <= _LIMIT + 2
            found = await backend.scan_due(provider="github", within=60.0, limit=_ROWS)
            assert len(found) == due

    asyncio.run(main())
