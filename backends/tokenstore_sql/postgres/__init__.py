"""PostgreSQL, through asyncpg or psycopg."""

from __future__ import annotations

__all__: list[str] = []
