"""The private servers of the tests: they stop with the process, use their own databases, and dump binary columns."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support import servers
from support.server_processes import ServerUnavailable
from support.servers import MYSQL_URL, POSTGRES_URL

CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from support import server_processes, servers
server = servers.postgres()
print(server.database, server._process and server_processes.sandbox().folder, flush=True)
sys.stdin.read()
"""


def start_child(**environment: str) -> subprocess.Popen[str]:
    """Start another test process that uses PostgreSQL until its standard input is closed."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(Path(servers.__file__).parent.parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != POSTGRES_URL} | environment,
    )


def first_line(child: subprocess.Popen[str]) -> list[str]:
    assert child.stdout is not None
    line = child.stdout.readline().split()
    assert len(line) == 2, "the child could not start its server"
    return line


@pytest.mark.postgres
@pytest.mark.skipif(bool(os.environ.get(POSTGRES_URL)), reason="the tests use a named server and start none")
def test_a_killed_process_leaves_no_server_behind() -> None:
    with start_child() as child:
        _, folder = first_line(child)
        [pid] = [int(path.name) for path in Path(folder, "pids").iterdir()]
        os.kill(pid, 0)
        child.kill()
    deadline = time.monotonic() + 30
    while Path(folder).exists():
        assert time.monotonic() < deadline, f"{folder} is still there"
        time.sleep(0.05)
    # In a container the first process may leave dead processes as zombies; a zombie has an empty command line.
    command = Path(f"/proc/{pid}/cmdline")
    assert not (command.exists() and command.read_bytes())


@pytest.mark.postgres
def test_on_a_named_server_each_process_creates_and_drops_its_own_database() -> None:
    server = servers.postgres()
    with start_child(**{POSTGRES_URL: server.url()}) as child:
        database, _ = first_line(child)
        present = server.execute(f"SELECT 1 FROM pg_database WHERE datname = '{database}'")
        child.communicate()
    assert database not in {servers.NAME, server.database}
    assert present
    assert not server.execute(f"SELECT 1 FROM pg_database WHERE datname = '{database}'")


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        (POSTGRES_URL, "postgresql://somebody:hunter2@127.0.0.1:1/x"),
        (MYSQL_URL, "mysql://somebody:hunter2@127.0.0.1:1/x"),
    ],
)
def test_the_error_for_an_unreachable_named_server_names_the_variable_without_the_password(
    variable: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, url)
    with pytest.raises(ServerUnavailable, match=variable) as caught:
        servers._named(variable)
    assert "127.0.0.1:1" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(servers.postgres, marks=pytest.mark.postgres),
        pytest.param(servers.pgbouncer, marks=pytest.mark.postgres),
        pytest.param(servers.mariadb, marks=pytest.mark.mysql),
        pytest.param(servers.mysql, marks=pytest.mark.mysql),
    ],
)
def test_a_dump_contains_the_decoded_bytes_of_binary_columns(start: Callable[[], servers.Server | None]) -> None:
    if (server := start()) is None:
        assert servers.why_no_mysql(), "MySQL is absent without a reason"
        return
    secret = b"\x00\xff'\\\n a token in the clear"
    postgres = server.kind == "postgresql"
    server.execute(f"CREATE TABLE seen (bytes {'bytea' if postgres else 'blob'})")
    try:
        literal = f"'\\x{secret.hex()}'" if postgres else f"0x{secret.hex()}"
        server.execute(f"INSERT INTO seen VALUES ({literal})")
        assert secret in server.dump()
    finally:
        server.execute("DROP TABLE seen")
