"""The server processes behind connections, and how to end one of them."""

from __future__ import annotations

import time
from typing import Any, Final, NamedTuple

from sqlalchemy import Double, Integer, and_, bindparam, column, func, literal_column, select, table

from tokenstore_sql.connections.connection import Connection
from tokenstore_sql.termination import end_session

__all__ = ["Session", "session_of", "terminate"]

# In a connection's notes: the server's process behind it.
_SESSION: Final = "tokenstore.session"


class Session(NamedTuple):
    """The server's side of a connection.

    Attributes:
        pid: The number of the server's process.
        seen_at: A time at which the process existed, in seconds of :func:`time.monotonic`.
    """

    pid: int
    seen_at: float


async def session_of(connection: Connection) -> Session | None:
    """The server's process behind a connection, as the server named it when it was connected; None if it did not."""
    if _SESSION not in connection.info:
        driver = await connection.driver_connection()
        pid = driver.get_server_pid() if hasattr(driver, "get_server_pid") else driver.info.backend_pid
        connection.info[_SESSION] = Session(pid, time.monotonic()) if pid else None
    session: Session | None = connection.info[_SESSION]
    return session


async def terminate(connection: Connection, session: Session) -> None:
    """End the server process behind a connection that was lost during a statement, and wait until it is gone."""
    processes = table(
        "pg_stat_activity", *map(column, ("pid", "usename", "datname", "backend_start")), schema="pg_catalog"
    )
    # A process with the same number that began later belongs to another connection. A pooler names numbers that no
    # process of the server has.
    this_process = and_(
        processes.c.pid == bindparam("pid", type_=Integer()),
        processes.c.usename == func.session_user(),
        processes.c.datname == func.pg_catalog.current_database(),
        func.pg_catalog.date_part(
            literal_column("'epoch'"), func.pg_catalog.clock_timestamp() - processes.c.backend_start
        )
        >= bindparam("age", type_=Double()),
    )

    def parameters() -> dict[str, Any]:
        return {"pid": session.pid, "age": time.monotonic() - session.seen_at}

    async def exists(aside: Connection) -> bool:
        found, _ = await aside.run(select(processes.c.pid).where(this_process), parameters())
        return len(found) > 0

    async def end(aside: Connection) -> None:
        _ = await aside.run(
            select(func.pg_catalog.pg_terminate_backend(processes.c.pid)).where(this_process), parameters()
        )

    await end_session(connection, exists, end)
