"""The options that all SQL backends have, and the arguments of their engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import NullPool

from tokenstore.options import OptionParser, identifier, positive_int, positive_seconds

__all__ = ["ENGINE_ARGUMENTS", "LOCK_TIMEOUT", "POOL_DEFAULTS", "POOL_OPTIONS", "STATEMENT_TIMEOUT", "TABLE_OPTIONS"]

TABLE_OPTIONS: Final[Mapping[str, OptionParser]] = {
    "table": identifier,
    "schema": identifier,
    "lock_timeout": positive_seconds,
}
"""Options of every SQL store."""

LOCK_TIMEOUT: Final = 10.0
"""The default of the option ``lock_timeout``, in seconds."""

POOL_OPTIONS: Final[Mapping[str, OptionParser]] = {
    "pool_size": positive_int,
    "pool_timeout": positive_seconds,
    "pool_recycle": positive_seconds,
    "statement_timeout": positive_seconds,
}
"""Options of a store with connections of its own. Those of the pool are named as SQLAlchemy names them."""

STATEMENT_TIMEOUT: Final = 10.0
"""The default of the option ``statement_timeout``, in seconds."""

POOL_DEFAULTS: Final[Mapping[str, Any]] = {
    "pool_size": 10,
    "pool_timeout": 10.0,
    "pool_recycle": 1800.0,
    "statement_timeout": STATEMENT_TIMEOUT,
}
"""The defaults of these options; times are in seconds."""

ENGINE_ARGUMENTS: Final[Mapping[str, Any]] = {
    "poolclass": NullPool,
    "isolation_level": "AUTOCOMMIT",  # the level of statements on their own; setup asks for the level that it needs
    "hide_parameters": True,
}
"""Arguments of ``create_async_engine`` for every engine that a backend makes."""
