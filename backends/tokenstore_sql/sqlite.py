"""SQLite: one writer at a time, and readers that never wait for it."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import aiosqlite
from sqlalchemy import URL, ColumnElement, CursorResult, Executable, Integer, Select, Table, cast, func
from sqlalchemy import text as sql
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from tokenstore.errors import (
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    ConflictError,
    LockTimeoutError,
    TableMissingError,
    UnsupportedOperationError,
)
from tokenstore.options import OptionParser
from tokenstore.records import TokenKey
from tokenstore_sql.base import SQLBackend, finish, pool_arguments
from tokenstore_sql.dialect import Dialect, Upsert
from tokenstore_sql.pace import jittered
from tokenstore_sql.rows import Rows

__all__ = ["SQLiteBackend", "SQLiteDialect"]

# How long SQLite itself may block a thread. A cancelled task is free only when that ends, so it is short, and the
# rest of a wait is asyncio's.
_BUSY_TIMEOUT_MS = 100
# In seconds, while somebody else's lease is live: how often to look at the files, and when to read the row all the
# same, as two writes within one tick of the kernel's clock can leave the same time and size behind.
_LOOK_EVERY, _LONGEST_WATCH = 0.010, 0.250
# How old a write must be for its transaction to have been seen; and the pause where there are no files to look at.
_FRESH, _BLIND_PAUSE = 0.100, 0.025
# STRICT tables came with 3.37, RETURNING with 3.35, UPSERT with 3.24.
_MIN_VERSION = (3, 37, 0)


class SQLiteDialect(Dialect):
    """SQLite through aiosqlite."""

    # BEGIN is sent by hand, for writes and locks alone; the driver must not begin by itself.
    isolation_level = "AUTOCOMMIT"
    driver_error_names = ("sqlite3.Error",)
    error_classes: ClassVar[Mapping[str, type[BackendError]]] = {
        "SQLITE_BUSY": LockTimeoutError,
        "SQLITE_BUSY_SNAPSHOT": ConflictError,  # this transaction has read what somebody changed since
        "SQLITE_LOCKED": LockTimeoutError,
        "SQLITE_READONLY": BackendUnavailableError,
        "SQLITE_CANTOPEN": BackendUnavailableError,
        "SQLITE_IOERR": BackendUnavailableError,
        "SQLITE_FULL": BackendUnavailableError,
        "SQLITE_NOTADB": BackendUnavailableError,
        "SQLITE_CORRUPT": BackendUnavailableError,
    }

    def now(self) -> ColumnElement[int]:
        # Milliseconds are what SQLite's clock has; 2440587.5 is the epoch's Julian day.
        days = func.julianday("now") - 2440587.5
        return cast(days * 86_400_000, Integer) * 1000

    def upsert(
        self, table: Table, values: Mapping[str, Any], *, replaced: Sequence[str], also: Mapping[str, Any]
    ) -> Upsert:
        statement = insert(table).values(**values)
        return statement.on_conflict_do_update(
            index_elements=list(table.primary_key),
            set_={**{name: statement.excluded[name] for name in replaced}, **also},
        )

    def for_update(self, query: Select[Any]) -> Select[Any]:
        return query  # BEGIN IMMEDIATE locks the whole database

    async def watch(self, url: URL, pace: object) -> None:
        # No statement, and a look at the files costs next to nothing.
        files = [Path(f"{url.database}{end}") for end in ("", "-wal")]
        before = _state(files)
        if not before:
            await asyncio.sleep(jittered(_BLIND_PAUSE))
            return
        # What was written just now may be later than the read that came before; or not be visible yet, as a commit
        # writes its pages first and then waits for the disk.
        age = time.time() - max(status.written_at for status in before)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (max(age, _LOOK_EVERY) if age < _FRESH else jittered(_LONGEST_WATCH))
        while loop.time() < deadline:
            await asyncio.sleep(_LOOK_EVERY)
            if _state(files) != before:
                return

    async def may_look(self, connection: AsyncConnection) -> bool:
        # A read that begins a snapshot makes a later lock fail, if somebody writes in between.
        return not await _in_transaction(connection)

    def queue_key(self, key: TokenKey) -> Hashable:
        return None  # whichever row it is, the lock is the database's

    async def execute(
        self, connection: AsyncConnection, statement: Executable, parameters: Mapping[str, Any]
    ) -> CursorResult[Any]:
        # A statement cancelled half-way stays open inside SQLite, with its locks, even when its connection is closed,
        # until the garbage collector finds its cursor. None takes long.
        return await finish(connection.execute(statement, parameters))

    @asynccontextmanager
    async def waiting(self, rows: Rows) -> AsyncIterator[None]:
        if not rows.wait_is_bounded:
            await self._take_write_lock(rows)
            rows.wait_is_bounded = True
        yield

    @asynccontextmanager
    async def exclusive_setup(self, connection: AsyncConnection) -> AsyncIterator[None]:
        if not connection.in_transaction():
            _ = await connection.begin()  # or the first statement would, after the look at what is open
        if not await _in_transaction(connection):
            await self._begin_immediate(connection, sql("BEGIN IMMEDIATE"))
        yield

    async def holds_locks(self, connection: AsyncConnection) -> bool:
        return True  # the write lock is taken by an explicit BEGIN IMMEDIATE, whatever the driver's mode

    @staticmethod
    def check_url(url: URL) -> None:
        if (
            url.database in (None, "", ":memory:")
            or "mode=memory" in str(url.database)
            or url.query.get("mode") == "memory"
        ):
            raise UnsupportedOperationError(
                "SQLite in memory has one connection for all tasks, where one task's rollback undoes another's "
                "committed write: use memory:// for a store in memory, or a file"
            )

    async def check(self, connection: AsyncConnection) -> None:
        require_version(sqlite3.sqlite_version_info)

    async def _take_write_lock(self, rows: Rows) -> None:
        connection = rows.connection
        if not rows.borrowed:
            await self._begin_immediate(connection, sql("BEGIN IMMEDIATE"))
            return
        patience = (await self.execute(connection, sql("PRAGMA busy_timeout"), {})).scalar_one()
        # By now a transaction is open where the driver, or a "begin" hook, begins by itself: a statement that writes
        # nothing then takes its write lock.
        begun = await _in_transaction(connection)
        statement = rows.statements.touch_nothing if begun else sql("BEGIN IMMEDIATE")
        try:
            await self.execute(connection, sql(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}"), {})
            await self._begin_immediate(connection, statement)
        finally:
            if not connection.invalidated:
                await self.execute(connection, sql(f"PRAGMA busy_timeout = {int(patience)}"), {})

    async def _begin_immediate(self, connection: AsyncConnection, statement: Executable) -> None:
        """Take the write lock, waiting in asyncio rather than in SQLite."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.lock_timeout
        while True:
            try:
                await self.execute(connection, statement, {})
                return
            except DBAPIError as error:
                # SQLITE_BUSY_SNAPSHOT never passes.
                if self.error_code(error.orig or error) != "SQLITE_BUSY" or loop.time() >= deadline:
                    raise
            await asyncio.sleep(random.uniform(0.001, 0.010))

    def error_code(self, error: BaseException) -> str | None:
        cause: BaseException | None = error
        while cause is not None and not hasattr(cause, "sqlite_errorname"):
            cause = cause.__cause__ or cause.__context__
        return getattr(cause, "sqlite_errorname", None)

    def error_text(self, error: BaseException, code: str) -> str:
        return str(error)  # SQLite's messages are constants and names of tables and columns

    def classify(self, error: BaseException) -> tuple[type[BackendError], str | None]:
        if "no such table" in str(error):  # SQLITE_ERROR, the code of everything in a statement that is wrong
            return TableMissingError, "SQLITE_ERROR"
        return super().classify(error)


