"""The processes of the tests' database servers: folders, ports, and a guard that ends them with the tests."""

from __future__ import annotations

import atexit
import functools
import os
import pwd
import random
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError

from support import debian

T = TypeVar("T")
START_DEADLINE = 60.0
ServerUnavailable = debian.Unavailable


@functools.cache
def exit_stack() -> ExitStack:
    """Return the callbacks that run when this process exits, last added first."""
    stack, owner = ExitStack(), os.getpid()
    # A forked child also runs its copy of the exit handlers; it must not stop its parent's servers.
    atexit.register(lambda: stack.close() if os.getpid() == owner else None)
    return stack


# `cat` ends when the test process ends, also when it is killed.
_GUARD = 'cat; cd "$1/pids" || exit; kill -QUIT *; sleep 1; kill -KILL *; cd /; rm -rf "$1"'


class _Sandbox:
    """The temporary folder of all servers, and a guard process that cleans up if this process is killed."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tokenstore-"))
        # The accounts of the servers must be able to enter their own folders inside.
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
        # Otherwise a forked child would keep the guard's standard input open, and the guard waiting.
        os.register_at_fork(after_in_child=self.guard.stdin.close)
        exit_stack().callback(self.close)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.guard.communicate()


sandbox = functools.cache(_Sandbox)


class ServerFolder:
    """A server's folder and account. If the tests run as root, the server runs as another account."""

    def __init__(self, name: str, account: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=sandbox().folder))
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
        debian.run(command, cwd=self.folder, **self.identity)


class Process:
    """The process of a server. It can be stopped and started again."""

    def __init__(self, command: Sequence[str], home: ServerFolder, stop: Signals, kill: Signals) -> None:
        self._command, self._home, self._stop = command, home, stop
        self._popen: subprocess.Popen[Any] | None = None
        exit_stack().callback(lambda: self.stop(kill))

    def start(self, ready: Callable[[], T]) -> T:
        """Start the process, call `ready` until it succeeds, and return its result.

        Raises:
            ServerUnavailable: The process ended, or `ready` did not succeed within START_DEADLINE seconds.
        """
        log = self._home.folder / "log"
        with log.open("ab") as output:
            # A new session, so that Ctrl-C is sent only to the tests.
            popen = self._popen = subprocess.Popen(
                self._command,
                cwd=self._home.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                **self._home.identity,
            )
        (sandbox().pids / str(popen.pid)).touch()
        deadline = time.monotonic() + START_DEADLINE
        while True:
            try:
                return ready()
            except DBAPIError as error:
                ended = popen.poll() is not None
                if ended or time.monotonic() > deadline:
                    self.stop(SIGKILL)
                    problem = "ended at once" if ended else f"did not answer within {START_DEADLINE:.0f} s"
                    said = f"{problem} ({error.orig}); its log:\n{debian.tail(log.read_bytes())}"
                    raise ServerUnavailable(f"{shlex.join(self._command)}\n{said}") from None
            time.sleep(0.02)

    def signal(self, signal: Signals) -> None:
        """Send a signal that does not end the process."""
        assert self._popen is not None
        self._popen.send_signal(signal)

    def stop(self, signal: Signals | None = None) -> None:
        if (popen := self._popen) is None:
            return
        popen.send_signal(signal or self._stop)
        try:
            popen.wait(15)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()
        # Forget the process id now: the system may give it to another process, which the guard would kill.
        (sandbox().pids / str(popen.pid)).unlink(missing_ok=True)
        self._popen = None


def free_port() -> int:
    """Return a free port below the range of outgoing connections, which could take the port during a restart."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
