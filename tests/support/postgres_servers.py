"""PostgreSQL servers of single tests, in addition to the server that the tests share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from signal import SIGINT, SIGQUIT

from support import servers
from support.server_processes import ServerFolder
from support.server_programs import postgres_programs, provide


def programs() -> Path:
    """Return the folder with PostgreSQL's programs, which are installed if necessary."""
    return provide(postgres_programs, "PostgreSQL", servers.POSTGRES_PACKAGES, None, "postgres")


def start_postgres(
    *, standby_of: servers.Server | None = None, files: dict[str, str] | None = None, **settings: str
) -> servers.Server:
    """Start another server with its own files and settings. It stops when the test process ends.

    Args:
        standby_of: The server, started here, of which it becomes a hot standby.
        files: Files for its folder.
        settings: Settings of the server.
    """
    folder = programs()
    home = ServerFolder("postgresql", "postgres")
    server = servers.Server(kind="postgresql", port=0, password=token_hex(16))
    for name, text in (files or {}).items():
        home.write(name, text)
    if standby_of is None:
        home.write("password", server.password)
        options = ("--pgdata=data", "--auth=scram-sha-256", "--pwfile=password", f"--username={server.user}")
        home.run(str(folder / "initdb"), *options, "--no-locale", "--encoding=UTF8", "--no-sync")
    else:
        server = replace(standby_of, _process=None)
        url = server.url(database="postgres")
        command = ("--pgdata=data", f"--dbname={url}", "--checkpoint=fast", "--no-sync", "--write-recovery-conf")
        home.run(str(folder / "pg_basebackup"), *command)
    # A standby copies pg_hba.conf, which allows replication from this machine.
    all_settings = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "shared_buffers": "16MB",
        "fsync": "off",
        **settings,
    }
    return servers._serve(
        replace(server, database="postgres"),
        home,
        lambda port: [
            str(folder / "postgres"), "-D", "data", f"--port={port}",
            *(f"--{name}={value}" for name, value in all_settings.items()),
        ],
        stop=SIGINT,
        kill=SIGQUIT,
    )  # fmt: skip
