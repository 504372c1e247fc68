"""The database that a URL names, and how to connect to it with its driver alone, without tokenstore."""

from __future__ import annotations

import importlib
import ssl
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from sqlalchemy import URL, event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

__all__ = ["Database", "databases", "private_urls"]

# SQLAlchemy's name for each scheme that tokenstore accepts. Other schemes have no floors and no peers.
_DRIVERS: Final = {
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
    "postgresql+psycopg": "postgresql+psycopg",
    "mysql": "mysql+aiomysql",
    "mysql+aiomysql": "mysql+aiomysql",
    "mysql+asyncmy": "mysql+asyncmy",
    "mariadb": "mysql+aiomysql",
    "mariadb+aiomysql": "mysql+aiomysql",
    "mariadb+asyncmy": "mysql+asyncmy",
}
_LIBPQ: Final = ("host", "passfile", "sslcert", "sslcrl", "sslkey", "sslmode", "sslrootcert", "target_session_attrs")


@dataclass(frozen=True)
class Database:
    """A database to measure.

    Attributes:
        url: A URL that tokenstore accepts.
        name: The database's name in tables and files; contains neither host nor password.
    """

    url: str
    name: str

    @property
    def scheme(self) -> str:
        """The URL's scheme."""
        return self.url.partition("://")[0].lower()

    @property
    def dialect(self) -> str:
        """``postgresql``, ``mysql`` or ``sqlite``; empty if only tokenstore can open the URL."""
        return _DRIVERS.get(self.scheme, "").partition("+")[0]

    @property
    def driver(self) -> str:
        """The name of the driver's package; empty if only tokenstore can open the URL."""
        return _DRIVERS.get(self.scheme, "").partition("+")[2]

    @property
    def one_process(self) -> bool:
        """Whether only the process that stored the rows can read them."""
        return self.scheme == "memory"

    def without(self, *options: str) -> str:
        """Return the URL, including its password, without these options in its query."""
        return make_url(self.url).difference_update_query(options).render_as_string(hide_password=False)

    def path(self) -> str:
        """Return the path of SQLite's file."""
        return str(make_url(self.url).database)

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for the driver's ``connect``."""
        url = make_url(self.url)
        arguments = {"host": url.host, "port": url.port, "user": url.username, "password": url.password}
        if self.driver == "asyncpg":
            arguments["database"] = url.database
        elif self.driver == "psycopg":
            arguments["dbname"] = url.database
        else:
            arguments["db"] = url.database
        return {name: value for name, value in arguments.items() if value is not None} | self._options(url)

    def _options(self, url: URL) -> dict[str, Any]:
        """Return the URL's options that the driver needs to connect, as its keyword arguments."""
        query = {name: str(value) for name, value in url.query.items()}
        libpq: dict[str, Any] = {name: query[name] for name in _LIBPQ if name in query}
        unprepared = query.get("prepared_statements", "true").lower() in ("false", "0", "no", "off")
        if self.driver == "asyncpg":
            found: dict[str, Any] = {"dsn": f"postgresql://?{urlencode(libpq)}"} if libpq else {}
            return found | ({"statement_cache_size": 0} if unprepared else {})
        if self.driver == "psycopg":
            return {**libpq} | ({"prepare_threshold": None} if unprepared else {})
        found = {"unix_socket": query["unix_socket"]} if "unix_socket" in query else {}
        if query.keys() & {"ssl", "ssl_ca", "ssl_cert", "ssl_key"}:
            context = ssl.create_default_context(cafile=query.get("ssl_ca"))
            if "ssl_cert" in query:
                context.load_cert_chain(query["ssl_cert"], query.get("ssl_key"))
            found["ssl"] = context
        return found

    def engine(self, pool_size: int, **options: Any) -> AsyncEngine:
        """Make a SQLAlchemy engine for peers that need one; on SQLite with the same durability as tokenstore."""
        url = make_url(self.url).set(drivername=f"{self.dialect}+{self.driver}", query={})
        bounds: dict[str, Any] = {"pool_size": pool_size, "max_overflow": 0, "pool_timeout": 60}
        if self.dialect != "sqlite":
            return create_async_engine(url, connect_args=self._options(make_url(self.url)), **bounds, **options)
        engine = create_async_engine(url, connect_args={"timeout": 30}, **bounds, **options)

        @event.listens_for(engine.sync_engine, "connect")
        def _durable(connection: Any, _record: object) -> None:
            cursor = connection.cursor()
            for pragma in ("journal_mode = WAL", "synchronous = FULL"):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

        return engine


def databases(urls: Sequence[str]) -> list[Database]:
    """Give each URL's database a unique name."""
    found: list[Database] = []
    for url in urls:
        scheme = url.partition("://")[0].lower()
        name = _DRIVERS.get(scheme, scheme).removesuffix("+aiosqlite")
        taken = sum(database.name.partition("#")[0] == name for database in found)
        found.append(Database(url, f"{name}#{taken + 1}" if taken else name))
    return found


def private_urls(folder: str) -> list[str]:
    """Return URLs of SQLite in a folder, and of the tests' private servers, which stop when this process ends."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    servers: Any = importlib.import_module("support.servers")
    return [f"sqlite:///{folder}/t.db", servers.postgres().url("asyncpg"), servers.mariadb().url("asyncmy")]
