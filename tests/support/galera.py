"""A private Galera cluster of three MariaDB nodes, on free ports of the loopback interface.

The nodes stop with this process, like the other servers of the tests.
"""

from __future__ import annotations

import os
import time
from functools import partial
from secrets import token_hex
from signal import SIGKILL

from support import servers
from support.server_processes import ServerFolder, ServerUnavailable, free_port
from support.server_programs import galera_files, provide, which

_NODES = 3
# Seconds until a node has copied the data of another one and takes part. The state transfer alone sleeps for seconds.
_JOIN_DEADLINE = 60.0
_PROVIDER_OPTIONS = {
    # A node that does not answer for so long is expelled from the cluster.
    "evs.suspect_timeout": "PT3S",
    "evs.inactive_timeout": "PT6S",
    "gcache.size": "16M",
}


def start_galera() -> list[servers.Server]:
    """Start a cluster, and return its nodes when all of them take part."""
    mysqld = provide(servers._any_mariadbd, "MariaDB", servers._MARIADB_PACKAGES, None, "mysql")
    install = which("mariadb-install-db", "mysql_install_db")
    if install is None:
        raise ServerUnavailable(f"{mysqld} has no mariadb-install-db: reinstall MariaDB's server package")
    files = galera_files()
    group_ports = [free_port() for _ in range(_NODES)]
    server = servers.Server(kind="mariadb", port=0, password=token_hex(16))
    nodes: list[servers.Server] = []
    for group_port in group_ports:
        home = ServerFolder("galera", "mysql")
        if not nodes:
            home.write("init.sql", servers.initial_accounts(server))
            home.run(install, "--no-defaults", "--skip-test-db", f"--datadir={home.folder / 'data'}")
        else:
            home.run("mkdir", "data")
        command = [
            # The server finds the programs of the state transfer by PATH.
            *("env", f"PATH={files}{os.pathsep}{os.environ.get('PATH', '')}", f"LD_LIBRARY_PATH={files}"),
            *(mysqld, "--no-defaults", *servers.mysqld_options(home)),
            # What Galera requires.
            *("--binlog-format=ROW", "--innodb-autoinc-lock-mode=2"),
            *("--wsrep-on=ON", f"--wsrep-provider={files / 'libgalera_smm.so'}", "--wsrep-sst-method=rsync"),
            *(f"--wsrep-cluster-name={home.folder.parent.name}", "--wsrep-node-address=127.0.0.1"),
            *(f"--wsrep-node-name={group_port}", f"--wsrep-sst-receive-address=127.0.0.1:{free_port()}"),
            f"--wsrep-provider-options={_provider_options(group_port)}",
        ]
        if nodes:
            members = ",".join(f"127.0.0.1:{port}" for port in group_ports)
            command.append(f"--wsrep-cluster-address=gcomm://{members}")
        else:
            command += ["--wsrep-cluster-address=gcomm://", f"--init-file={home.folder / 'init.sql'}"]
        node = servers._serve(server, home, partial(_with_port, command), stop=SIGKILL, kill=SIGKILL)
        nodes.append(node)
        until_synced(node, len(nodes))
    return nodes


def _with_port(command: list[str], port: int) -> list[str]:
    return [*command, f"--port={port}"]


def _provider_options(group_port: int) -> str:
    ist_port = free_port()
    options = {
        "base_host": "127.0.0.1",
        "base_port": group_port,
        "gmcast.listen_addr": f"tcp://127.0.0.1:{group_port}",
        "ist.recv_addr": f"127.0.0.1:{ist_port}",
        "ist.recv_bind": f"127.0.0.1:{ist_port}",
        **_PROVIDER_OPTIONS,
    }
    return ";".join(f"{name}={value}" for name, value in options.items())


def until_synced(node: servers.Server, size: int) -> None:
    """Wait until a node takes part in a cluster of so many nodes."""
    query = "SHOW STATUS WHERE variable_name IN ('wsrep_local_state_comment', 'wsrep_cluster_size')"
    deadline = time.monotonic() + _JOIN_DEADLINE
    while True:
        if (found := {str(value) for _, value in node.execute(query)}) == {"Synced", str(size)}:
            return
        if time.monotonic() > deadline:
            raise ServerUnavailable(f"a node of Galera did not join within {_JOIN_DEADLINE:.0f} s: {found}")
        time.sleep(0.05)
