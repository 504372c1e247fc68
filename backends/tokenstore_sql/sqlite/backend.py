"""The backend for SQLite: its URLs."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import aiosqlite
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from tokenstore.errors import ConfigurationError
from tokenstore.options import OptionParser
from tokenstore_sql.backend import SQLBackend
from tokenstore_sql.connections.compiler import Compiler
from tokenstore_sql.connections.driver import Connector, DriverConnection
from tokenstore_sql.dialect import Dialect
from tokenstore_sql.options import ENGINE_ARGUMENTS, LOCK_TIMEOUT
from tokenstore_sql.sqlite.aiosqlite_engine import open_aiosqlite
from tokenstore_sql.sqlite.connections import SQLiteConnection
from tokenstore_sql.sqlite.dialect import SQLiteDialect
from tokenstore_sql.sqlite.files import require_version
from tokenstore_sql.sqlite.thread import ConnectionThread

__all__ = ["SQLiteBackend"]


class SQLiteBackend(SQLBackend):
    """``sqlite:///relative.db``, ``sqlite:////absolute.db``: a file of this machine, in WAL mode.

    Readers go on beside the one writer. The file is created with mode 0600, which its -wal and -shm files copy.
    """

    dialect_class = SQLiteDialect
    drivers: ClassVar[Mapping[str, str]] = {"sqlite": "sqlite+aiosqlite", "sqlite+aiosqlite": "sqlite+aiosqlite"}
    extras: ClassVar[Mapping[str, str]] = {}  # aiosqlite is always installed
    driver_options: ClassVar[Mapping[str, OptionParser]] = {}

    @classmethod
    def _create_engine(cls, url: URL, options: Mapping[str, Any]) -> AsyncEngine:
        if options.get("schema"):
            raise ConfigurationError("SQLite has no schemas; leave the option `schema` out")
        if url.host or url.username:
            raise ConfigurationError(
                "a SQLite URL has three slashes before a relative path, four before an absolute one"
            )
        cls.dialect_class.check_url(url)
        require_version(sqlite3.sqlite_version_info)
        path = Path(url.database or "").absolute()  # now, so that a later chdir changes nothing
        lock_timeout = float(options.get("lock_timeout", LOCK_TIMEOUT))

        async def connect() -> aiosqlite.Connection:
            return await open_aiosqlite(path, lock_timeout)

        return create_async_engine(
            URL.create("sqlite+aiosqlite", database=str(path)), async_creator=connect, **ENGINE_ARGUMENTS
        )

    @classmethod
    def _connector(cls, engine: AsyncEngine, dialect: Dialect, options: Mapping[str, Any]) -> Connector:
        compiler = Compiler(engine.dialect)
        path = Path(engine.url.database or "")

        async def connect() -> DriverConnection:
            thread = ConnectionThread()
            await thread.open(path, dialect.lock_timeout)
            return SQLiteConnection(thread, compiler, dialect.errors, dialect.begin, connect)

        return connect
