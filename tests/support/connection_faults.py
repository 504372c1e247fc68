"""Connections that are cut at a chosen statement: before the server gets it, or after it ran, so its reply is lost.

    async with faulty(url) as faults, open_store(faults.url, keyring=keyring) as store:
        await store.load_tokens(...)  # connects first, so that each run sends the same statements afterwards
        with faults.counted() as statements:
            await cycle(store)

Then, with a new store for each `at` of `range(len(statements))` and each `when`:

        with faults.cut(at, when="after") as cut:
            await cycle(store)  # the statement is executed, and the connection is cut before the reply
        assert cut.happened

Each run needs a new store: drivers prepare a statement when a connection executes it first or often, so the number of
statements depends on earlier ones. The URL that was passed to `faulty` still leads directly to the database, without
faults; use it to look at a row.
"""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any, ClassVar, Literal, Self, TypeVar, cast
from unittest import mock
from weakref import WeakSet

from sqlalchemy import make_url

__all__ = ["Cut", "FaultProxy", "Faults", "FaultySQLite", "How", "When", "faulty"]

T = TypeVar("T")
When = Literal["before", "after"]
How = Literal["reset", "end", "silence"]

_SHOWN = 120  # characters of a statement that are kept, enough to recognise it


@dataclass
class Cut:
    """One cut of a connection.

    Attributes:
        at: The statement at which to cut, counted from 0 since the cut was armed, over all connections.
        when: `before` the server gets the statement, or `after` the server has answered it.
        how: What the client sees: a reset, the end of the stream, or (`silence`) nothing. With `silence` the server's
            session also stays open until the client gives up.
        statements: The beginnings of the statements sent since the cut was armed.
        happened: Whether the connection has been cut.
    """

    at: int
    when: When
    how: How
    statements: list[str] = field(default_factory=list)
    happened: bool = False


class Faults(ABC):
    """A URL of a database whose connections can be cut.

    A statement is any round trip after the log-in, also a ping, SET, BEGIN, COMMIT or a driver's PREPARE.

    Attributes:
        url: The URL with faults, for ``open_store``.
        refuse: Whether new connections are refused.
        ways: The supported values of :data:`How`.
    """

    ways: ClassVar[tuple[How, ...]] = ("reset", "end", "silence")

    def __init__(self, url: str) -> None:
        self.url = url
        self.refuse = False
        self._armed: list[Cut] = []
        self._lock = threading.Lock()  # SQLite's statements run in threads

    @abstractmethod
    async def __aenter__(self) -> Self: ...

    @abstractmethod
    async def __aexit__(self, *_: object) -> None: ...

    @abstractmethod
    def through(self, url: str) -> str:
        """Return another URL of the same server (for SQLite, of any file) with these faults."""

    @abstractmethod
    def cut_all(self) -> None:
        """Cut all open connections, as a restart of the server does. New connections work."""

    @contextmanager
    def cut(self, at: int, when: When, how: How = "reset") -> Iterator[Cut]:
        """Cut the connection once, at the ``at``-th statement from now on.

        Several cuts can be armed at the same time; each counts all statements, also those of retries after another cut.
        The count is only predictable if tasks send their statements one after the other.
        """
        assert how in self.ways, f"{type(self).__name__} does not support how={how!r}"
        cut = Cut(at, when, how)
        self._armed = [*self._armed, cut]
        try:
            yield cut
        finally:
            self._armed = [other for other in self._armed if other is not cut]

    @contextmanager
    def counted(self) -> Iterator[list[str]]:
        """Collect the statements that are sent in the block, without cutting a connection."""
        with self.cut(-1, "before") as cut:
            yield cut.statements

    def reached(self, statement: str) -> Cut | None:
        """Count a statement. Returns the cut that is due at this statement."""
        with self._lock:
            for cut in self._armed:
                cut.statements.append(statement[:_SHOWN])
            return next((cut for cut in self._armed if len(cut.statements) == cut.at + 1), None)


def faulty(url: str) -> Faults:
    """Make the faults for a URL's database; they are in effect inside ``async with``."""
    return FaultySQLite(url) if make_url(url).get_backend_name() == "sqlite" else FaultProxy(url)


# ---- Servers: parsers that only find the end of each statement and of its reply


