"""What a connection's session at the server is like: its thread, its limits, and whether it can be trusted with values.

aiomysql always, and asyncmy without prepared statements, put values into the SQL text, with backslashes before quotes.
A session's settings can make the server read that text in another way, so that a user's id ends its literal and goes on
as SQL: ``x' OR 1=1 --`` as a user's id would delete all rows. The store's own connections set these settings. An
application's connections are refused instead of changed, because the settings are the application's.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from sqlalchemy import text as sql

from tokenstore.errors import UnsupportedOperationError
from tokenstore_sql.connections.connection import Connection

__all__ = ["SESSION", "Session", "check_size", "session_of", "trusted_session"]

SESSION: Final = sql(
    "SELECT CONNECTION_ID(), @@hostname, @@port, @@max_allowed_packet, @@net_buffer_length, @@character_set_client, "
    "@@sql_mode"
)
"""The query for what :class:`Session` holds."""
# In a connection's notes: its Session.
_SESSION: Final = "tokenstore.session"
# Character sets in which a quote or a backslash can be the second byte of a character.
_MISREAD: Final = frozenset({"big5", "cp932", "gb18030", "gbk", "sjis"})
_NO_BACKSLASHES: Final = "NO_BACKSLASH_ESCAPES"
# The same mode, in the status that the server sends with each answer.
_NO_BACKSLASHES_STATUS: Final = 0x0200
# The client library's own number for a statement that is too large to be sent. The drivers often do not see the
# server's number, 1153, because the server closes the connection while they still send.
_TOO_LARGE: Final = 2020


class Session(NamedTuple):
    """A connection's session, as the server described it when it was first asked."""

    thread: int
    hostname: str
    port: int
    max_allowed_packet: int
    net_buffer_length: int
    character_set_client: str
    sql_mode: str

    @property
    def is_misread(self) -> bool:
        """Whether the server may read the driver's SQL text in another way than the driver means it."""
        return self.character_set_client in _MISREAD or _NO_BACKSLASHES in self.sql_mode


async def session_of(connection: Connection, *, again: bool = False) -> Session:
    """A connection's session.

    Args:
        connection: The connection.
        again: Whether to ask the server although it was asked before.
    """
    if again or _SESSION not in connection.info:
        (found,), _ = await connection.run(SESSION)
        # An application's driver may return text as bytes.
        values: list[Any] = [value.decode() if isinstance(value, bytes) else value for value in found]
        connection.info[_SESSION] = Session(*values)
    session: Session = connection.info[_SESSION]
    return session


async def trusted_session(connection: Connection, driver: Any) -> Session:
    """An application's session, if the server reads the driver's SQL text as the driver means it.

    Args:
        connection: The connection.
        driver: The driver's connection, which knows the status that the server sent last.

    Raises:
        UnsupportedOperationError: It does not.
    """
    session = await session_of(connection)
    if not (session.is_misread or driver.server_status & _NO_BACKSLASHES_STATUS):
        return session
    session = await session_of(connection, again=True)  # the application may have changed it
    if session.character_set_client in _MISREAD:
        raise UnsupportedOperationError(
            f"the connection's character set is {session.character_set_client}, in which values that the driver "
            "escapes can still end their literal and go on as SQL; connect with charset=utf8mb4 in the engine's URL"
        )
    if session.is_misread:
        raise UnsupportedOperationError(
            f"the session's sql_mode has {_NO_BACKSLASHES}, with which values that the driver escapes can still end "
            "their literal and go on as SQL; remove it from the sql_mode that the engine's connect_args or events, or "
            "the server's configuration, set"
        )
    return session


def check_size(connection: Connection, driver: Any, size: int) -> None:
    """Refuse a statement that the server would not read: it would answer by closing the connection.

    Args:
        connection: The connection. If it has not been asked for its session, its limit is not known.
        driver: The driver's connection.
        size: The bytes of the statement with its values.

    Raises:
        Exception: The driver's ``OperationalError``: the statement is too large. It was not sent.
    """
    session: Session | None = connection.info.get(_SESSION)
    if session is None:
        return
    # The server takes a command byte, too, and fewer bytes than the limit.
    limit = max(session.max_allowed_packet, session.net_buffer_length)
    if size + 1 >= limit:
        raise driver.OperationalError(
            _TOO_LARGE,
            f"the statement would have {size} bytes, and the server's max_allowed_packet is "
            f"{session.max_allowed_packet}; it was not sent. Raise max_allowed_packet at the server, or store less in "
            "the row",
        )
