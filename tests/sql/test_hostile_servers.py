"""What a hostile server says moves no terminal's cursor and ends no line of a log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

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