class _Postgres:
    """PostgreSQL's protocol. A message has a type, except the client's first ones, and a length that counts itself."""

    _ENCRYPT = (80877103, 80877104)  # requests for TLS or GSSAPI encryption; encrypted messages could not be parsed

    def __init__(self) -> None:
        self._up, self._down, self._unit = bytearray(), bytearray(), bytearray()
        self._typed = self._logged_in = self._synced = False
        self._label, self._prepared = "", dict[bytes, str]()

    def sent(self, data: bytes, answer: Callable[[bytes], None]) -> Iterator[tuple[bytes, str | None]]:
        """Split the client's data into parts for the server, each with its statement; None: it is not a statement."""
        self._up += data
        while message := _first(self._up, ">I", int(self._typed), int(self._typed)):
            if not self._typed:
                if int.from_bytes(message[4:8], "big") in self._ENCRYPT:
                    answer(b"N")
                else:
                    self._typed = True
                    yield message, None
                continue
            # Keep Parse, Bind, Describe, Execute and Close until Sync or Flush: the server would act on each at once.
            kind = message[:1]
            self._unit += message
            name, _, rest = message[5:].partition(b"\0")
            if kind == b"P":
                self._prepared[name] = _text(rest.partition(b"\0")[0])
                self._label = f"PREPARE {self._prepared[name]}"
            elif kind in b"BQ":
                self._label = _text(name) if kind == b"Q" else self._prepared.get(rest.partition(b"\0")[0], "EXECUTE")
            if kind not in b"PBDEC":
                self._synced = kind != b"H"
                yield bytes(self._unit), self._label if self._logged_in and kind in b"QSH" else None
                self._unit.clear()
                self._label = "SYNC"

    def received(self, data: bytes) -> bool:
        """Whether the last statement's reply is complete with this data."""
        self._down += data
        kinds = [message[:1] for message in iter(lambda: _first(self._down, ">I", 1, 1), b"")]
        self._logged_in = self._logged_in or b"Z" in kinds
        # Only ReadyForQuery says that the statement is committed. After a Flush there is none, and no commit.
        return b"Z" in kinds if self._synced else bool(kinds)


class _MySQL:
    """MySQL's protocol: packets have a length and a number, which is 0 at the beginning of a command."""

    _QUIT, _QUERY, _PREPARE, _EXECUTE, _CLOSE = 1, 3, 22, 23, 25

    def __init__(self) -> None:
        self._up, self._down = bytearray(), bytearray()
        self._preparing, self._prepared = "", dict[bytes, str]()

    def sent(self, data: bytes, answer: Callable[[bytes], None]) -> Iterator[tuple[bytes, str | None]]:
        self._up += data
        while packet := _first(self._up, "<I", 0, 4):
            # Packets of the log-in, and later packets of a command of over 16 MiB, have other numbers than 0.
            command = packet[4] if packet[3] == 0 else self._QUIT
            label = f"COMMAND {command}"
            if command == self._QUERY:
                label = _text(packet[5:])
            elif command == self._PREPARE:
                self._preparing = _text(packet[5:])
                label = f"PREPARE {self._preparing}"
            elif command == self._EXECUTE:
                label = self._prepared.get(packet[5:9], "EXECUTE")
            yield packet, None if command in (self._QUIT, self._CLOSE) else label

    def received(self, data: bytes) -> bool:
        # The first packet says that the statement was executed and, in autocommit, committed. So the end of a result
        # set does not have to be found.
        self._down += data
        packets = list(iter(lambda: _first(self._down, "<I", 0, 4), b""))
        if packets and self._preparing:
            if packets[0][4] == 0:
                self._prepared[packets[0][5:9]] = self._preparing
            self._preparing = ""
        return len(packets) > 0


def _first(buffer: bytearray, length: Literal[">I", "<I"], at: int, more: int) -> bytes:
    """Take the first message off a buffer; returns b"" while the message is incomplete."""
    message = b""
    if len(buffer) >= at + 4:
        (size,) = struct.unpack_from(length, buffer, at)
        size = more + (size & 0xFFFFFF if length == "<I" else size)  # MySQL's length has three bytes
        if len(buffer) >= size:
            message = bytes(buffer[:size])
            del buffer[:size]
    return message


def _text(data: bytes) -> str:
    return data[: 4 * _SHOWN].decode(errors="replace")


class FaultProxy(Faults):
    """A proxy on the loopback interface, in this event loop, for clients in any process. It refuses encryption."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        parsed = make_url(url)
        postgres = parsed.get_backend_name() == "postgresql"
        self.wire: type[_Postgres | _MySQL] = _Postgres if postgres else _MySQL
        self.server = (parsed.host or "127.0.0.1", parsed.port or (5432 if postgres else 3306))
        self._connections: dict[_ProxiedConnection, asyncio.Task[None]] = {}
        self._swap: tuple[bytes, bytes] | None = None
        self.swapped = 0

    @contextmanager
    def swapping(self, old: bytes, new: bytes) -> Iterator[None]:
        """Replace ``old`` with ``new``, of the same length, in all that clients send, as an attacker could.

        ``swapped`` counts the replacements.
        """
        assert len(old) == len(new), "old and new differ in length, which would break the messages' lengths"
        self._swap, self.swapped = (old, new), 0
        try:
            yield
        finally:
            self._swap = None

    def altered(self, part: bytes) -> bytes:
        """Return the bytes to send to the server instead of the client's."""
        if self._swap is None:
            return part
        self.swapped += part.count(self._swap[0])
        return part.replace(*self._swap)

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = self.through(self.url)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        self.refuse = True  # for connections that were accepted, but for which _accept has not been called yet
        self.cut_all()
        await asyncio.gather(*self._connections.values())
        await self._listener.wait_closed()

    def through(self, url: str) -> str:
        host, port = self._listener.sockets[0].getsockname()
        return make_url(url).set(host=host, port=port).render_as_string(hide_password=False)

    def cut_all(self) -> None:
        for connection in self._connections:
            connection.cut("reset")

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            _reset(writer)
        else:
            connection = _ProxiedConnection(self, reader, writer)
            self._connections[connection] = asyncio.create_task(connection.run())


