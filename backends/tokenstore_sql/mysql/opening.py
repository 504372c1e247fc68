"""Opening a store's own connections: encrypted if the options ask for it, and with known settings of the session."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any, Final, NoReturn

from tokenstore.errors import UnsupportedOperationError
from tokenstore_sql.connections.addresses import is_loopback
from tokenstore_sql.mysql.connections import AiomysqlConnection, AsyncmyConnection

__all__ = ["CONNECTION_CLASSES", "Opener"]

_log: Final = logging.getLogger("tokenstore.sql.mysql")

CONNECTION_CLASSES: Final = {"aiomysql": AiomysqlConnection, "asyncmy": AsyncmyConnection}
"""From a driver's name to the class of its connections."""

# Whatever the server's defaults and its init_connect are. The drivers put values into the SQL text themselves. With
# NO_BACKSLASH_ESCAPES, or in a character set such as gbk, a value could end its literal and go on as SQL. Strict: a
# value that does not fit is an error, and is not cut.
_SETTINGS: Final = "SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', NAMES utf8mb4"

# A node of Galera without quorum refuses any COMMIT, but answers a SELECT without tables.
_SERVES: Final = "COMMIT"
_IS_READ_ONLY: Final = "SELECT @@GLOBAL.read_only OR @@GLOBAL.innodb_read_only"

# Methods of authentication with which a server asks for the password itself.
_IN_CLEAR: Final = frozenset({"mysql_clear_password", "dialog"})
# The client library's own error numbers.
_UNREACHABLE: Final = 2003
_TLS_FAILED: Final = 2026
_METHOD_REFUSED: Final = 2059
# The server's own number for a write that it refuses because of --read-only.
_READ_ONLY: Final = 1290
# What of aiomysql's connection is overridden. If a new version has no such method, nothing calls the override.
_OVERRIDDEN: Final = ("_request_authentication", "_process_auth")


class Opener:
    """Opens connections of one driver.

    Args:
        driver: The driver's name.
        tls: The TLS settings, if the connections must be encrypted.
    """

    def __init__(self, driver: str, tls: ssl.SSLContext | None) -> None:
        self._driver = driver
        self._tls = tls
        self._warned = False

    async def open(self, arguments: Mapping[str, Any], *, must_serve_writes: bool = False) -> Any:
        """Open a connection.

        Args:
            arguments: The driver's arguments, among them ``connect_timeout``, without those for TLS.
            must_serve_writes: Whether a server that accepts no writes is refused.

        Raises:
            Exception: The driver's ``OperationalError``: the server cannot be reached, or the connection would not be
                encrypted although it must be, or the server asks for the password itself over an unencrypted one, or
                the server accepts no writes although it must.
        """
        connection = self._new(arguments)
        limit = arguments["connect_timeout"]
        try:
            # The drivers limit the connection of the socket alone, and not what follows: the greeting and TLS.
            async with asyncio.timeout(limit):
                # aiomysql has no public method that opens a connection of another class than its own.
                await (connection.connect() if self._driver == "asyncmy" else connection._connect())
                self._check(connection, arguments.get("host"))
                async with connection.cursor() as cursor:
                    await cursor.execute(_SETTINGS)
                    if must_serve_writes:
                        await _check_writes(connection, cursor)
        except TimeoutError:
            connection.close()
            number, words = _UNREACHABLE, f"the server did not let the driver in within {limit} s"
        except connection.OperationalError as error:
            connection.close()
            if not isinstance(cause := error.__cause__, ssl.SSLError):
                raise
            # The driver's message says no more than that it cannot connect.
            reason = getattr(cause, "verify_message", "") or cause.reason or type(cause).__name__
            number, words = _TLS_FAILED, f"no TLS connection to the server: {reason}"
        except BaseException:
            connection.close()
            raise
        else:
            return connection
        raise connection.OperationalError(number, words)

    def _new(self, arguments: Mapping[str, Any]) -> Any:
        """A connection that is not open yet."""
        if self._driver == "aiomysql":
            return _guarded_aiomysql()(ssl=self._tls, **arguments)
        # asyncmy itself sends nothing before TLS, whatever the server offers.
        refusals = {} if self._tls else dict.fromkeys(_IN_CLEAR, _Refusal)
        return import_module("asyncmy.connection").Connection(ssl=self._tls, auth_plugin_map=refusals, **arguments)

    def _check(self, connection: Any, host: object) -> None:
        transport = CONNECTION_CLASSES[self._driver].transport_of(connection)
        if transport.get_extra_info("ssl_object") is not None:
            return
        if self._tls is not None:
            raise connection.OperationalError(_TLS_FAILED, "the driver has left the connection unencrypted")
        if not self._warned and _is_remote(transport.get_extra_info("peername")):
            self._warned = True
            _log.warning(
                "the connections to %s are not encrypted: whoever can read the network sees names and sealed tokens, "
                "and whoever controls it can get the database's password; set the option ssl=true, or ssl_ca",
                host,
            )


async def _check_writes(connection: Any, cursor: Any) -> None:
    await cursor.execute(_SERVES)
    await cursor.execute(_IS_READ_ONLY)
    ((read_only,),) = await cursor.fetchall()
    if read_only:
        raise connection.OperationalError(_READ_ONLY, "the server is read-only")


class _Refusal:
    """In place of one of asyncmy's methods of authentication.

    Args:
        connection: The connection whose server asks for the method.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def authenticate(self, packet: object) -> NoReturn:
        """Refuse."""
        _refuse(self._connection)


def _refuse(connection: Any) -> NoReturn:
    raise connection.OperationalError(
        _METHOD_REFUSED,
        "the server asks for the password in clear, on a connection without TLS; it was not sent. If this is the right "
        "server, set the option ssl=true, or ssl_ca",
    )


@cache
def _guarded_aiomysql() -> type[Any]:
    """A class for aiomysql, which by itself goes on without TLS if the server, or a proxy, claims to have none."""
    aiomysql: Any = import_module("aiomysql.connection")
    if missing := [name for name in _OVERRIDDEN if not hasattr(aiomysql.Connection, name)]:
        raise UnsupportedOperationError(
            f"this version of aiomysql cannot be kept from sending a password in clear: it lacks {', '.join(missing)}; "
            "install another version, or use mysql+asyncmy://"
        )

    class Guarded(aiomysql.Connection):  # type: ignore[misc]
        def __init__(self, *, ssl: ssl.SSLContext | None, **arguments: Any) -> None:
            super().__init__(ssl=ssl, **arguments)
            self._must_encrypt = ssl is not None

        async def _request_authentication(self) -> None:
            offers_tls = self.server_capabilities & aiomysql.CLIENT.SSL
            if self._must_encrypt and not offers_tls:
                raise self.OperationalError(
                    _TLS_FAILED,
                    "the server offers no TLS, which the options ask for; no password was sent. Turn TLS on at the "
                    "server. If it is on, a proxy, or an attacker, hides it",
                )
            # aiomysql answers a greeting that names such a method with the password.
            self._allow(self._server_auth_plugin)
            await super()._request_authentication()

        async def _process_auth(self, plugin_name: bytes, auth_packet: Any) -> Any:
            self._allow(plugin_name.decode(errors="replace"))
            return await super()._process_auth(plugin_name, auth_packet)

        def _allow(self, method: str) -> None:
            if method in _IN_CLEAR and not self._must_encrypt:
                _refuse(self)

    return Guarded


def _is_remote(peer: object) -> bool:
    """Whether a connection leaves this machine, by the address at its other end. A Unix socket's is a string."""
    return isinstance(peer, tuple) and not is_loopback(str(peer[0]))
