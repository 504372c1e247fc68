"""A thread that works on one SQLite connection."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from tokenstore.cancellation import FINISH_GRACE, wait_through_cancellation
from tokenstore.native_threads import original, start_thread
from tokenstore_sql.sqlite.busy import until_not_busy
from tokenstore_sql.sqlite.database_file import DatabaseFile, FileId
from tokenstore_sql.sqlite.files import BUSY_TIMEOUT_MS, PRAGMAS, ClosingConnection

if TYPE_CHECKING:
    from queue import SimpleQueue

__all__ = ["ConnectionThread"]

T = TypeVar("T")

_Job = tuple[Callable[[Any], Any], asyncio.Future[Any] | None]


class ConnectionThread:
    """A thread that does one job after the other on one connection.

    Attributes:
        raw: The connection, once it has been opened.
        file_id: The file that was opened.
        is_idle: Whether all jobs have ended.
    """

    def __init__(self) -> None:
        self.raw: sqlite3.Connection | None = None
        self.file_id: FileId | None = None
        self.is_idle = True
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[_Job | None] = original("queue", "SimpleQueue")()
        start_thread(self._work, "tokenstore-sqlite")

    async def do(self, action: Callable[[sqlite3.Connection], T]) -> T:
        """Run a function in the thread. A caller that is cancelled waits a moment for the function to end."""
        done: asyncio.Future[T] = self._loop.create_future()
        self._jobs.put((action, done))
        try:
            return await done
        except asyncio.CancelledError:
            self.is_idle = False
            next_job: asyncio.Future[None] = self._loop.create_future()
            self._jobs.put((lambda _: None, next_job))
            self.is_idle = await wait_through_cancellation([next_job], FINISH_GRACE)
            raise
        finally:
            # An error, with its traceback, and the future that it came in would keep each other alive, and the cursor.
            del done

    async def open(self, file: DatabaseFile, timeout: float) -> None:
        """Open the connection.

        Args:
            file: The database file.
            timeout: The longest wait for other connections, in seconds.

        Raises:
            TableMissingError: There is no such file.
            BackendUnavailableError: The file is gone, or was replaced by one that cannot be opened safely.
        """
        try:
            self.file_id = file.before_opening()
            await self.do(partial(self._open, file.uri))
            # Switching a new file to WAL needs the file alone, and SQLite does not wait for that by itself.
            await until_not_busy(lambda: self.do(_set_up), timeout)
            file.after_opening(self.file_id)
        except BaseException:
            self.end()
            raise

    async def close(self) -> None:
        """Close the connection and end the thread."""
        await self.do(self._close)
        self._jobs.put(None)

    def end(self) -> None:
        """Close the connection and end the thread, without waiting for either."""
        self._jobs.put((self._close, None))
        self._jobs.put(None)

    def _open(self, uri: str, _: object) -> None:
        self.raw = sqlite3.connect(
            uri, uri=True, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None, factory=ClosingConnection
        )

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
            except BaseException as error:  # noqa: BLE001 - the caller gets it
                failure = error
            if done is not None:
                with suppress(RuntimeError):  # the event loop has been closed
                    self._loop.call_soon_threadsafe(_settle, done, answer, failure)
            # The thread must keep nothing of this job alive while it waits for the next one.
            del job, action, done, answer, failure


def _settle(done: asyncio.Future[Any], answer: object, failure: BaseException | None) -> None:
    if done.done():
        return
    if failure is not None:
        done.set_exception(failure)
    else:
        done.set_result(answer)


def _set_up(raw: sqlite3.Connection) -> None:
    for pragma in PRAGMAS:
        raw.execute(f"PRAGMA {pragma}").close()