class _ProxiedConnection:
    """A client's connection to the proxy, and the proxy's connection to the server for it."""

    def __init__(self, proxy: FaultProxy, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self._proxy, self._wire = proxy, proxy.wire()
        self._reader = reader
        self._writers = [client]
        self._met: Cut | None = None
        self._silent = False

    async def run(self) -> None:
        """Pass data on until either side closes. There is no flow control, because tests send little."""
        try:
            with suppress(OSError):
                reader, server = await asyncio.open_connection(*self._proxy.server)
                self._writers.append(server)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._send(server))
                    group.create_task(self._receive(reader))
        finally:
            for writer in self._writers:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()

    def cut(self, how: How) -> None:
        if self._met is not None:
            self._met.happened = True
        if how == "reset":
            _reset(self._writers[0])
        for writer in self._writers if how != "silence" else ():
            writer.close()
        self._silent = True

    async def _send(self, server: asyncio.StreamWriter) -> None:
        async for data in _chunks(self._reader):
            for part, statement in self._wire.sent(data, self._writers[0].write):
                if statement is not None and not self._silent:
                    self._met = self._proxy.reached(statement)
                if self._met is not None and self._met.when == "before":
                    self.cut(self._met.how)
                if not self._silent:
                    server.write(self._proxy.altered(part))
        server.close()

    async def _receive(self, server: asyncio.StreamReader) -> None:
        async for data in _chunks(server):
            complete = self._wire.received(data)
            if self._met is None and not self._silent:
                self._writers[0].write(data)
            elif self._met is not None and complete:  # no byte of the reply was passed on
                self.cut(self._met.how)
        if not self._silent:
            self.cut("end")


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            yield data


def _reset(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):  # it is closed already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


# ---- SQLite


class FaultySQLite(Faults):
    """Another spelling of a SQLite file's path; this process's connections to it can fail with a disk I/O error."""

    ways = ("reset",)

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._detour = f"through-{token_hex(4)}"
        self._connections = WeakSet[_Connection]()

    async def __aenter__(self) -> Self:
        self.url = self.through(self.url)
        self._connect = sqlite3.connect
        self._patch = mock.patch.object(sqlite3, "connect", self._connect_through)
        self._patch.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._patch.stop()

    def through(self, url: str) -> str:
        parsed = make_url(url)
        file = Path(parsed.database or "").absolute()
        (file.parent / self._detour).mkdir(exist_ok=True)
        return parsed.set(database=str(file.parent / self._detour / ".." / file.name)).render_as_string()

    def cut_all(self) -> None:
        for connection in self._connections:
            connection.lost = True  # checked by the next statement: only the connection's own thread may act on it

    def _connect_through(self, file: Any, *args: Any, factory: type = sqlite3.Connection, **options: Any) -> Any:
        if self._detour not in Path(file).parts:
            return self._connect(file, *args, factory=factory, **options)
        if self.refuse:
            raise _error("unable to open database file", "SQLITE_CANTOPEN")
        faulty_class: Any = type("Faulty", (_Connection, factory), {"faults": self})
        connection: _Connection = self._connect(file, *args, factory=faulty_class, **options)
        self._connections.add(connection)
        return connection


class _Connection(sqlite3.Connection):
    """Mixed into the class that the caller asks for. On failure it rolls back the transaction, as SQLite does."""

    faults: ClassVar[Faults]
    lost = False

    def cursor(self, factory: object = None) -> Any:
        return super().cursor(_Cursor)

    def execute(self, *args: Any) -> Any:
        return self.cursor().execute(*args)

    def commit(self) -> None:
        return self.carry_out("COMMIT", super().commit) if self.in_transaction else None

    def rollback(self) -> None:
        return self.carry_out("ROLLBACK", super().rollback) if self.in_transaction else None

    def carry_out(self, statement: str, action: Callable[[], T]) -> T:
        cut = None if self.lost else self.faults.reached(statement)
        if cut is None and not self.lost:
            return action()
        if cut is not None:
            if cut.when == "after":
                with suppress(sqlite3.Error):  # the statement's own error is also a reply that gets lost
                    action()
            self.lost = cut.happened = True
        super().rollback()
        raise _error("disk I/O error", "SQLITE_IOERR")


class _Cursor(sqlite3.Cursor):
    def execute(self, statement: str, parameters: Any = ()) -> Any:
        connection = cast(_Connection, self.connection)
        execute = super().execute
        return connection.carry_out(statement, lambda: execute(statement, parameters))


def _error(message: str, name: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(message)
    error.sqlite_errorname, error.sqlite_errorcode = name, getattr(sqlite3, name)
    return error
