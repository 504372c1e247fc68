"""A warning about connections over a network without encryption."""

from __future__ import annotations

import logging
from typing import Final

from tokenstore_sql.connections.addresses import is_loopback
from tokenstore_sql.connections.driver import Connector, DriverConnection
from tokenstore_sql.postgres.connections import AsyncpgConnection, PsycopgConnection

__all__ = ["warning_of_clear_text"]

_log: Final = logging.getLogger("tokenstore.sql.postgres")


def warning_of_clear_text(connect: Connector) -> Connector:
    """Warn once of a connection that leaves this machine unencrypted. Without ``sslmode`` the server decides that.

    Args:
        connect: Opens a connection.
    """
    warned = False

    async def connect_and_look() -> DriverConnection:
        nonlocal warned
        connection = await connect()
        if not warned and (address := _remote_in_clear(connection)):
            warned = True
            _log.warning(
                "the connection to the PostgreSQL server at %s is not encrypted: whoever is on the way can read users' "
                "ids and change answers; set sslmode=verify-full, and sslrootcert if the server's certificate is not "
                "from a public authority; or sslmode=disable if the network is trusted",
                address,
            )
        return connection

    return connect_and_look


def _remote_in_clear(connection: DriverConnection) -> str | None:
    """The server's address, if the connection is unencrypted and leaves this machine."""
    if not isinstance(connection, AsyncpgConnection | PsycopgConnection) or connection.is_encrypted():
        return None
    address = connection.server_address()
    return address if address and not is_loopback(address) else None
