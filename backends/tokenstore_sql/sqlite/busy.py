"""Waiting for a database that another connection has locked."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sqlalchemy.exc import DBAPIError

from tokenstore_sql.sqlite.errors import SQLiteErrors

__all__ = ["until_not_busy"]

T = TypeVar("T")

_errors = SQLiteErrors()


async def until_not_busy(action: Callable[[], Awaitable[T]], timeout: float) -> T:
    """Run a statement that needs a lock, again and again until the lock is free.

    The wait is in asyncio rather than in SQLite, where it would block a thread, and a cancelled task with it.

    Args:
        action: Runs the statement.
        timeout: When to raise the error in place of trying again, in seconds.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while True:
        try:
            return await action()
        except (DBAPIError, sqlite3.Error) as error:
            code = _errors.code(error.orig or error if isinstance(error, DBAPIError) else error) or ""
            # SQLITE_BUSY_SNAPSHOT does not pass with time: the transaction has read rows that have changed since.
            passes = code.startswith("SQLITE_BUSY") and code != "SQLITE_BUSY_SNAPSHOT"
            if not passes or loop.time() >= deadline:
                raise
        await asyncio.sleep(random.uniform(0.001, 0.010))
