"""``tokenstore demo``: several processes need one expired token at the same moment, in three rounds."""

from __future__ import annotations

__all__: list[str] = []
