"""The backend for MySQL and MariaDB: its URLs, its options and its drivers."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, ClassVar, Final

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from tokenstore.cancellation import finish
from tokenstore.errors import ConfigurationError, InvalidInputError
from tokenstore.options import OptionParser, one_of, positive_seconds, switch, text
from tokenstore_sql.backend import SQLBackend
from tokenstore_sql.connections.driver import Connector, DriverConnection, through_engine
from tokenstore_sql.connections.passwords import check_password_is_given_once, password_option, with_password
from tokenstore_sql.dialect import Dialect
from tokenstore_sql.mysql.dialect import MySQLDialect
from tokenstore_sql.mysql.hosts import HostsOpener, hosts_of
from tokenstore_sql.mysql.opening import CONNECTION_CLASSES, Opener
from tokenstore_sql.options import ENGINE_ARGUMENTS

__all__ = ["MySQLBackend"]

# How many prepared statements asyncmy keeps on a connection: there is one for each number of rows in a batch.
_PREPARED: Final = 100

# How other libraries turn TLS on. Each verifies something else, so none of them is translated.
_OTHER_TLS_OPTIONS: Final = (
    *("ssl-mode", "ssl_mode", "sslMode", "sslmode", "sslaccept", "tls", "useSSL"),
    *("ssl_check_hostname", "ssl_disabled", "ssl_verify_cert", "ssl_verify_identity"),
)
_VERIFIES: Final = "requires TLS and verifies the server's certificate and host name"


def _ssl_switch(name: str, value: object) -> bool:
    try:
        return switch(name, value)
    except InvalidInputError:
        raise InvalidInputError(f"{name} must be true or false; true {_VERIFIES}") from None


class MySQLBackend(SQLBackend):
    """``mysql://user:password@host:3306/database``, also ``mariadb://``, ``+aiomysql`` and ``+asyncmy``."""

    dialect_class = MySQLDialect
    drivers: ClassVar[Mapping[str, str]] = {
        "mysql": "mysql+aiomysql",
        "mysql+aiomysql": "mysql+aiomysql",
        "mysql+asyncmy": "mysql+asyncmy",
        "mariadb": "mysql+aiomysql",
        "mariadb+aiomysql": "mysql+aiomysql",
        "mariadb+asyncmy": "mysql+asyncmy",
    }
    sync_drivers: ClassVar[frozenset[str]] = frozenset(
        {"cymysql", "mariadbconnector", "mysqlconnector", "mysqldb", "pymysql"}
    )
    extras: ClassVar[Mapping[str, str]] = {"mysql+aiomysql": "mysql", "mysql+asyncmy": "asyncmy"}
    driver_options: ClassVar[Mapping[str, OptionParser]] = {
        "charset": one_of("utf8mb4"),  # which the connections have anyway; many URLs name it
        "connect_timeout": positive_seconds,
        "host": text,
        "password": password_option,
        "ssl": _ssl_switch,
        "ssl_ca": text,
        "ssl_cert": text,
        "ssl_key": text,
        "unix_socket": text,
    }
    foreign_options: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            _OTHER_TLS_OPTIONS, f"write ssl=true, which {_VERIFIES}, and ssl_ca if its authority is private"
        ),
        "connection_limit": "write pool_size",
        "ssl-ca": "write ssl_ca",
        "ssl-cert": "write ssl_cert",
        "ssl-key": "write ssl_key",
    }

    @classmethod
    def _create_engine(cls, url: URL, options: Mapping[str, Any]) -> AsyncEngine:
        connect: dict[str, Any] = {
            "charset": "utf8mb4",
            "connect_timeout": max(1, round(options.get("connect_timeout", 10.0))),
        }
        if url.get_driver_name() == "asyncmy":
            connect["stmt_cache_size"] = _PREPARED
        one_host = Opener(url.get_driver_name(), _tls(options))
        opener: Opener | HostsOpener = one_host
        if "host" in options:
            if "unix_socket" in options:
                raise ConfigurationError("host and unix_socket: pass one of them")
            opener = HostsOpener(hosts_of(options["host"], url.port), one_host)
        if "unix_socket" in options:
            connect["unix_socket"] = options["unix_socket"]

        async def open_connection(**password: str) -> Any:
            _, of_url = engine.dialect.create_connect_args(url)
            return await opener.open({**of_url, **connect, **password})

        creator: Callable[..., Coroutine[Any, Any, Any]] = open_connection
        if "password" in options:
            check_password_is_given_once(url)
            creator = with_password(open_connection, options["password"], connect["connect_timeout"])

        engine = create_async_engine(url, async_creator=creator, **ENGINE_ARGUMENTS)
        return engine

    @classmethod
    def _connector(cls, engine: AsyncEngine, dialect: Dialect, options: Mapping[str, Any]) -> Connector:
        connect = through_engine(engine, dialect.errors, dialect.begin, CONNECTION_CLASSES[engine.driver])

        async def ready() -> DriverConnection:
            connection = await connect()
            try:
                await connection.send_text(f"SET SESSION TRANSACTION ISOLATION LEVEL {dialect.isolation_level}")
            except BaseException:
                await finish(connection.close())
                raise
            return connection

        return ready


def _tls(options: Mapping[str, Any]) -> ssl.SSLContext | None:
    if not (options.get("ssl") or options.keys() & {"ssl_ca", "ssl_cert", "ssl_key"}):
        return None
    try:
        context = ssl.create_default_context(cafile=options.get("ssl_ca"))
        if "ssl_cert" in options:
            context.load_cert_chain(options["ssl_cert"], options.get("ssl_key"))
    except OSError as error:
        raise ConfigurationError(f"ssl_ca, ssl_cert or ssl_key cannot be loaded: {error.strerror or error}") from None
    return context
