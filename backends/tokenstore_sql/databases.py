"""Which backend serves a database."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final, cast

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tokenstore.errors import ConfigurationError, UnsupportedOperationError
from tokenstore.options import read_options
from tokenstore_sql.backend import SQLBackend
from tokenstore_sql.options import TABLE_OPTIONS

__all__ = ["backend_class", "backend_for_engine", "way_to_pass"]

_MYSQL: Final = "tokenstore_sql.mysql.backend:MySQLBackend"
_BACKENDS: Final[Mapping[str, str]] = {
    "sqlite": "tokenstore_sql.sqlite.backend:SQLiteBackend",
    "postgresql": "tokenstore_sql.postgres.backend:PostgresBackend",
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
}
"""From SQLAlchemy's name of a database to its backend, which is imported when it is needed."""

_WAYS: Final[Mapping[type | tuple[type, ...], str]] = {
    (Engine, Connection, Session, scoped_session, sessionmaker): (
        "this one has no asyncio: pass the database's URL to tokenstore.sync.open_store(url)"
    ),
    async_sessionmaker: "call it, and pass the session that it returns to AuthTokenStore(db_session=…)",
    (AsyncSession, async_scoped_session): "pass a session to AuthTokenStore(db_session=…)",
    AsyncConnection: "pass AsyncSession(connection) to AuthTokenStore(db_session=…)",
    AsyncEngine: "pass an engine to open_store(engine)",
    str: "pass a URL to open_store(url)",
}
"""From objects with which users of SQLAlchemy try to open a store to the way to do so."""


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
        raise ConfigurationError(f"open_store takes a URL, an AsyncEngine or a backend, not {way_to_pass(engine)}")
    values: dict[str, Any] = read_options("a store on an engine", TABLE_OPTIONS, {}, options)
    return backend_class(engine.dialect.name)(engine, **values)


def way_to_pass(given: object) -> str:
    """Name the type of an object that was passed to the wrong function, and what to write.

    The object itself is not shown: a URL has a password.
    """
    ways = (f"; {way}" for kind, way in _WAYS.items() if isinstance(given, kind))
    return type(given).__name__ + next(ways, "")