class SQLiteBackend(SQLBackend):
    """``sqlite:///relative.db``, ``sqlite:////absolute.db``: a file of this machine, in WAL mode.

    Readers go on beside the one writer. The file is created with mode 0600, which its -wal and -shm files copy.
    """

    dialect_class = SQLiteDialect
    drivers: ClassVar[Mapping[str, str]] = {"sqlite": "sqlite+aiosqlite", "sqlite+aiosqlite": "sqlite+aiosqlite"}
    extras: ClassVar[Mapping[str, str]] = {}  # aiosqlite needs none
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

        async def connect() -> aiosqlite.Connection:
            return await _open(path, cls.lock_timeout_of(options))

        return create_async_engine(
            URL.create("sqlite+aiosqlite", database=str(path)),
            async_creator=connect,
            **pool_arguments(options),
        )


def require_version(version: tuple[int, ...]) -> None:
    """Refuse a SQLite library that lacks what the statements use.

    Raises:
        UnsupportedOperationError: It is too old.
    """
    if version < _MIN_VERSION:
        found, needed = (".".join(map(str, numbers)) for numbers in (version, _MIN_VERSION))
        raise UnsupportedOperationError(f"this Python has SQLite {found}; {needed} or later is needed")


class _Status(NamedTuple):
    inode: int
    size: int
    written_at: float


