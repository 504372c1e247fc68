"""The operations on values over one connection. The caller begins and commits transactions and maps errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenstore.records import new_generation
from tokenstore.value_records import ScannedValue, SealedValue, ValueKey, ValueRow
from tokenstore_sql.rows import Rows
from tokenstore_sql.statements.values import ValueStatements

__all__ = ["ValueRows"]

_US = 1_000_000


class ValueRows:
    """The values as one connection sees and changes them.

    Args:
        rows: The token rows on the same connection.
        statements: The statements on the table of values.
    """

    def __init__(self, rows: Rows, statements: ValueStatements) -> None:
        self._rows = rows
        self._statements = statements

    async def put(self, key: ValueKey, value: SealedValue, *, ttl: float | None) -> None:
        _ = await self._rows.run_locking(self._statements.put, _new(key, value, ttl))

    async def insert(self, key: ValueKey, value: SealedValue, *, ttl: float | None) -> bool:
        parameters = _new(key, value, ttl)
        while not (await self._rows.run_locking(self._statements.insert, parameters)).changed:
            # An expired value counts as missing. Its deletion finds no row if the value is live, or was put again.
            if not (await self._rows.run_locking(self._statements.delete_if_expired, _where(key))).changed:
                return False
        return True

    async def get(self, key: ValueKey) -> ValueRow | None:
        rows, _ = await self._rows.connection.run(self._statements.get, _where(key))
        return _row_of(rows)

    async def pop(self, key: ValueKey) -> ValueRow | None:
        statements, where = self._statements, _where(key)
        if statements.take is not None:
            rows, _ = await self._rows.run_locking(statements.take, where)
            return _row_of(rows)
        # Outside of a transaction the lock ends with the query, and another caller may change or delete the row before
        # this one deletes it. So the deletion names the version that was read, and the row is read again if it is gone.
        while True:
            rows, _ = await self._rows.run_locking(statements.get_locked, where)
            if (found := _row_of(rows)) is None:
                return None
            if (await self._rows.run_locking(statements.delete_version, {**where, "v": found.version})).changed > 0:
                return found

    async def delete_group(self, group: str) -> int:
        return (await self._rows.run_locking(self._statements.delete_group, {"g": group})).changed

    async def purge(self, *, limit: int) -> int:
        # The deletion is a range of the index, up to the expiry of the last value of this batch: no database needs a
        # form of its own, and a value that was put again meanwhile has another expiry.
        rows, _ = await self._rows.connection.run(self._statements.expired, {"limit": limit})
        if not rows:
            return 0
        [until] = rows[-1]
        return (await self._rows.run_locking(self._statements.delete_expired, {"until": until})).changed

    async def scan(self, *, group: str | None, after: ValueKey | None, limit: int) -> list[ScannedValue]:
        parameters: dict[str, Any] = {"g": group}
        if after is not None:
            parameters |= {"after_g": after.group, "after_n": after.name}
        queries = self._statements.scan(by_group=group is not None, after=after is not None)
        page = await self._rows.page(queries, parameters, limit)
        return [ScannedValue(ValueKey(*row[:2]), *row[2:]) for row in page]

    async def rewrap(self, key: ValueKey, value: SealedValue, *, version: int) -> bool:
        parameters = {**_where(key), **_sealed(value), "v": version}
        return (await self._rows.run_locking(self._statements.rewrap, parameters)).changed > 0


def _where(key: ValueKey) -> dict[str, Any]:
    return {"g": key.group, "n": key.name}


def _new(key: ValueKey, value: SealedValue, ttl: float | None) -> dict[str, Any]:
    return {
        **_where(key),
        **_sealed(value),
        "v": new_generation(),
        "ttl": None if ttl is None else max(1, round(ttl * _US)),
    }


def _sealed(value: SealedValue) -> Mapping[str, Any]:
    return {"value": value.sealed, "key_id": value.key_id}


def _row_of(rows: Sequence[Sequence[Any]]) -> ValueRow | None:
    if not rows:
        return None
    group, name, sealed, key_id, *rest = rows[0]
    return ValueRow(ValueKey(group, name), SealedValue(sealed, key_id), *rest)
