"""The connection faults of the tests: they cut at the chosen statement, count reliably, and leave nothing open."""

from __future__ import annotations

import asyncio
import sqlite3
import struct
from contextlib import suppress
from pathlib import Path

import pytest

from support.connection_faults import When, _MySQL, _Postgres, faulty
from support.database import Place
from support.faulty_stores import connected, count, faulty_and_direct, index_of_write
from support.matrix import Row, server_rows, shared_rows, sqlite_row
from support.polling import until
from support.tagged_tokens import load_tag, store_tag
from tokenstore import BackendUnavailableError, Keyring, open_store

BIG = "x" * 200_000


@shared_rows
def test_the_same_statements_are_counted_in_each_run(row: Row, url: str, keyring: Keyring) -> None:
    """The count does not depend on the size of the data; statements of direct connections are not counted."""

    async def main() -> None:
        async with faulty_and_direct(url, keyring) as (faults, direct):
            first = await count(faults, direct, keyring)
            assert index_of_write(row, first) >= 0
            assert [await count(faults, direct, keyring, tag) for tag in ("new", "other", BIG)] == [first] * 3
            assert await load_tag(direct) == BIG
            with faults.counted() as statements:
                await store_tag(direct, "new")
            assert statements == []

    asyncio.run(main())


@server_rows
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_silent_cut_lasts_until_all_connections_are_cut(row: Row, url: str, when: When, keyring: Keyring) -> None:
    async def main() -> None:
        async with faulty_and_direct(url, keyring) as (faults, direct):
            write = index_of_write(row, await count(faults, direct, keyring))
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
def test_new_connections_are_refused_while_refuse_is_true(row: Row, url: str, keyring: Keyring) -> None:
    async def main() -> None:
        async with (
            faulty_and_direct(url, keyring) as (faults, direct),
            open_store(faults.url, keyring=keyring) as store,
        ):
            faults.refuse = True
            with pytest.raises(BackendUnavailableError):
                await store_tag(store, "new")
            assert await load_tag(direct) is None
            faults.refuse = False
            await store_tag(store, "new")
            assert await load_tag(direct) == "new"

    asyncio.run(main())


@shared_rows
def test_each_of_several_armed_cuts_counts_all_statements(row: Row, url: str, keyring: Keyring) -> None:
    async def main() -> None:
        async with faulty_and_direct(url, keyring) as (faults, direct), connected(faults, direct, keyring) as store:
            with faults.cut(0, "before") as first, faults.cut(1, "after") as second, faults.cut(1000, "after") as third:
                for _ in range(2):  # the second cut happens at the retry, or at the next call
                    with suppress(BackendUnavailableError):
                        await store_tag(store, "new")
                assert (first.happened, second.happened, third.happened) == (True, True, False)
                assert first.statements == second.statements == third.statements
            with faults.counted() as statements:
                await store_tag(store, "new")
            assert statements
            assert first.statements == third.statements  # cuts stop counting at the end of their block
            assert await load_tag(direct) == "new"

    asyncio.run(main())


def _message(kind: str, body: bytes = b"") -> bytes:
    return kind.encode() + struct.pack(">I", 4 + len(body)) + body


def _packet(number: int, body: bytes) -> bytes:
    return struct.pack("<I", len(body))[:3] + bytes([number]) + body


_LOG_IN = struct.pack(">II", 8, 3 << 16)
_READY = _message("Z", b"I")


@pytest.mark.parametrize(
    ("make", "exchanges"),
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
def test_the_parsers_find_the_end_of_each_statement_and_reply(
    make: type[_Postgres | _MySQL], exchanges: list[tuple[bytes, str | None, bytes]]
) -> None:
    """Data arrives byte by byte; a statement is passed on when it is complete, and a reply ends with its last byte."""
    wire = make()
    answers: list[bytes] = []  # responses of the proxy itself
    for request, statement, reply in exchanges:
        passed = [part for byte in request for part in wire.sent(bytes([byte]), answers.append)]
        assert passed == [(request, statement)]
        complete = [wire.received(bytes([byte])) for byte in reply]
        if statement:
            assert complete == [False] * (len(reply) - 1) + [True]
    assert answers == []


@server_rows
def test_the_proxy_passes_on_that_a_server_is_unreachable(row: Row, url: str, keyring: Keyring) -> None:
    async def main() -> None:
        async with faulty(url) as faults:
            unused = faults.url  # no process listens on this port after the proxy has ended
        async with faulty(unused) as faults, open_store(faults.url, keyring=keyring) as store:
            with pytest.raises(BackendUnavailableError):
                await load_tag(store)

    asyncio.run(main())


@sqlite_row
def test_a_cut_read_leaves_no_transaction_open_in_sqlite(url: str, row: Row, keyring: Keyring) -> None:
    async def main() -> None:
        async with faulty_and_direct(url, keyring) as (faults, direct), connected(faults, direct, keyring) as store:
            with faults.counted() as statements:
                await load_tag(store)
            with faults.cut(len(statements) - 1, "after") as cut:
                assert await load_tag(store) == "old", "the read was not retried on another connection"
            assert cut.happened
            await Place(row, url).until_idle()

    asyncio.run(main())


@pytest.mark.sqlite
def test_sqlite_faults_restore_sqlite3_connect(tmp_path: Path, keyring: Keyring) -> None:
    real = sqlite3.connect

    async def main() -> None:
        async with faulty(f"sqlite:///{tmp_path / 'tokens.db'}"):
            assert sqlite3.connect is not real

    asyncio.run(main())
    assert sqlite3.connect is real
