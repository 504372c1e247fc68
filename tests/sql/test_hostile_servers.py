"""A hostile server moves no terminal's cursor, ends no line of a log, and gets no file of the client."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from support.command_line import process
from tokenstore import BackendError, Keyring, open_store

WORDS = "\x1b[2J\x1b]0;title\x07 no\r\nERROR forged \x9b1m \u202egnp"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def _mysql(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Refuse, in place of a greeting, with error 1045."""
    packet = b"\xff" + (1045).to_bytes(2, "little") + b"#28000" + WORDS.encode()
    writer.write(len(packet).to_bytes(3, "little") + b"\0" + packet)


async def _postgres(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Refuse the session, after TLS was declined, with a code that no server should have."""
    size = int.from_bytes(await reader.readexactly(4), "big")
    if size == 8:  # a request for TLS
        await reader.readexactly(4)
        writer.write(b"N")
        size = int.from_bytes(await reader.readexactly(4), "big")
    await reader.readexactly(size - 4)
    fields = [("S", "FATAL"), ("V", "FATAL"), ("C", "28\x1b[1"), ("M", WORDS)]
    body = b"".join(name.encode() + text.encode() + b"\0" for name, text in fields) + b"\0"
    writer.write(b"E" + (len(body) + 4).to_bytes(4, "big") + body)


@asynccontextmanager
async def _serving(serve: Serve) -> AsyncIterator[int]:
    """A server on a port of its own."""

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
            await writer.drain()
            writer.write_eof()
            await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()

    server = await asyncio.start_server(once, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize(
    ("scheme", "serve"),
    [
        pytest.param("mysql+aiomysql", _mysql, marks=pytest.mark.mysql),
        pytest.param("mysql+asyncmy", _mysql, marks=pytest.mark.mysql),
        pytest.param("postgresql+asyncpg", _postgres, marks=pytest.mark.postgres),
        pytest.param("postgresql+psycopg", _postgres, marks=pytest.mark.postgres),
    ],
)
def test_control_characters_of_a_server_are_escaped(
    scheme: str, serve: Serve, keyring: Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    """In the error, in logs, and in what the command line prints."""
    caplog.set_level(logging.INFO, logger="tokenstore")

    async def main() -> None:
        async with _serving(serve) as port:
            url = f"{scheme}://someone:password@127.0.0.1:{port}/db?connect_timeout=5"
            async with open_store(url, keyring=keyring) as store:
                with pytest.raises(BackendError) as caught:
                    await store.load_tokens("github", "u1")
            done = await asyncio.to_thread(process, "list", url=url)
        assert str(caught.value).isprintable()
        assert (caught.value.code or "").isprintable()
        assert "\\x1b[" in str(caught.value), "the words are shown"
        assert done.err.removesuffix("\n").isprintable()
        assert done.err.startswith("error: ")

    asyncio.run(main())
    assert all(record.getMessage().isprintable() for record in caplog.records)


def _mysql_packet(number: int, content: bytes) -> bytes:
    return len(content).to_bytes(3, "little") + bytes([number]) + content


def _greeting() -> bytes:
    """Of a server with the capabilities that the drivers need, and without TLS."""
    capabilities = 0x8_A20D  # long passwords, long flags, a database, protocol 4.1, transactions, named plugins
    scramble = b"a" * 20
    head = b"\x0a" + b"8.0.40\0" + bytes(4) + scramble[:8] + b"\0" + (capabilities & 0xFFFF).to_bytes(2, "little")
    tail = (capabilities >> 16).to_bytes(2, "little") + bytes([21]) + bytes(10) + scramble[8:] + b"\0"
    return head + bytes([45]) + (2).to_bytes(2, "little") + tail + b"mysql_native_password\0"


@pytest.mark.mysql
@pytest.mark.parametrize("scheme", ["mysql+aiomysql", "mysql+asyncmy"])
def test_a_server_that_asks_for_a_file_does_not_get_it(scheme: str, keyring: Keyring, tmp_path: Path) -> None:
    """In place of a result it sends the request of LOAD DATA LOCAL INFILE."""
    file = tmp_path / "keys"
    file.write_text("a secret of the client")
    received = bytearray()
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        writer.write(_mysql_packet(0, _greeting()))
        while True:
            header = await reader.readexactly(4)
            packet = await reader.readexactly(int.from_bytes(header[:3], "little"))
            received.extend(packet)
            if b"SELECT" in packet:
                asked += 1
                writer.write(_mysql_packet(header[3] + 1, b"\xfb" + str(file).encode()))
            else:
                writer.write(_mysql_packet(header[3] + 1, b"\0\0\0\x02\0\0\0"))

    async def main() -> None:
        async with _serving(serve) as port:
            url = f"{scheme}://someone:password@127.0.0.1:{port}/db?connect_timeout=5&statement_timeout=2"
            async with open_store(url, keyring=keyring) as store:
                with pytest.raises(BackendError):
                    await store.load_tokens("github", "u1")

    asyncio.run(main())
    assert asked > 0
    assert b"secret" not in received
