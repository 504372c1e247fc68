"""An HTTP endpoint that sends scripted responses and records the requests."""

from __future__ import annotations

import json
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

FORM = "application/x-www-form-urlencoded"


@dataclass
class Received:
    """A request that the endpoint received."""

    line: str
    headers: dict[str, str]
    body: str

    @property
    def form(self) -> dict[str, str]:
        pairs = parse_qsl(self.body, keep_blank_values=True, strict_parsing=True)
        assert len(dict(pairs)) == len(pairs)  # RFC 6749 section 3.2: no parameter twice
        return dict(pairs)


Step = bytes | Callable[[socket.socket], None]


@dataclass
class Endpoint:
    """Answers each request with the next step of its script, and repeats the last step."""

    steps: deque[Step] = field(default_factory=deque)
    received: list[Received] = field(default_factory=list)
    arrived: threading.Event = field(default_factory=threading.Event)
    stopping: threading.Event = field(default_factory=threading.Event)
    reads: bool = True
    connections: int = 0

    def __post_init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.url = f"http://{self.address}/token"
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def script(self, *steps: Step) -> None:
        self.steps, self.received, self.connections, self.reads = deque(steps), [], 0, True
        self.arrived.clear()

    def hang(self, _: socket.socket) -> None:
        self.stopping.wait(20)

    def stop(self) -> None:
        self.stopping.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()

    def _serve(self) -> None:
        while not self.stopping.is_set():
            with suppress(OSError):
                connection, _ = self.listener.accept()
                with connection:
                    connection.settimeout(20)
                    self.connections += 1
                    while self._serve_request(connection):
                        pass

    def _serve_request(self, connection: socket.socket) -> bool:
        """Serve one request. Returns whether another one may follow on this connection."""
        if self.reads:
            with connection.makefile("rb") as stream:
                lines = []
                while (line := stream.readline()) not in (b"\r\n", b""):
                    lines.append(line.decode("latin-1").strip())
                if not lines:
                    return False
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
                body = stream.read(int(headers.get("content-length", 0))).decode()
            self.received.append(Received(lines[0], headers, body))
            self.arrived.set()
        step = self.steps.popleft() if len(self.steps) > 1 else self.steps[0]
        if not isinstance(step, bytes):
            step(connection)
            return False
        connection.sendall(step)
        if b"connection: close" not in step.lower():
            return True
        # Closing a socket with unread input would reset the connection, and the client could lose the response.
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
        return False


def answer(body: object = None, status: int = 200, /, **headers: str) -> bytes:
    """Make an HTTP response; a body that is not bytes is encoded as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {
        "Content-Type": "application/json",
        "Content-Length": str(len(data)),
        "Connection": "close",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"HTTP/1.1 {status} Whatever\r\n{head}\r\n".encode("latin-1") + data


def hang_up(_: socket.socket) -> None:
    pass


def until_the_client_gives_up(connection: socket.socket) -> None:
    with suppress(ConnectionError):
        while connection.recv(65536):
            pass