def _state(files: Sequence[Path]) -> list[_Status]:
    found = []
    for file in files:
        with suppress(OSError, ValueError):
            status = file.stat()
            found.append(_Status(status.st_ino, status.st_size, status.st_mtime))
    return found


async def _in_transaction(connection: AsyncConnection) -> bool:
    raw = await connection.get_raw_connection()
    return bool(getattr(raw.driver_connection, "in_transaction", False))


class _Connection(sqlite3.Connection):
    """Rolls back when closed.

    A cursor that a cancelled task left behind keeps a closed connection alive inside SQLite, and the write lock with
    it, until the garbage collector comes by.
    """

    def close(self) -> None:
        with suppress(sqlite3.Error):
            self.rollback()
        super().close()


async def _open(path: Path, patience: float) -> aiosqlite.Connection:
    await asyncio.to_thread(_create_private, path)
    connection = aiosqlite.connect(path, timeout=_BUSY_TIMEOUT_MS / 1000, isolation_level=None, factory=_Connection)
    # Its thread must not keep the interpreter from ending.
    thread: Any = getattr(connection, "_thread", connection)  # before aiosqlite 0.22 it was the thread
    thread.daemon = True
    try:
        connection = await connection
    except BaseException:
        # The thread has something to tell this event loop still, which could be closed by then.
        await finish(asyncio.to_thread(thread.join))
        raise
    try:
        # FULL: a power failure must not undo the commit of a rotated token.
        for pragma in ("journal_mode = WAL", "synchronous = FULL"):
            await _until_not_busy(connection, f"PRAGMA {pragma}", patience)
    except BaseException:
        await connection.close()
        raise
    return connection


async def _until_not_busy(connection: aiosqlite.Connection, statement: str, patience: float) -> None:
    """Switching a new file to WAL needs it alone, and SQLite does not wait for that by itself."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience
    while True:
        try:
            await (await connection.execute(statement)).close()
            return
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith("SQLITE_BUSY") or loop.time() >= deadline:
                raise
        await asyncio.sleep(random.uniform(0.001, 0.010))


def _create_private(path: Path) -> None:
    """Create the database file with mode 0600, atomically; one that exists is left as it is.

    It is opened and closed under another name: closing any descriptor of a database file drops every lock that this
    process has on it.
    """
    if path.exists():
        return
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        with suppress(FileExistsError):
            os.link(draft, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # A file system without hard links: here a second store may open the file between these two lines.
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    finally:
        draft.unlink(missing_ok=True)
