"""Every HTTP client that tokenstore has an adapter for, behind one interface: one pooled client serves all calls."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import httpx
import httpx2
import requests

from support.sync_stores import ended_loop_thread
from tokenstore import AuthTokenStore, open_store
from tokenstore.integrations.aiohttp import StoreAuth as AiohttpAuth
from tokenstore.integrations.httpx import StoreAuth as HttpxAuth
from tokenstore.integrations.httpx2 import StoreAuth as Httpx2Auth
from tokenstore.integrations.requests import StoreAuth as RequestsAuth
from tokenstore.sync import AuthTokenStore as SyncAuthTokenStore
from tokenstore.sync import open_store as open_sync_store

__all__ = ["BODY", "CALLERS", "Call", "Caller", "Reply", "named_body"]

BODY = b"0123456789" * 20_000  # more than one chunk of any client
"""What the bodies ``bytes``, ``file``, ``multipart`` and ``generator`` contain."""


@dataclass(frozen=True)
class Call:
    """A request of a user. ``body`` names one of the caller's kinds of bodies."""

    url: str
    user: str = "alice"
    origins: Sequence[str] = ()
    body: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """A response. ``native`` is the library's object."""

    status: int
    body: bytes
    native: Any = field(repr=False)

    @property
    def user(self) -> Any:
        return json.loads(self.body)["user"]


class Caller(ABC):
    """A pooled client and a store of its kind."""

    bodies: ClassVar[tuple[str, ...]]
    """The kinds of bodies that can be sent again."""
    streams: ClassVar[tuple[str, ...]]
    """The kinds of bodies that cannot be sent again."""
    store: Any
    client: Any

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = ExitStack()

    @abstractmethod
    def open(self, **options: Any) -> None:
        """Open the store and the client."""

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def auth(self, call: Call) -> Any:
        """The adapter of the call."""

    @abstractmethod
    def on_store(self, use: Callable[[Any], Any]) -> Any:
        """Call a method of the store."""

    @abstractmethod
    def at_once(self, *calls: Call) -> list[Reply | BaseException]:
        """Send all requests at the same time."""

    def send(self, call: Call) -> Reply:
        [reply] = self.at_once(call)
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def file(self) -> Any:
        path = self.folder / "body"
        path.write_bytes(b"xyz" + BODY)
        file = self._files.enter_context(path.open("rb"))
        file.seek(3)  # not the whole file is sent
        return file


