"""aiosqlite's connections, for the engine that creates the table."""

from __future__ import annotations

import asyncio
from typing import Any

import aiosqlite

from tokenstore.cancellation import finish
from tokenstore_sql.sqlite.busy import until_not_busy
from tokenstore_sql.sqlite.database_file import DatabaseFile
from tokenstore_sql.sqlite.files import BUSY_TIMEOUT_MS, PRAGMAS, ClosingConnection

__all__ = ["open_aiosqlite"]


async def open_aiosqlite(file: DatabaseFile, timeout: float) -> aiosqlite.Connection:
    """Open a connection.

    Args:
        file: The database file.
        timeout: The longest wait for other connections, in seconds.

    Raises:
        TableMissingError: There is no such file.
        BackendUnavailableError: The file is gone, or was replaced by one that cannot be opened safely.
    """
    file_id = file.before_opening()
    connection = aiosqlite.connect(
        file.uri, uri=True, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None, factory=ClosingConnection
    )
    # The connection's thread must not keep the interpreter from ending.
    thread: Any = getattr(connection, "_thread", connection)  # before aiosqlite 0.22 the connection was the thread
    thread.daemon = True
    try:
        connection = await connection
    except BaseException:
        # The thread still has a result for this event loop, which must not be closed before that.
        await finish(asyncio.to_thread(thread.join))
        raise
    opened = connection

    async def set_up() -> None:
        for pragma in PRAGMAS:
            await (await opened.execute(f"PRAGMA {pragma}")).close()

    try:
        # Switching a new file to WAL needs the file alone, and SQLite does not wait for that by itself.
        await until_not_busy(set_up, timeout)
    except BaseException:
        await finish(connection.close())
        raise
    file.after_opening(file_id)
    return connection
