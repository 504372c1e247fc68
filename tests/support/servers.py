"""Private database servers for the tests, without Docker. They start at first use and stop when this process ends.

`postgres()`, `mariadb()`, `mysql()` and `pgbouncer()` each start one server per process, on a free port of the loopback
interface and in a temporary folder. To use running servers instead, name them in TOKENSTORE_TEST_POSTGRES_URL and
TOKENSTORE_TEST_MYSQL_URL.
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
from support.server_processes import Process, ServerFolder, ServerUnavailable, T, exit_stack, free_port
from support.server_programs import any_mysqld, dump_tool, is_mariadb, mysql_tree, postgres_programs, provide, which

P = ParamSpec("P")
POSTGRES_URL = "TOKENSTORE_TEST_POSTGRES_URL"
MYSQL_URL = "TOKENSTORE_TEST_MYSQL_URL"
NAME = "tokenstore_test"
MAX_CONNECTIONS = 500
POSTGRES_PACKAGES = ["postgresql"]
# The -core package does not start a system service.
_MARIADB_PACKAGES = ["mariadb-server-core", "mariadb-client"]
# Not UTC, so that tests find code that reads the server's clock in local time.
POSTGRES_ZONE, MYSQL_ZONE = "Asia/Kathmandu", "+05:45"


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server, with this process's database on it."""

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
        """Return the URL with the password, for a driver of SQLAlchemy; without `driver` in the plain form."""
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
        """Run one statement in autocommit on a new connection, and return its rows."""
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
        """Return the output of the database's dump tool, followed by the decoded values of binary columns.

        The tools write binary columns in hex, where a search for a token would find nothing.
        """
        if not self._dump:
            raise ServerUnavailable(f"no dump tool for {self.kind} found: install its client programs")
        secret = {"PGPASSWORD": self.password, "MYSQL_PWD": self.password}
        text = debian.run(self._dump, env=os.environ | secret)
        return b"\n".join([text, *map(_unhex, re.findall(rb"(?:\\|\b0)x([0-9A-Fa-f]+)", text))])

    def restart(self) -> None:
        """Shut the server down, which closes all connections, and start it again on the same port."""
        if self._process is None:
            raise ServerUnavailable("the tests cannot restart a server that was named by URL")
        self._process.stop()
        self._process.start(self._ask_version)

    def _ask_version(self) -> str:
        [[version]] = self.execute("SHOW server_version" if self.kind == "postgresql" else "SELECT version()")
        return str(version)


_lock = threading.RLock()


def _once(start: Callable[P, T]) -> Callable[P, T]:
    """Cache the result or the failure of `start` for each set of arguments."""
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
    """Return PostgreSQL: the server named by URL, or one started from the machine, a wheel or Debian's package."""
    if named := _named(POSTGRES_URL):
        return named
    programs = provide(postgres_programs, "PostgreSQL", POSTGRES_PACKAGES, POSTGRES_URL, "postgres")
    home = ServerFolder("postgresql", "postgres")
    server = Server(kind="postgresql", port=0, password=token_hex(16))
    home.write("password", server.password)
    home.run(
        *(str(programs / "initdb"), "--pgdata=data", "--auth=scram-sha-256", f"--username={NAME}", "--pwfile=password"),
        *("--no-locale", "--encoding=UTF8", "--no-sync", "--no-instructions"),
    )
    settings = {
        "listen_addresses": server.host,
        "unix_socket_directories": str(home.folder),
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
        # Not SIGKILL, after which the server's shared memory would remain.
        stop=SIGINT,
        kill=SIGQUIT,
    )
    admin.execute(f"CREATE DATABASE {NAME}")
    return _with_dump(replace(admin, database=NAME), [str(programs / "pg_dump")])


@_once
def mariadb() -> Server:
    """Return the server named by URL, or start MariaDB from the machine or Debian's package, or else MySQL."""
    if named := _named(MYSQL_URL):
        return named
    mysqld = provide(any_mysqld, "MariaDB", _MARIADB_PACKAGES, MYSQL_URL, "mysql")
    return start_mariadb() if is_mariadb(mysqld) else _mysql()


def start_mariadb(*options: str) -> Server:
    """Start another MariaDB with these options. It stops when this process ends."""
    mysqld = provide(_any_mariadbd, "MariaDB", _MARIADB_PACKAGES, None, "mysql")
    install = which("mariadb-install-db", "mysql_install_db")
    if install is None:
        raise ServerUnavailable(f"{mysqld} has no mariadb-install-db: reinstall MariaDB's server package")
    setup = [install, "--no-defaults", "--skip-test-db"]
    start = [mysqld, "--no-defaults", *options]
    return _start_mysqld("mariadb", start, setup, dump_tool("mariadb-dump", "mysqldump"))


def _any_mariadbd() -> str | None:
    found = any_mysqld()
    return found if found is not None and is_mariadb(found) else None


def mysql() -> Server | None:
    """Return Oracle's MySQL, from the machine or unpacked from Debian sid; None if neither works."""
    return None if why_no_mysql() else _mysql()