class _Async(Caller):
    store: AuthTokenStore

    def open(self, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._runner.get_loop()
        self.store = open_store("memory://", **options)
        self._runner.run(self._start())

    def close(self) -> None:
        self._runner.run(self._stop())
        self._runner.close()
        self._files.close()

    async def _start(self) -> None:
        await self.store.setup()
        self.client: Any = await self.new_client()

    async def _stop(self) -> None:
        await self.end_client()
        await self.store.aclose()

    def on_store(self, use: Callable[[AuthTokenStore], Any]) -> Any:
        async def main() -> Any:
            return await use(self.store)

        return self._runner.run(main())

    def at_once(self, *calls: Call) -> list[Reply | BaseException]:
        async def main() -> list[Reply | BaseException]:
            return await asyncio.gather(*map(self.sent, calls), return_exceptions=True)

        return self._runner.run(main())

    @abstractmethod
    async def new_client(self) -> Any: ...
    @abstractmethod
    async def end_client(self) -> None: ...
    @abstractmethod
    async def sent(self, call: Call) -> Reply: ...


class _Sync(Caller):
    store: SyncAuthTokenStore

    def open(self, **options: Any) -> None:
        self._ended = ExitStack()
        self._ended.enter_context(ended_loop_thread())
        self.store = open_sync_store("memory://", **options)
        self.store.setup()
        self.client: Any = self.new_client()

    def close(self) -> None:
        self.client.close()
        self.store.close()
        self._ended.close()
        self._files.close()

    def on_store(self, use: Callable[[SyncAuthTokenStore], Any]) -> Any:
        return use(self.store)

    def at_once(self, *calls: Call) -> list[Reply | BaseException]:
        def sent(call: Call) -> Reply | BaseException:
            try:
                return self.sent(call)
            except Exception as error:  # noqa: BLE001 - handed to the test
                return error

        with ThreadPoolExecutor(len(calls)) as threads:
            return list(threads.map(sent, calls))

    @abstractmethod
    def new_client(self) -> Any: ...
    @abstractmethod
    def sent(self, call: Call) -> Reply: ...


def _chunks() -> Iterator[bytes]:
    yield BODY[:1000]
    yield BODY[1000:]


async def _async_chunks() -> AsyncIterator[bytes]:
    for chunk in _chunks():
        yield chunk


class _Once:
    """An iterator that is no generator: iterating again gives nothing."""

    def __init__(self) -> None:
        self._chunks = _chunks()

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks


class _AsyncOnce:
    def __init__(self) -> None:
        self._chunks = _async_chunks()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._chunks


class _Pipe:
    """A file that cannot be rewound."""

    def __init__(self) -> None:
        self._rest = BODY

    def read(self, size: int = -1) -> bytes:
        size = len(self._rest) if size < 0 else size
        chunk, self._rest = self._rest[:size], self._rest[size:]
        return chunk

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self.read(65536):
            yield chunk


class _HttpxAsync(_Async):
    bodies = ("bytes", "json", "form", "multipart")
    streams = ("generator", "iterator", "multipart pipe")
    library: Any = httpx
    adapter: Any = HttpxAuth

    async def new_client(self) -> Any:
        return self.library.AsyncClient(trust_env=False, timeout=20, follow_redirects=True)

    async def end_client(self) -> None:
        await self.client.aclose()

    def auth(self, call: Call) -> Any:
        return self.adapter(self.store, "github", call.user, origins=call.origins, **call.options)

    async def sent(self, call: Call) -> Reply:
        arguments = named_body(self, call.body, content="content")
        method = "GET" if call.body is None else "POST"
        response = await self.client.request(method, call.url, auth=self.auth(call), **arguments)
        return Reply(response.status_code, response.content, response)


class _Httpx2Async(_HttpxAsync):
    library = httpx2
    adapter = Httpx2Auth


class _HttpxSync(_Sync):
    bodies = ("bytes", "json", "form", "file", "multipart")
    streams = ("generator", "iterator", "pipe", "multipart pipe")
    library: Any = httpx
    adapter: Any = HttpxAuth

    def new_client(self) -> Any:
        return self.library.Client(trust_env=False, timeout=20, follow_redirects=True)

    def auth(self, call: Call) -> Any:
        return self.adapter(self.store, "github", call.user, origins=call.origins, **call.options)

    def sent(self, call: Call) -> Reply:
        arguments = named_body(self, call.body, content="content")
        method = "GET" if call.body is None else "POST"
        response = self.client.request(method, call.url, auth=self.auth(call), **arguments)
        return Reply(response.status_code, response.content, response)


class _Httpx2Sync(_HttpxSync):
    library = httpx2
    adapter = Httpx2Auth


class _Requests(_Sync):
    bodies = ("bytes", "json", "form", "file", "multipart")
    streams = ("generator", "iterator", "pipe")

    def new_client(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = False
        return session

    def auth(self, call: Call) -> Any:
        return RequestsAuth(self.store, "github", call.user, origins=call.origins, **call.options)

    def sent(self, call: Call) -> Reply:
        arguments = named_body(self, call.body, content="data")
        method = "GET" if call.body is None else "POST"
        response = self.client.request(method, call.url, auth=self.auth(call), timeout=20, **arguments)
        return Reply(response.status_code, response.content, response)


class _Aiohttp(_Async):
    bodies = ("bytes", "json", "form", "file", "multipart")
    streams = ("generator", "iterator", "multipart pipe")

    async def new_client(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20))

    async def end_client(self) -> None:
        await self.client.close()

    def auth(self, call: Call) -> Any:
        return AiohttpAuth(self.store, "github", call.user, origins=call.origins, **call.options)

    async def sent(self, call: Call) -> Reply:
        arguments = named_body(self, call.body, content="data")
        method = "GET" if call.body is None else "POST"
        async with self.client.request(method, call.url, middlewares=(self.auth(call),), **arguments) as response:
            return Reply(response.status, await response.read(), response)


CALLERS: dict[str, type[Caller]] = {
    "httpx": _HttpxAsync,
    "httpx2": _Httpx2Async,
    "aiohttp": _Aiohttp,
    "httpx sync": _HttpxSync,
    "httpx2 sync": _Httpx2Sync,
    "requests": _Requests,
}


def named_body(caller: Caller, name: str | None, *, content: str) -> dict[str, Any]:
    """The arguments of a request with this kind of body; ``content`` is the library's argument for a raw one."""
    is_async = isinstance(caller, _Async)
    form = isinstance(caller, _Aiohttp)

    def multipart(file: Any) -> dict[str, Any]:
        if not form:
            return {"files": {"f": ("body", file)}}
        data = aiohttp.FormData()
        data.add_field("f", file, filename="body")
        return {"data": data}

    match name:
        case None:
            return {}
        case "bytes":
            return {content: BODY}
        case "json":
            return {"json": {"a": ["x"] * 1000}}
        case "form":
            return {"data": {"a": "x" * 1000}}
        case "file":
            # Without this header, httpx and old versions of httpx2 announce the length of the whole file.
            return {content: caller.file(), "headers": {"Content-Length": str(len(BODY))}}
        case "multipart":
            return multipart(caller.file())
        case "generator":
            return {content: _async_chunks() if is_async else _chunks()}
        case "iterator":
            return {content: _AsyncOnce() if is_async else _Once()}
        case "pipe":
            return {content: _Pipe()}
        case "multipart pipe":
            return multipart(_async_chunks() if form else _Pipe())
    raise AssertionError(name)
