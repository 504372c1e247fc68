"""Which backend serves a database."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final, cast

from sqlalchemy.ext.asyncio import AsyncEngine

from tokenstore.errors import ConfigurationError, UnsupportedOperationError
from tokenstore.options import read_options
from tokenstore_sql.backend import SQLBackend
from tokenstore_sql.options import TABLE_OPTIONS

__all__ = ["backend_class", "backend_for_engine"]

_MYSQL: Final = "tokenstore_sql.mysql.backend:MySQLBackend"
_BACKENDS: Final[Mapping[str, str]] = {
    "sqlite": "tokenstore_sql.sqlite.backend:SQLiteBackend",
    "postgresql": "tokenstore_sql.postgres.backend:PostgresBackend",
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
}
"""From SQLAlchemy's name of a database to its backend, which is imported when it is needed."""


def backend_class(name: str) -> type[SQLBackend]:
    """The backend for SQLAlchemy's name of a database.

    Raises:
        UnsupportedOperationError: There is none.
    """
    target = _BACKENDS.get(name)
    if target is None:
        raise UnsupportedOperationError(f"no backend for {name}; there is one for {', '.join(sorted(_BACKENDS))}")
    module, _, class_name = target.partition(":")
    return cast(type[SQLBackend], getattr(import_module(module), class_name))


def backend_for_engine(engine: object, options: Mapping[str, object]) -> SQLBackend:
    """A backend over an application's ``AsyncEngine``.

    Raises:
        ConfigurationError: The object is no ``AsyncEngine``, or an option is not acceptable.
        UnsupportedOperationError: No backend serves the engine's database.
    """
    if not isinstance(engine, AsyncEngine):
        raise ConfigurationError(f"open_store takes a URL, an AsyncEngine or a backend, not {type(engine).__name__}")
    values: dict[str, Any] = read_options("a store on an engine", TABLE_OPTIONS, {}, options)
    return backend_class(engine.dialect.name)(engine, **values)
