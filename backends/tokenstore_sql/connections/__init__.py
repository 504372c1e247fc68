"""Connections: a driver's own with compiled statements, or SQLAlchemy's; and where they come from."""

from __future__ import annotations

__all__: list[str] = []
