"""SQLite: one writer at a time, and readers that never wait for it."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import secrets
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, NamedTuple, TypeVar

import aiosqlite
from sqlalchemy import (
    URL,
    ColumnElement,
    CursorResult,
    Executable,
    Integer,
    Select,
    Table,
    cast,
    func,
    literal_column,
)
from sqlalchemy import text as sql
from sqlalchemy.dialects.sqlite import Insert, insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from tokenstore.cancellation import FINISH_GRACE, finish, wait_through_cancellation
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
from tokenstore_sql.base import ENGINE_ARGUMENTS, SQLBackend
from tokenstore_sql.connection import (
    AlchemyConnection,
    Compiler,
    Connector,
    DriverConnection,
    OneTripConnection,
    Result,
)
from tokenstore_sql.dialect import Dialect, on_conflict_replace
from tokenstore_sql.pace import jittered
from tokenstore_sql.rows import Rows

__all__ = ["SQLiteBackend", "SQLiteDialect"]

T = TypeVar("T")

# How long SQLite itself may block a thread. A cancelled task is free only when that ends, so it is short, and the
# rest of a wait is asyncio's.
_BUSY_TIMEOUT_MS = 100
# In seconds, while somebody else's lease is live: how often to look at the files, and when to read the row all the
# same, as two writes within one tick of the kernel's clock can leave the same time and size behind.
_LOOK_EVERY, _LONGEST_WATCH = 0.010, 0.250
# How old a write must be for its transaction to have been seen; and the pause where there are no files to look at.
_FRESH, _BLIND_PAUSE = 0.100, 0.025
# FULL: a power failure must not undo the commit of a rotated token.
_PRAGMAS = ("journal_mode = WAL", "synchronous = FULL")
# STRICT tables came with 3.37, RETURNING with 3.35, UPSERT with 3.24.
_MIN_VERSION = (3, 37, 0)


class SQLiteDialect(Dialect):
    """SQLite through aiosqlite."""

    # BEGIN is sent by hand, for writes and locks alone; the driver must not begin by itself.
    isolation_level = "AUTOCOMMIT"
    begin_statement: ClassVar[Executable] = sql("BEGIN IMMEDIATE")
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
        days: ColumnElement[float] = func.julianday(literal_column("'now'")) - literal_column("2440587.5")
        return cast(days * literal_column("86400000"), Integer) * literal_column("1000")

    def insert(self, table: Table) -> Insert:
        return insert(table)

    def or_replace(self, insert: Any, *, replaced: Sequence[str], also: Mapping[str, Any]) -> Any:
        return on_conflict_replace(insert, replaced, also)

    locks_rows = False
    statements_at_once = 1
    # An expression of more terms is too deep for it.
    most_at_once = 256

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

    async def execute(
        self, connection: AsyncConnection, statement: Executable, parameters: Mapping[str, Any]
    ) -> CursorResult[Any]:
        # A statement cancelled half-way stays open inside SQLite, with its locks, even when its connection is closed,
        # until the garbage collector finds its cursor. None takes long.
        return await finish(connection.execute(statement, parameters))

    async def patiently(self, rows: Rows, action: Callable[[], Awaitable[T]], *, brief: bool = False) -> T:
        if not rows.transactional and not rows.connection.borrowed:
            return await self._until_not_busy(action)
        if not rows.wait_is_bounded:
            await self._take_write_lock(rows)
            rows.wait_is_bounded = True
        return await action()

    @asynccontextmanager
    async def exclusive_setup(self, connection: AsyncConnection) -> AsyncIterator[None]:
        if not connection.in_transaction():
            _ = await connection.begin()  # or the first statement would, after the look at what is open
        if not await _in_transaction(connection):
            _ = await self._until_not_busy(lambda: self.execute(connection, self.begin_statement, {}))
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
        if not isinstance(connection, AlchemyConnection):
            await self._until_not_busy(lambda: connection.run(self.begin_statement))
            return
        ((patience,),), _ = await connection.run(sql("PRAGMA busy_timeout"))
        # By now a transaction is open where the driver, or a "begin" hook, begins by itself: a statement that writes
        # nothing then takes its write lock.
        begun = await _in_transaction(connection.alchemy)
        statement = rows.statements.touch_nothing if begun else self.begin_statement
        try:
            _ = await connection.run(sql(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}"))
            _ = await self._until_not_busy(lambda: connection.run(statement))
        finally:
            if not connection.lost:
                _ = await connection.run(sql(f"PRAGMA busy_timeout = {int(patience)}"))

    async def _until_not_busy(self, action: Callable[[], Awaitable[T]]) -> T:
        """Do what needs the write lock, waiting in asyncio rather than in SQLite."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.lock_timeout
        while True:
            try:
                return await action()
            except (DBAPIError, sqlite3.Error) as error:
                # SQLITE_BUSY_SNAPSHOT never passes.
                cause = error.orig or error if isinstance(error, DBAPIError) else error
                if self.error_code(cause) != "SQLITE_BUSY" or loop.time() >= deadline:
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
            URL.create("sqlite+aiosqlite", database=str(path)), async_creator=connect, **ENGINE_ARGUMENTS
        )

    @classmethod
    def _connector(cls, engine: AsyncEngine, dialect: Dialect, options: Mapping[str, Any]) -> Connector:
        compiler = Compiler(engine.dialect)
        path = Path(engine.url.database or "")

        async def connect() -> DriverConnection:
            thread = _Thread()
            await thread.open(path, dialect.lock_timeout)
            return _SQLiteConnection(thread, compiler, dialect, connect)

        return connect


