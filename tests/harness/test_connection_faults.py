"""The faults themselves: they cut where they say, count alike in each run, and leave nothing behind."""

from __future__ import annotations

import asyncio
import sqlite3
import struct
from contextlib import suppress
from pathlib import Path

import pytest

from support.connection_faults import When, _MySQL, _Postgres, faulty
from support.database import Place
from support.faulty_stores import connected, count, place_of_the_write, two_ways
from support.matrix import Row, server_rows, shared_rows, sqlite_row
from support.polling import until
from support.tagged_tokens import load_tag, store_tag
from tokenstore import BackendUnavailableError, Keyring, open_store

BIG = "x" * 200_000


@shared_rows
def test_counting_is_the_same_in_each_run(row: Row, url: str, keyring: Keyring) -> None:
    """Whatever the size of what is sent, and however it is split on its way; what goes round does not count."""

    async def main() -> None:
        async with two_ways(url, keyring) as (faults, direct):
            first = await count(faults, direct, keyring)
            assert place_of_the_write(row, first) >= 0
            assert [await count(faults, direct, keyring, tag) for tag in ("new", "other", BIG)] == [first] * 3
            assert await load_tag(direct) == BIG
            with faults.counted() as statements:
                await store_tag(direct, "new")
            assert statements == []

    asyncio.run(main())


@server_rows
@pytest.mark.parametrize("when", ["before", "after"])
def test_silence_lasts_until_every_connection_is_cut(row: Row, url: str, when: When, keyring: Keyring) -> None:
    async def main() -> None:
        async with two_ways(url, keyring) as (faults, direct):
            write = place_of_the_write(row, await count(faults, direct, keyring))
            async with connected(faults, direct, keyring) as store:
                with faults.cut(write, when, "silence") as cut:
                    task = asyncio.create_task(store_tag(store, "new"))
                    await until(lambda: cut.happened)
                assert await load_tag(direct) == {"before": "old", "after": "new"}[when]
                assert not task.done()
                faults.cut_all()
                with pytest.raises(BackendUnavailableError):
                    await task
                assert await load_tag(store) == await load_tag(direct)

    asyncio.run(main())


@shared_rows
def test_refused_connections(row: Row, url: str, keyring: Keyring) -> None:
    async def main() -> None:
        async with two_ways(url, keyring) as (faults, direct), open_store(faults.url, keyring=keyring) as store:
            faults.refuse = True
            with pytest.raises(BackendUnavailableError):
                await store_tag(store, "new")
            assert await load_tag(direct) is None
            faults.refuse = False
            await store_tag(store, "new")
            assert await load_tag(direct) == "new"

    asyncio.run(main())


@shared_rows
def test_several_cuts_may_be_armed_and_each_counts_for_itself(row: Row, url: str, keyring: Keyring) -> None:
    async def main() -> None:
        async with two_ways(url, keyring) as (faults, direct), connected(faults, direct, keyring) as store:
            with faults.cut(0, "before") as first, faults.cut(1, "after") as second, faults.cut(1000, "after") as third:
                for _ in range(2):  # the second one meets the retry, or the next call
                    with suppress(BackendUnavailableError):
                        await store_tag(store, "new")
                assert (first.happened, second.happened, third.happened) == (True, True, False)
                assert first.statements == second.statements == third.statements
            with faults.counted() as statements:
                await store_tag(store, "new")
            assert statements
            assert first.statements == third.statements  # which ended with the block
            assert await load_tag(direct) == "new"

    asyncio.run(main())


def _message(kind: str, body: bytes = b"") -> bytes:
    return kind.encode() + struct.pack(">I", 4 + len(body)) + body


def _packet(number: int, body: bytes) -> bytes:
    return struct.pack("<I", len(body))[:3] + bytes([number]) + body


_LOG_IN = struct.pack(">II", 8, 3 << 16)
_READY = _message("Z", b"I")


@pytest.mark.parametrize(
    ("make", "turns"),
    [
        (
            _Postgres,
            [
                (_LOG_IN, None, _message("R") + _READY),
                (_message("P", b"name\0SELECT 1\0") + _message("H"), "PREPARE SELECT 1", _message("1")),
                (_message("B", b"\0name\0") + _message("E") + _message("S"), "SELECT 1", _message("2") + _READY),
                (_message("Q", b"COMMIT\0"), "COMMIT", _message("C", b"COMMIT\0") + _READY),
                (_message("X"), None, b""),
            ],
        ),
        (
            _MySQL,
            [
                (_packet(1, b"log-in"), None, _packet(2, b"\0")),
                (_packet(0, b"\x03COMMIT"), "COMMIT", _packet(1, b"\0\0")),
                (_packet(0, b"\x0e"), "COMMAND 14", _packet(1, b"\0\0")),
                (_packet(0, b"\x01"), None, b""),
            ],
        ),
    ],
)
def test_a_statement_and_its_reply_end_where_they_end(
    make: type[_Postgres | _MySQL], turns: list[tuple[bytes, str | None, bytes]]
) -> None:
    """Byte by byte: nothing is passed on before the statement is whole, or taken for the reply's end before it is."""
    wire = make()
    answers: list[bytes] = []  # of the proxy's own
    for request, statement, reply in turns:
        passed = [part for byte in request for part in wire.sent(bytes([byte]), answers.append)]
        assert passed == [(request, statement)]
        complete = [wire.received(bytes([byte])) for byte in reply]
        if statement:
            assert complete == [False] * (len(reply) - 1) + [True]
    assert answers == []


@server_rows
def test_a_server_that_is_not_there_is_not_there_behind_the_proxy(row: Row, url: str, keyring: Keyring) -> None:
    async def main() -> None:
        async with faulty(url) as faults:
            nobody = faults.url  # its port is nobody's once the proxy has ended
        async with faulty(nobody) as faults, open_store(faults.url, keyring=keyring) as store:
            with pytest.raises(BackendUnavailableError):
                await load_tag(store)

    asyncio.run(main())


@sqlite_row
def test_a_cut_read_leaves_nothing_open_in_sqlite(url: str, row: Row, keyring: Keyring) -> None:
    async def main() -> None:
        async with two_ways(url, keyring) as (faults, direct), connected(faults, direct, keyring) as store:
            with faults.counted() as statements:
                await load_tag(store)
            with faults.cut(len(statements) - 1, "after") as cut:
                assert await load_tag(store) == "old", "a read is sent again, over another connection"
            assert cut.happened
            await Place(row, url).until_idle()

    asyncio.run(main())


@pytest.mark.sqlite
def test_sqlite_is_itself_again_afterwards(tmp_path: Path, keyring: Keyring) -> None:
    real = sqlite3.connect

    async def main() -> None:
        async with faulty(f"sqlite:///{tmp_path / 'tokens.db'}"):
            assert sqlite3.connect is not real

    asyncio.run(main())
    assert sqlite3.connect is real
