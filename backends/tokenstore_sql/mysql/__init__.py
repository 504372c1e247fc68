"""MySQL and MariaDB, through aiomysql or asyncmy."""

from __future__ import annotations

__all__: list[str] = []