class _SQLiteConnection(OneTripConnection):
    """A connection in a thread of its own, to which each operation is one trip, however many statements it has."""

    driver: _Thread

    def is_closed(self) -> bool:
        return self.driver.raw is None

    def socket(self) -> None:
        """None: a file is there."""

    def has_ended(self) -> bool:
        return self.driver.is_idle

    @property
    def in_transaction(self) -> bool:
        return self.driver.raw is not None and self.driver.raw.in_transaction

    def begin_statement(self) -> str:
        return str(SQLiteDialect.begin_statement)

    async def begin(self) -> None:
        """Nothing: the first statement that takes a lock begins (see ``SQLiteDialect.patiently``)."""

    async def send(self, sql: str, arguments: Any, returns_rows: bool) -> Result:
        return await self.driver.do(partial(_execute, sql, arguments))

    async def run_each(self, statement: Executable, parameters: Sequence[Mapping[str, Any]]) -> list[Result]:
        compiled = self._compiler(statement)
        each = [compiled.arguments(one) for one in parameters]
        try:
            return await self.driver.do(partial(_write_each, compiled.sql, each))
        except BaseException as error:
            self._unanswered = True
            self._judge(error)
            raise

    async def ping(self) -> None:
        """Nothing: a file is there."""

    async def close(self) -> None:
        await self.driver.close()

    def forget(self) -> None:
        super().forget()
        if not self.is_foreign:
            self.driver.end()


class _Thread:
    """Does one job after the other on one connection."""

    def __init__(self) -> None:
        self.raw: sqlite3.Connection | None = None
        self.is_idle = True
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[tuple[Callable[[Any], Any], asyncio.Future[Any] | None] | None] = SimpleQueue()
        # It must not keep the interpreter from ending.
        threading.Thread(target=self._work, name="tokenstore-sqlite", daemon=True).start()

    async def do(self, action: Callable[[sqlite3.Connection], T]) -> T:
        """Do something with the connection; cancelled, it waits for a moment until that has come to its end."""
        done: asyncio.Future[T] = self._loop.create_future()
        self._jobs.put((action, done))
        try:
            return await done
        except asyncio.CancelledError:
            self.is_idle = False
            behind_it: asyncio.Future[None] = self._loop.create_future()
            self._jobs.put((lambda _: None, behind_it))
            self.is_idle = await wait_through_cancellation([behind_it], FINISH_GRACE)
            raise
        finally:
            # An error, with its traceback, and the future that it came in would keep each other alive, and the cursor.
            del done

    async def open(self, path: Path, patience: float) -> None:
        """Open the file, which is made if need be."""
        loop = self._loop
        deadline = loop.time() + patience
        try:
            await self.do(partial(self._open, path))
            while True:
                try:
                    await self.do(_set_up)
                    return
                except sqlite3.OperationalError as error:
                    if not error.sqlite_errorname.startswith("SQLITE_BUSY") or loop.time() >= deadline:
                        raise
                await asyncio.sleep(random.uniform(0.001, 0.010))
        except BaseException:
            self.end()
            raise

    async def close(self) -> None:
        """Close the connection and end the thread."""
        await self.do(self._close)
        self._jobs.put(None)

    def end(self) -> None:
        """The same without waiting."""
        self._jobs.put((self._close, None))
        self._jobs.put(None)

    def _open(self, path: Path, _: object) -> None:
        _create_private(path)
        self.raw = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_MS / 1000, isolation_level=None, factory=_Connection)

    def _close(self, _: object) -> None:
        if self.raw is not None:
            raw, self.raw = self.raw, None
            raw.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            action, done = job
            answer: Any = None
            failure: BaseException | None = None
            try:
                answer = action(self.raw)
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's
                failure = error
            if done is not None:
                with suppress(RuntimeError):  # the event loop has been closed
                    self._loop.call_soon_threadsafe(_settle, done, answer, failure)
            # What waits here for the next job must keep nothing alive.
            del job, action, done, answer, failure


def _settle(done: asyncio.Future[Any], answer: object, failure: BaseException | None) -> None:
    if done.done():
        return
    if failure is not None:
        done.set_exception(failure)
    else:
        done.set_result(answer)


def _set_up(raw: sqlite3.Connection) -> None:
    for pragma in _PRAGMAS:
        raw.execute(f"PRAGMA {pragma}").close()


def _execute(sql: str, arguments: Sequence[Any], raw: sqlite3.Connection) -> Result:
    cursor = raw.execute(sql, arguments)
    return Result(cursor.fetchall(), cursor.rowcount)


def _execute_each(sql: str, each: Sequence[Sequence[Any]], raw: sqlite3.Connection) -> list[Result]:
    return [_execute(sql, arguments, raw) for arguments in each]


def _write_each(sql: str, each: Sequence[Sequence[Any]], raw: sqlite3.Connection) -> list[Result]:
    """In one transaction, unless there is one."""
    if raw.in_transaction:
        return _execute_each(sql, each, raw)
    raw.execute("BEGIN IMMEDIATE")
    try:
        results = _execute_each(sql, each, raw)
        raw.execute("COMMIT")
    except BaseException:
        raw.rollback()
        raise
    return results


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
        for pragma in _PRAGMAS:
            await _until_not_busy(connection, f"PRAGMA {pragma}", patience)
    except BaseException:
        await finish(connection.close())
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
