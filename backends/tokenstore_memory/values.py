"""The values of the memory backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

from tokenstore.records import TokenKey, new_generation
from tokenstore.value_records import ScannedValue, SealedValue, ValueKey, ValueRow

__all__ = ["MemoryValues", "in_bytes"]

_US = 1_000_000


class MemoryValues(ABC):
    """See :class:`tokenstore.protocol.SupportsValues`. No method awaits anything, so each is one atomic step."""

    def __init__(self) -> None:
        self._stored: dict[ValueKey, ValueRow] = {}

    @abstractmethod
    def _check_open(self) -> None:
        """Raise StoreClosedError if the backend is closed."""

    @abstractmethod
    def _now(self) -> int:
        """The clock, in microseconds since the epoch."""

    async def put_value(self, key: ValueKey, value: SealedValue, *, ttl: float | None) -> None:
        stored, now = self._open_values(), self._now()
        expires_at = None if ttl is None else now + max(1, round(ttl * _US))
        live = self._live(key)
        created_at = now if live is None else live.created_at
        stored[key] = ValueRow(key, value, expires_at, new_generation(), created_at, now)

    async def insert_value(self, key: ValueKey, value: SealedValue, *, ttl: float | None) -> bool:
        if self._live(key) is not None:
            return False
        self._stored.pop(key, None)
        await self.put_value(key, value, ttl=ttl)
        return True

    async def get_value(self, key: ValueKey) -> ValueRow | None:
        return self._live(key)

    async def pop_value(self, key: ValueKey) -> ValueRow | None:
        found = self._live(key)
        if found is not None:
            del self._stored[key]
        return found

    async def delete_values(self, group: str) -> int:
        return self._delete([key for key in self._open_values() if key.group == group])

    async def purge_values(self, *, limit: int) -> int:
        now = self._now()
        expired = sorted(
            (row.expires_at, key)
            for key, row in self._open_values().items()
            if row.expires_at is not None and row.expires_at <= now
        )
        return self._delete([key for _, key in expired[:limit]])

    async def scan_values(
        self, *, group: str | None = None, after: ValueKey | None = None, limit: int
    ) -> list[ScannedValue]:
        found = sorted(
            (
                row
                for key in self._open_values()
                if group in (None, key.group)
                and (after is None or in_bytes(key) > in_bytes(after))
                and (row := self._live(key)) is not None
            ),
            key=lambda row: in_bytes(row.key),
        )
        return [
            ScannedValue(row.key, row.expires_at, row.value.key_id, row.created_at, row.updated_at)
            for row in found[:limit]
        ]

    async def rewrap_value(self, key: ValueKey, value: SealedValue, *, version: int) -> bool:
        row = self._live(key)
        if row is None or row.version != version:
            return False
        self._stored[key] = replace(row, value=value)
        return True

    def _live(self, key: ValueKey) -> ValueRow | None:
        row = self._open_values().get(key)
        return row if row is not None and (row.expires_at is None or row.expires_at > self._now()) else None

    def _delete(self, keys: list[ValueKey]) -> int:
        for key in keys:
            del self._stored[key]
        return len(keys)

    def _open_values(self) -> dict[ValueKey, ValueRow]:
        self._check_open()
        return self._stored


def in_bytes(key: TokenKey | ValueKey) -> tuple[bytes, ...]:
    """A key as it is ordered: by its UTF-8 bytes."""
    return tuple(part.encode() for part in key)
