"""The private servers themselves: what other tests believe of them, and that nothing of them is left behind."""

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
    """Another test process that has PostgreSQL, until its input ends."""
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
@pytest.mark.skipif(bool(os.environ.get(POSTGRES_URL)), reason="may not start a server of its own")
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
    # A container's first process may not collect the dead at once: only what runs a program counts.
    command = Path(f"/proc/{pid}/cmdline")
    assert not (command.exists() and command.read_bytes())


@pytest.mark.postgres
def test_on_a_named_server_each_process_has_a_database_of_its_own_and_drops_it() -> None:
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
def test_a_named_server_that_cannot_be_reached_is_a_clear_failure(
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
def test_a_dump_shows_what_binary_columns_hold(start: Callable[[], servers.Server | None]) -> None:
    if (server := start()) is None:
        assert servers.why_no_mysql(), "what is absent says why"
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
