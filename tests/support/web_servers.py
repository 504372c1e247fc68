"""Servers of web applications, in processes of their own."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM

__all__ = ["Server", "serving"]


@dataclass(frozen=True)
class Server:
    """A server that runs. Requests wait in its socket until it is ready."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def log_at_the_end(self) -> str:
        """Wait for a server that was told to stop, and return its log."""
        code, log = self.process.wait(60), self.log.read_text()
        # uvicorn sends itself the signal again.
        assert code in (0, -SIGTERM), f"exit code {code}\n{log}"
        return log


@contextmanager
def serving(command: list[str], folder: Path, environment: Mapping[str, str], log: Path) -> Iterator[Server]:
    """Run a server until the block ends.

    Args:
        command: The server's module and its arguments. ``{fd}`` stands for the descriptor of its socket.
        folder: Where it runs.
        environment: Its environment variables.
        log: The file of its output.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener, log.open("wb") as output:
        fd = listener.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", *(part.format(fd=fd) for part in command)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[fd],
        )
        try:
            yield Server(listener.getsockname()[1], process, log)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)
