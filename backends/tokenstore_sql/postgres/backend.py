"""The backend for PostgreSQL: its URLs, its options and its drivers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar, Final
from urllib.parse import urlencode

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from tokenstore.errors import ConfigurationError
from tokenstore.options import OptionParser, one_of, positive_seconds, switch, text
from tokenstore_sql.backend import SQLBackend
from tokenstore_sql.connections.driver import Connector, through_engine
from tokenstore_sql.connections.hosts import Host
from tokenstore_sql.connections.passwords import check_password_is_given_once, password_option, with_password
from tokenstore_sql.dialect import Dialect
from tokenstore_sql.options import ENGINE_ARGUMENTS
from tokenstore_sql.postgres.clear_text import warning_of_clear_text
from tokenstore_sql.postgres.connections import AsyncpgConnection, PreparingAsyncpgConnection, PsycopgConnection
from tokenstore_sql.postgres.dialect import PostgresDialect
from tokenstore_sql.postgres.hosts import asyncpg_creator, hosts_of
from tokenstore_sql.postgres.services import service_of

__all__ = ["PostgresBackend"]

# libpq's names of these options. asyncpg understands them in a DSN, psycopg everywhere.
_LIBPQ_OPTIONS: Final = (
    "passfile",
    "service",
    "sslcert",
    "sslcrl",
    "sslkey",
    "sslmode",
    "sslrootcert",
    "target_session_attrs",
)

_UNPREPARED: Final = "write prepared_statements=false if the pooler is in transaction mode; else leave it out"


class PostgresBackend(SQLBackend):
    """``postgresql://user:password@host:5432/database``, also ``postgres://``, ``+asyncpg`` and ``+psycopg``."""

    dialect_class = PostgresDialect
    drivers: ClassVar[Mapping[str, str]] = {
        "postgresql": "postgresql+asyncpg",
        "postgres": "postgresql+asyncpg",
        "postgresql+asyncpg": "postgresql+asyncpg",
        "postgresql+psycopg": "postgresql+psycopg",
    }
    sync_drivers: ClassVar[frozenset[str]] = frozenset({"pg8000", "psycopg2", "psycopg2cffi"})
    extras: ClassVar[Mapping[str, str]] = {"postgresql+asyncpg": "postgres", "postgresql+psycopg": "psycopg"}
    driver_options: ClassVar[Mapping[str, OptionParser]] = {
        "application_name": text,
        "channel_binding": one_of("disable", "prefer", "require"),
        "connect_timeout": positive_seconds,
        "host": text,
        "password": password_option,
        "prepared_statements": switch,
        **dict.fromkeys(_LIBPQ_OPTIONS, text),
        "sslmode": one_of("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    }
    foreign_options: ClassVar[Mapping[str, str]] = {
        "connection_limit": "write pool_size",
        "options": "leave it out; ALTER ROLE … SET gives the role its settings, and the option schema names the schema",
        "pgbouncer": _UNPREPARED,
        "prepare_threshold": _UNPREPARED,
        "prepared_statement_cache_size": _UNPREPARED,
        "ssl": "write sslmode=verify-full and sslrootcert, or sslmode=require, which encrypts but verifies nothing",
        "statement_cache_size": _UNPREPARED,
        "supa": "leave it out",
    }

    @classmethod
    def _create_engine(cls, url: URL, options: Mapping[str, Any]) -> AsyncEngine:
        hosts = hosts_of(options["host"], url.port) if "host" in options else []
        connect = {
            "postgresql+asyncpg": _asyncpg_arguments,
            "postgresql+psycopg": _psycopg_arguments,
        }[url.drivername](options, hosts)
        if "password" in options:
            check_password_is_given_once(url)
            creator = connect.get("async_creator_fn") or _connect_of(url.get_driver_name())
            connect["async_creator_fn"] = with_password(creator, options["password"], _connect_timeout(options))
        return create_async_engine(url, connect_args=connect, **ENGINE_ARGUMENTS)

    @classmethod
    def _connector(cls, engine: AsyncEngine, dialect: Dialect, options: Mapping[str, Any]) -> Connector:
        prepares = options.get("prepared_statements", True)
        connection_class = {
            "asyncpg": PreparingAsyncpgConnection if prepares else AsyncpgConnection,
            "psycopg": PsycopgConnection,
        }[engine.driver]
        connect = through_engine(engine, dialect.errors, dialect.begin, connection_class)
        # Whoever disables TLS knows that there is none.
        return connect if options.get("sslmode") == "disable" else warning_of_clear_text(connect)


def _libpq(options: Mapping[str, Any]) -> dict[str, str]:
    return {name: options[name] for name in _LIBPQ_OPTIONS if name in options}


def _connect_timeout(options: Mapping[str, Any]) -> float:
    return float(options.get("connect_timeout", 10.0))


def _connect_of(driver: str) -> Callable[..., Coroutine[Any, Any, Any]]:
    """The driver's own way to open a connection."""
    module = import_module(driver)
    return module.connect if driver == "asyncpg" else module.AsyncConnection.connect  # type: ignore[no-any-return]


def _asyncpg_arguments(options: Mapping[str, Any], hosts: Sequence[Host] = ()) -> dict[str, Any]:
    if options.get("channel_binding") == "require":
        raise ConfigurationError(
            "channel_binding=require: asyncpg has no channel binding; write postgresql+psycopg://, or "
            "sslmode=verify-full and sslrootcert in place of channel_binding"
        )
    arguments: dict[str, Any] = {"timeout": _connect_timeout(options)}
    if hosts:
        arguments["async_creator_fn"] = asyncpg_creator(hosts, options)
    if "application_name" in options:
        arguments["server_settings"] = {"application_name": options["application_name"]}
    if libpq := {**_libpq(options), **service_of(options)}:
        # Keyword arguments win over the DSN, so the DSN carries nothing but these options.
        arguments["dsn"] = f"postgresql://?{urlencode(libpq)}"
    if not options.get("prepared_statements", True):
        # A pooler in transaction mode gives each transaction another server connection, which does not know the
        # statements that were prepared on the one before.
        arguments |= {
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": lambda: "",
        }
    return arguments


def _psycopg_arguments(options: Mapping[str, Any], hosts: Sequence[Host] = ()) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "connect_timeout": max(1, round(_connect_timeout(options))),
        # As asyncpg does. The database or the role may have another default.
        "client_encoding": "utf8",
        **_libpq(options),
    }
    if hosts:
        # An empty port is the default.
        arguments["host"] = ",".join(host.name for host in hosts)
        arguments["port"] = ",".join(str(host.port or "") for host in hosts)
    for name in {"application_name", "channel_binding"} & options.keys():
        arguments[name] = options[name]
    if not options.get("prepared_statements", True):
        arguments["prepare_threshold"] = None
    return arguments
