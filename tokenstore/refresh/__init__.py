"""Refreshing tokens: at most one call of the provider for all tasks, processes and machines.

``docs/refresh.md`` describes the protocol. This module imports nothing, because a store that never refreshes imports
:mod:`tokenstore.refresh.protected_task` alone.
"""

from __future__ import annotations

__all__: list[str] = []
