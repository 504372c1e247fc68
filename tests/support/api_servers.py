"""An API on the loopback interface that takes a provider's access tokens, and records every request."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from tokenstore.testing.provider import StrictRotatingProvider

__all__ = ["Api", "ApiAnswer", "ApiRequest", "serving"]


@dataclass(frozen=True)
class ApiRequest:
    """A request that an API received."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def token(self) -> str | None:
        """The value of the header ``Authorization``."""
        return self.headers.get("Authorization")

    @property
    def proof(self) -> str | None:
        """The value of the header ``DPoP``."""
        return self.headers.get("DPoP") or self.headers.get("dpop")


ApiAnswer = tuple[int, Mapping[str, str], bytes]


@dataclass
class Api:
    """The API. ``/who`` needs a token and tells its user, and ``/redirect/STATUS?to=URL`` redirects.

    Attributes:
        provider: Issues the tokens.
        origin: Where the API is.
        received: All requests, in the order in which they arrived.
        answers: Fixed answers of other paths.
        gate: Is called before ``/who`` is answered.
    """

    provider: StrictRotatingProvider
    origin: str = ""
    received: list[ApiRequest] = field(default_factory=list)
    answers: dict[str, ApiAnswer] = field(default_factory=dict)
    gate: Callable[[], object] = lambda: None

    def tokens(self, path: str = "") -> list[str | None]:
        """The headers ``Authorization`` of all requests for a path."""
        return [request.token for request in self.received if request.path.startswith(path)]

    def answer(self, request: ApiRequest) -> ApiAnswer:
        url = urlsplit(request.path)
        if url.path.startswith("/redirect/"):
            return int(url.path.rpartition("/")[2]), {"Location": parse_qs(url.query)["to"][0]}, b""
        if url.path in self.answers:
            return self.answers[url.path]
        assert url.path == "/who"
        self.gate()
        return self._who(request)

    def _who(self, request: ApiRequest) -> ApiAnswer:
        """Let the provider check the token, as an API does."""
        url = self.origin + urlsplit(request.path).path
        headers = {name.lower(): value for name, value in request.headers.items()}
        reply = self.provider.check_access(request.method, url, headers)
        return reply.status, reply.headers, json.dumps(reply.body).encode()


@contextmanager
def serving(provider: StrictRotatingProvider) -> Iterator[Api]:
    """Serve an API until the block ends."""
    api = Api(provider)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 20

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):  # a client may close a connection at any time
                super().handle()

        def _handle(self) -> None:
            request = ApiRequest(self.command, self.path, dict(self.headers.items()), self._body())
            with lock:
                api.received.append(request)
            status, headers, body = api.answer(request)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_POST = _handle  # noqa: N815 - the names that the base class calls

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    api.origin = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        thread.join()
        server.server_close()  # waits for the threads of connections, which end with the clients
