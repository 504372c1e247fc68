"""Ending statements that go on in the server although their connection is lost.

A driver whose task is cancelled, or whose connection is cut, closes its socket. The server does not notice this while
it waits for a lock, or before it has read the statement. It could carry out a write long after the caller was told of
the failure, over tokens that were stored since. So the server's session behind a lost connection is ended over another
connection, and the caller is told only when that session is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeVar

from tokenstore.cancellation import finish
from tokenstore_sql.connections.connection import Connection

__all__ = ["end_session", "ending_lost_session"]

T = TypeVar("T")

_log: Final = logging.getLogger("tokenstore.sql.termination")

# How long to try to reach the server and to end the session there, in seconds. A server that is gone has no sessions.
_TIMEOUT: Final = 2.0
_POLL_INTERVAL: Final = 0.010


async def ending_lost_session(
    connection: Connection, action: Callable[[], Awaitable[T]], end: Callable[[], Awaitable[None]]
) -> T:
    """Run a statement that locks or writes. If its connection is lost, the server's session is ended before raising.

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
                    _log.info("ending the server's session behind a connection that was lost during a statement")
                    _ = await end(aside)
                    while await exists(aside):  # noqa: ASYNC110 - the server does not report the end of a session
                        await asyncio.sleep(_POLL_INTERVAL)
                return
        _log.warning("the server's session behind a lost connection could not be ended; its statement may go on")

    await finish(work(), grace=_TIMEOUT)
