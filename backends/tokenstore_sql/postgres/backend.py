"""The backend for PostgreSQL: its URLs, its options and its drivers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final
from urllib.parse import urlencode

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from tokenstore.options import OptionParser, positive_seconds, switch, text
from tokenstore_sql.backend import SQLBackend
from tokenstore_sql.connections.driver import Connector, through_engine
from tokenstore_sql.connections.hosts import Host
from tokenstore_sql.dialect import Dialect
from tokenstore_sql.options import ENGINE_ARGUMENTS
from tokenstore_sql.postgres.clear_text import warning_of_clear_text
from tokenstore_sql.postgres.connections import AsyncpgConnection, PreparingAsyncpgConnection, PsycopgConnection
from tokenstore_sql.postgres.dialect import PostgresDialect
from tokenstore_sql.postgres.hosts import asyncpg_creator, hosts_of

__all__ = ["PostgresBackend"]

# libpq's names of these options. asyncpg understands them in a DSN, psycopg everywhere.
_LIBPQ_OPTIONS: Final = (
    "passfile",
    "sslcert",
    "sslcrl",
    "sslkey",
    "sslmode",
    "sslrootcert",
    "target_session_attrs",
)


class PostgresBackend(SQLBackend):
    """``postgresql://user:password@host:5432/database``, also ``postgres://``, ``+asyncpg`` and ``+psycopg``."""

    dialect_class = PostgresDialect
    drivers: ClassVar[Mapping[str, str]] = {
        "postgresql": "postgresql+asyncpg",
        "postgres": "postgresql+asyncpg",
        "postgresql+asyncpg": "postgresql+asyncpg",
        "postgresql+psycopg": "postgresql+psycopg",
    }
    extras: ClassVar[Mapping[str, str]] = {"postgresql+asyncpg": "postgres", "postgresql+psycopg": "psycopg"}
    driver_options: ClassVar[Mapping[str, OptionParser]] = {
        "application_name": text,
        "connect_timeout": positive_seconds,
        "host": text,
        "prepared_statements": switch,
        **dict.fromkeys(_LIBPQ_OPTIONS, text),
    }

    @classmethod
    def _create_engine(cls, url: URL, options: Mapping[str, Any]) -> AsyncEngine:
        hosts = hosts_of(options["host"], url.port) if "host" in options else []
        connect = {
            "postgresql+asyncpg": _asyncpg_arguments,
            "postgresql+psycopg": _psycopg_arguments,
        }[url.drivername](options, hosts)
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


def _asyncpg_arguments(options: Mapping[str, Any], hosts: Sequence[Host] = ()) -> dict[str, Any]:
    arguments: dict[str, Any] = {"timeout": options.get("connect_timeout", 10.0)}
    if hosts:
        arguments["async_creator_fn"] = asyncpg_creator(hosts, options)
    if "application_name" in options:
        arguments["server_settings"] = {"application_name": options["application_name"]}
    if libpq := _libpq(options):
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
        "connect_timeout": max(1, round(options.get("connect_timeout", 10.0))),
        # As asyncpg does. The database or the role may have another default.
        "client_encoding": "utf8",
        **_libpq(options),
    }
    if hosts:
        # An empty port is the default.
        arguments["host"] = ",".join(host.name for host in hosts)
        arguments["port"] = ",".join(str(host.port or "") for host in hosts)
    if "application_name" in options:
        arguments["application_name"] = options["application_name"]
    if not options.get("prepared_statements", True):
        arguments["prepare_threshold"] = None
    return arguments
