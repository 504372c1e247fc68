"""The server's threads behind connections, and how to end one of them."""

from __future__ import annotations

from typing import Final, NamedTuple

from sqlalchemy import text as sql

from tokenstore_sql.connections.connection import Connection
from tokenstore_sql.mysql.sessions import session_of
from tokenstore_sql.termination import end_session

__all__ = ["ServerThread", "kill", "thread_of"]

_SHOW_THREADS: Final = sql("SHOW PROCESSLIST")
_KILL: Final = sql("KILL :id")
# In a connection's notes: the server's thread behind it.
_THREAD: Final = "tokenstore.thread"


class ServerThread(NamedTuple):
    """A connection as its server knows it."""

    id: int
    hostname: str
    port: int


async def thread_of(connection: Connection) -> ServerThread | None:
    """The server's thread behind a connection; None if a proxy hides it."""
    if _THREAD not in connection.info:
        session = await session_of(connection)
        # A proxy names a number of its own when it is connected, and may give the server's thread to another client.
        named = (await connection.driver_connection()).thread_id()
        connection.info[_THREAD] = ServerThread(*session[:3]) if session.thread == named else None
    thread: ServerThread | None = connection.info[_THREAD]
    return thread


async def kill(connection: Connection, thread: ServerThread) -> None:
    """End the thread behind a connection that was lost during a statement, and wait until it is gone."""

    async def exists(aside: Connection) -> bool:
        here = await thread_of(aside)
        # The number may belong to another client on another server behind the same address, or after a restart, when
        # the server's numbers begin anew.
        if here is None or here[1:] != thread[1:] or here.id <= thread.id:
            return False
        # SHOW PROCESSLIST and not the tables behind it: MySQL warns that one of them is deprecated, and the other is
        # empty without performance_schema.
        threads, _ = await aside.run(_SHOW_THREADS)
        return any(row[0] == thread.id for row in threads)

    await end_session(connection, exists, lambda aside: aside.run(_KILL, {"id": thread.id}))
