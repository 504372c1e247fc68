"""URLs as providers of databases print them: what a store makes of each, or what its error says to write."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import event

from support import servers
from support.error_text import assert_silent
from tokenstore import BackendUnavailableError, ConfigurationError, Keyring, open_store
from tokenstore_sql.backend import SQLBackend

HOST = "someone:hunter2@db.example.com"
SUPABASE = "postgres.abcdef:hunter2@aws-0-eu-central-1.pooler.supabase.com:6543/postgres"
ASYNCPG, PSYCOPG = "postgresql+asyncpg", "postgresql+psycopg"


class _Stopped(Exception):
    pass


def driver_of(url: str, keyring: Keyring) -> str:
    backend = open_store(url, keyring=keyring)._backend
    assert isinstance(backend, SQLBackend)
    return backend._engine.url.drivername


def driver_arguments(url: str, keyring: Keyring) -> dict[str, Any]:
    """Return the arguments with which SQLAlchemy calls the driver, without a connection."""
    backend = open_store(url, keyring=keyring)._backend
    assert isinstance(backend, SQLBackend)
    seen: dict[str, Any] = {}

    @event.listens_for(backend._engine.sync_engine, "do_connect")
    def stop(dialect: object, record: object, arguments: object, keywords: dict[str, Any]) -> None:
        seen.update(keywords)
        raise _Stopped

    async def connect() -> None:
        async with backend._engine.connect():
            raise AssertionError

    with pytest.raises(_Stopped):
        asyncio.run(connect())
    return seen


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        # Heroku, Render, RDS, Azure
        (f"postgres://{HOST}:5432/d", ASYNCPG),
        (f"postgresql://{HOST}/d?sslmode=verify-full&sslrootcert=/srv/global-bundle.pem", ASYNCPG),
        (f"postgresql://some%40azure:hunter2@{HOST.partition('@')[2]}/d?sslmode=require", ASYNCPG),
        # An application's own, with a driver without asyncio
        (f"postgresql+psycopg2://{HOST}/d?sslmode=require", ASYNCPG),
        (f"postgresql+pg8000://{HOST}/d", ASYNCPG),
        (f"PostgreSQL+Psycopg2://{HOST}/d", ASYNCPG),
        (f"postgres+psycopg2://{HOST}/d", ASYNCPG),
        (f"mysql+pymysql://{HOST}/d?charset=utf8mb4", "mysql+aiomysql"),
        (f"mysql+mysqldb://{HOST}/d", "mysql+aiomysql"),
        (f"mysql+mysqlconnector://{HOST}/d?ssl=true", "mysql+aiomysql"),
        (f"mysql+asyncmy://{HOST}/d?charset=utf8mb4", "mysql+asyncmy"),
        (f"mariadb+pymysql://{HOST}/d", "mysql+aiomysql"),
        (f"mariadb+mariadbconnector://{HOST}/d", "mysql+aiomysql"),
        # Neon, Supabase
        (f"postgresql+psycopg://{HOST}/d?sslmode=require&channel_binding=require", PSYCOPG),
        (f"postgresql://{SUPABASE}?prepared_statements=false", ASYNCPG),
        # Google Cloud SQL
        ("postgresql://someone:hunter2@/d?host=/cloudsql/project:region:instance", ASYNCPG),
        ("mysql+pymysql://someone:hunter2@/d?unix_socket=/cloudsql/project:region:instance", "mysql+aiomysql"),
        # Files
        ("sqlite:////srv/tokens.db", "sqlite+aiosqlite"),
        ("sqlite+pysqlite:////srv/tokens.db", "sqlite+aiosqlite"),
    ],
)
def test_the_driver_of_a_url(url: str, driver: str, keyring: Keyring) -> None:
    assert driver_of(url, keyring) == driver


TLS = "write ssl=true, which requires TLS and verifies the server's certificate and host name, and ssl_ca if its"


@pytest.mark.parametrize(
    ("url", "error"),
    [
        # Neon, and Prisma's way to name a pooler
        (
            f"postgresql://{HOST}/d?sslmode=require&channel_binding=require",
            r"write postgresql\+psycopg://, or ssl",
        ),
        (f"postgresql+psycopg2://{HOST}/d?channel_binding=require", r"asyncpg has no channel binding"),
        (f"postgresql://{HOST}/d?channel_binding=maybe", "channel_binding must be disable or prefer or require"),
        (f"postgresql://{SUPABASE}?pgbouncer=true", "pgbouncer is no option of .*; write prepared_statements=false"),
        (
            f"postgresql://{HOST}/d?connection_limit=1",
            "connection_limit is no option of .*; write pool_size",
        ),
        (f"postgresql://{HOST}/d?sslmode=require&supa=base-pooler.x", "supa is no option of postgresql://; leave it"),
        (f"postgresql://{HOST}/d?options=project%3Dx", "options is no option of postgresql://; leave it out"),
        (f"postgresql://{HOST}/d?ssl=true", "ssl is no option of postgresql://; write sslmode=verify-full"),
        (f"postgresql+asyncpg://{HOST}/d?prepared_statement_cache_size=0", "; write prepared_statements=false"),
        (
            f"postgresql://{HOST}/d?sslmode=no-verify",
            "sslmode must be disable or .*or verify-ca or verify-full",
        ),
        (f"postgresql+psycopg://{HOST}/d?sslmode=REQUIRE", "sslmode must be disable or allow"),
        # PlanetScale, Aiven, DigitalOcean, TiDB, Azure
        (f'mysql://{HOST}/d?ssl={{"rejectUnauthorized":true}}', "ssl must be true or false; true requires TLS and ver"),
        (f"mysql://{HOST}/d?sslaccept=strict", f"sslaccept is no option of mysql://; {TLS}"),
        (f"mysql://{HOST}/d?ssl-mode=REQUIRED", f"ssl-mode is no option of mysql://; {TLS}"),
        (f"mysql+pymysql://{HOST}/d?ssl_mode=VERIFY_IDENTITY", f"ssl_mode is no option of mysql.pymysql://; {TLS}"),
        (f"mysql://{HOST}/d?sslmode=require", f"sslmode is no option of mysql://; {TLS}"),
        (f"mysql+pymysql://{HOST}/d?ssl_verify_cert=true&ssl_verify_identity=true", f"ssl_verify_cert is no.*; {TLS}"),
        (f"mysql+mysqlconnector://{HOST}/d?ssl_disabled=false", f"ssl_disabled is no option of .*; {TLS}"),
        (f"mysql://{HOST}/d?ssl-ca=ca.pem", "ssl-ca is no option of mysql://; write ssl_ca"),
        (f"mysql://{HOST}/d?charset=latin1", "charset must be utf8mb4"),
        (f"mysql+nosuch://{HOST}/d", r"no driver for mysql\+nosuch://; known schemes: mariadb, .*mysql\+asyncmy"),
        # Files
        ("sqlite:///file:/srv/tokens.db?uri=true", "uri is no option of sqlite://; write the path without file:"),
        ("sqlite:///tokens.db?check_same_thread=false", "check_same_thread is no option of sqlite://; leave it out"),
        ("sqlite:///tokens.db?timeout=5", "timeout is no option of sqlite://; write lock_timeout"),
    ],
)
def test_an_option_of_another_library_is_refused_with_what_to_write(url: str, error: str, keyring: Keyring) -> None:
    """No option is left out: it may be what the user relies on for TLS."""
    with pytest.raises(ConfigurationError, match=error) as caught:
        open_store(url, keyring=keyring)
    assert_silent(caught.value, "hunter2")


def test_an_option_of_another_library_is_refused_as_a_keyword_too(keyring: Keyring) -> None:
    foreign: dict[str, Any] = {"ssl_mode": "REQUIRED"}
    with pytest.raises(ConfigurationError, match=f"ssl_mode is no option of mysql://; {TLS}"):
        open_store(f"mysql://{HOST}/d", keyring=keyring, **foreign)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sslmode=require&channel_binding=require", {"sslmode": "require", "channel_binding": "require"}),
        ("sslmode=verify-full&sslrootcert=/srv/ca.pem", {"sslmode": "verify-full", "sslrootcert": "/srv/ca.pem"}),
        ("prepared_statements=false", {"prepare_threshold": None}),
    ],
)
def test_psycopg_gets_the_options_of_a_url(url: str, expected: dict[str, Any], keyring: Keyring) -> None:
    arguments = driver_arguments(f"postgresql+psycopg://{HOST}/d?{url}", keyring)
    assert arguments.items() >= expected.items()
    assert arguments["host"] == "db.example.com"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("sslmode=require", {"dsn": "postgresql://?sslmode=require"}),
        ("sslmode=require&channel_binding=prefer", {"dsn": "postgresql://?sslmode=require"}),
        ("prepared_statements=false", {"statement_cache_size": 0}),
    ],
)
@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_asyncpg_gets_the_options_of_a_url(scheme: str, query: str, expected: dict[str, Any], keyring: Keyring) -> None:
    arguments = driver_arguments(f"{scheme}://{SUPABASE}?{query}", keyring)
    assert arguments.items() >= expected.items()
    assert (arguments["user"], arguments["port"]) == ("postgres.abcdef", 6543)


@pytest.mark.postgres
def test_channel_binding_is_required_of_the_server(keyring: Keyring) -> None:
    """A server without TLS cannot bind, so psycopg sends it no proof of the password."""

    async def main() -> None:
        async with open_store(f"{servers.postgres().url('psycopg')}?channel_binding=require", keyring=keyring) as store:
            await store.setup()

    with pytest.raises(BackendUnavailableError, match=r"(?i)channel binding"):
        asyncio.run(main())
