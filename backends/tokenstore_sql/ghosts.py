"""Statements that go on in the server although their connection is lost.

A driver that is cancelled, or whose connection is cut, closes its socket. The server does not notice while it waits for
a lock, or before it has read the statement: it would still carry out a write whose caller has long been told of its
failure, over tokens that were stored since. So the server's session behind a lost connection is ended over another
connection, and the caller is told only when that session is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeVar

from tokenstore.cancellation import finish
from tokenstore_sql.connection import Connection

__all__ = ["end_session", "without_ghost"]

T = TypeVar("T")

# The longest try to reach the server and to end the session there, in seconds. A server that is gone has no sessions.
_TIMEOUT: Final = 2.0
_POLL_INTERVAL: Final = 0.010


async def without_ghost(
    connection: Connection, action: Callable[[], Awaitable[T]], end: Callable[[], Awaitable[None]]
) -> T:
    """Run a statement that locks or writes; if its connection is lost, end the server's session before raising.

    Args:
        connection: The statement's connection.
        action: Runs the statement.
        end: Ends the session, by :func:`end_session`.
    """
    try:
        return await action()
    except GeneratorExit:  # the event loop is gone
        raise
    except BaseException:
        if connection.lost and not connection.is_foreign:
            await end()
        raise


async def end_session(
    lost: Connection, exists: Callable[[Connection], Awaitable[bool]], end: Callable[[Connection], Awaitable[object]]
) -> None:
    """End the server's session behind a lost connection, and wait until it is gone.

    Errors are suppressed: a session that cannot be ended here ends with the server's own lock timeout.

    Args:
        lost: The connection.
        exists: Whether the server still has the session, asked over another connection. It must be certain that this is
            the same session of the same server, or say no.
        end: Ends the session, over another connection.
    """

    async def work() -> None:
        with suppress(Exception):
            async with asyncio.timeout(_TIMEOUT), lost.beside() as aside:
                if await exists(aside):
                    _ = await end(aside)
                    while await exists(aside):  # noqa: ASYNC110 - the server does not report the end of a session
                        await asyncio.sleep(_POLL_INTERVAL)

    await finish(work(), grace=_TIMEOUT)
