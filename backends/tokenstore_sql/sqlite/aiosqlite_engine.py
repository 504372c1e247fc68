"""aiosqlite's connections, for the engine that creates the table."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiosqlite

from tokenstore.cancellation import finish
from tokenstore_sql.sqlite.busy import until_not_busy
from tokenstore_sql.sqlite.files import BUSY_TIMEOUT_MS, PRAGMAS, ClosingConnection, create_private

__all__ = ["open_aiosqlite"]


async def open_aiosqlite(path: Path, timeout: float) -> aiosqlite.Connection:
    """Open a connection. The file is created if it is missing.

    Args:
        path: The database file.
        timeout: The longest wait for other connections, in seconds.
    """
    await asyncio.to_thread(create_private, path)
    connection = aiosqlite.connect(
        path, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None, factory=ClosingConnection
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
    return connection