def why_no_mysql() -> str:
    """Return why `mysql()` is None; an empty string if it is not None."""
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
        raise ServerUnavailable(f"{MYSQL_URL} names a server, so no other MySQL is tested")
    if (mysqld := any_mysqld(oracle=True)) is not None:
        start = [mysqld, "--no-defaults"]
        return _start_mysqld("mysql", start, [*start, "--initialize-insecure"], dump_tool("mysqldump", "mariadb-dump"))
    tree = mysql_tree()
    usr, loader = tree / "usr", debian.loader_of(tree)
    run = [str(loader), "--library-path", str(loader.parent)]
    # As root, because another account cannot read root's cache folder.
    start = [*run, str(usr / "sbin/mysqld"), "--no-defaults", f"--basedir={usr}", "--user=root"]
    return _start_mysqld(
        "mysql", start, [*start, "--initialize-insecure"], [*run, str(usr / "bin/mysqldump")], account="root"
    )


@_once
def _pgbouncer(server: Server, pool_size: int) -> Server:
    program = provide(lambda: which("pgbouncer"), "pgbouncer", ["pgbouncer"], None, "postgres")
    home = ServerFolder("pgbouncer", "postgres")
    home.write("users", f'"{server.user}" "{server.password}"\n')

    def command(port: int) -> list[str]:
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": port,
            "unix_socket_dir": "",
            # With a plaintext password, pgbouncer can log in to the server whichever method the server asks for.
            "auth_type": "scram-sha-256",
            "auth_file": "users",
            "pool_mode": "transaction",
            "default_pool_size": pool_size,
            "max_client_conn": MAX_CONNECTIONS,
            # Drivers send this parameter by default. All others are refused, because pgbouncer would ignore them.
            "ignore_startup_parameters": "extra_float_digits",
        }
        lines = [f"{name} = {value}" for name, value in settings.items()]
        databases = f"[databases]\n* = host={server.host} port={server.port}\n"
        home.write("pgbouncer.ini", databases + "\n".join(["[pgbouncer]", *lines, ""]))
        return [program, "pgbouncer.ini"]

    # The dump command still connects to the server directly: it changes session settings, which would stay on a
    # connection that pgbouncer shares between clients.
    return _serve(replace(server, host="127.0.0.1"), home, command, stop=SIGKILL, kill=SIGKILL)


def _start_mysqld(
    kind: Literal["mariadb", "mysql"],
    start: list[str],
    setup: list[str],
    dump: list[str],
    account: str = "mysql",
) -> Server:
    home = ServerFolder(kind, account)
    options = [*mysqld_options(home), "--skip-log-bin", f"--init-file={home.folder / 'init.sql'}"]
    if kind == "mysql":
        options += ["--mysqlx=OFF", "--secure-file-priv=NULL"]
    server = Server(kind=kind, port=0, password=token_hex(16))
    home.write("init.sql", initial_accounts(server))
    home.run(*setup, *_mysqld_folders(home))
    server = _serve(server, home, lambda port: [*start, *options, f"--port={port}"], stop=SIGTERM, kill=SIGKILL)
    return _with_dump(server, dump)


def mysqld_options(home: ServerFolder) -> list[str]:
    """Return the options of every server of MariaDB and MySQL."""
    return [
        *_mysqld_folders(home),
        f"--socket={home.folder / 'socket'}",
        f"--pid-file={home.folder / 'pid'}",
        "--bind-address=127.0.0.1",
        "--skip-name-resolve",
        f"--max-connections={MAX_CONNECTIONS}",
        "--innodb-buffer-pool-size=64M",
        "--innodb-flush-log-at-trx-commit=0",
        "--innodb-doublewrite=OFF",
        "--performance-schema=OFF",
        f"--default-time-zone={MYSQL_ZONE}",
    ]


def _mysqld_folders(home: ServerFolder) -> list[str]:
    # A private tmpdir, because a server deletes all temporary tables that it finds there when it starts.
    return [f"--datadir={home.folder / 'data'}", f"--tmpdir={home.folder}"]


def initial_accounts(server: Server) -> str:
    """Return a file that a server of MariaDB or MySQL runs at each start, before it accepts connections."""
    return (
        f"CREATE DATABASE IF NOT EXISTS {NAME} CHARACTER SET utf8mb4;\n"
        f"CREATE USER IF NOT EXISTS {NAME} IDENTIFIED BY '{server.password}';\n"
        f"GRANT ALL ON *.* TO {NAME} WITH GRANT OPTION;\n"
    )


def _named(variable: str) -> Server | None:
    """Return the server that the environment variable names, with a new database that is dropped at exit."""
    if not (text := os.environ.get(variable)):
        return None
    kind: Literal["postgresql", "mysql"] = "postgresql" if variable == POSTGRES_URL else "mysql"
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ServerUnavailable(f"{variable} is not a URL: set {kind}://user:password@host:port/database") from None
    if url.get_backend_name() not in {kind, "mariadb" if kind == "mysql" else kind} or url.query:
        raise ServerUnavailable(f"{variable} must be {kind}://user:password@host:port/database, without options")
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
            f"{variable} names {url.render_as_string()}, but creating a database there failed: {error.orig}\n"
            f"Correct the server or the URL, or unset {variable} so that the tests start their own server."
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


def _serve(
    server: Server, home: ServerFolder, command: Callable[[int], list[str]], *, stop: Signals, kill: Signals
) -> Server:
    """Start `command` on a free port; if another process takes the port first, try another one."""
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
