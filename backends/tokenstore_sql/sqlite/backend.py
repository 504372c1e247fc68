"""The backend for SQLite: its URLs."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

import aiosqlite
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from tokenstore.errors import ConfigurationError
from tokenstore.options import OptionParser
from tokenstore_sql.backend import SQLBackend
from tokenstore_sql.connections.compiler import Compiler
from tokenstore_sql.connections.driver import Connector, DriverConnection
from tokenstore_sql.dialect import Dialect
from tokenstore_sql.errors import mapped
from tokenstore_sql.options import ENGINE_ARGUMENTS, LOCK_TIMEOUT
from tokenstore_sql.sqlite.aiosqlite_engine import open_aiosqlite
from tokenstore_sql.sqlite.connections import SQLiteConnection
from tokenstore_sql.sqlite.database_file import DatabaseFile
from tokenstore_sql.sqlite.dialect import SQLiteDialect
from tokenstore_sql.sqlite.files import require_version
from tokenstore_sql.sqlite.thread import ConnectionThread

__all__ = ["SQLiteBackend"]
# The option of an engine of our own that holds its DatabaseFile.
_FILE: Final = "tokenstore.file"


class SQLiteBackend(SQLBackend):
    """``sqlite:///relative.db``, ``sqlite:////absolute.db``: a file of this machine, in WAL mode.

    Readers go on beside the one writer. :meth:`setup` alone creates the file, with mode 0600, which its -wal and -shm
    files copy. If the file is replaced, as by a backup, the next call opens the new one.
    """

    dialect_class = SQLiteDialect
    drivers: ClassVar[Mapping[str, str]] = {"sqlite": "sqlite+aiosqlite", "sqlite+aiosqlite": "sqlite+aiosqlite"}
    sync_drivers: ClassVar[frozenset[str]] = frozenset({"pysqlite"})
    extras: ClassVar[Mapping[str, str]] = {}  # aiosqlite is always installed
    driver_options: ClassVar[Mapping[str, OptionParser]] = {}
    foreign_options: ClassVar[Mapping[str, str]] = {
        "check_same_thread": "leave it out: each connection has a thread of its own",
        "timeout": "write lock_timeout",
        "uri": "write the path without file: before it, as in sqlite:////srv/tokens.db",
    }

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
        file = DatabaseFile(Path(url.database or "").absolute())  # now, so that a later chdir changes nothing
        lock_timeout = float(options.get("lock_timeout", LOCK_TIMEOUT))

        async def connect() -> aiosqlite.Connection:
            return await open_aiosqlite(file, lock_timeout)

        return create_async_engine(
            URL.create("sqlite+aiosqlite", database=str(file.path)),
            async_creator=connect,
            execution_options={_FILE: file},
            **ENGINE_ARGUMENTS,
        )

    @classmethod
    def _connector(cls, engine: AsyncEngine, dialect: Dialect, options: Mapping[str, Any]) -> Connector:
        compiler = Compiler(engine.dialect)
        file = engine.sync_engine.get_execution_options()[_FILE]

        async def connect() -> DriverConnection:
            thread = ConnectionThread()
            await thread.open(file, dialect.lock_timeout)
            return SQLiteConnection(file, thread, compiler, dialect.errors, dialect.begin, connect)

        return connect

    async def setup(self) -> None:
        self._check()
        file: DatabaseFile | None = self._engine.sync_engine.get_execution_options().get(_FILE)
        if file is not None:
            await mapped(self.dialect.errors, lambda: str(file.path), lambda: asyncio.to_thread(file.create))
        await super().setup()
