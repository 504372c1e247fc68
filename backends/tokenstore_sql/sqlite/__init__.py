"""SQLite: one writer at a time, and readers that never wait for it."""

from __future__ import annotations

__all__: list[str] = []
