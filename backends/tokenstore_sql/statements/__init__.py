"""Every statement that touches the table, as SQLAlchemy Core."""

from __future__ import annotations

__all__: list[str] = []
