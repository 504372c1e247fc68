"""The faults themselves: they cut where they say, count alike in each run, and leave nothing behind."""

from __future__ import annotations

import asyncio
import sqlite3
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from support.connection_faults import Faults, How, When, _MySQL, _Postgres, faulty
from support.database import Place, source_of
from support.matrix import ROWS, Row, params, shared_rows
from support.polling import until
from tokenstore import AuthTokenStore, BackendUnavailableError, Keyring, open_store
from tokenstore.records import TokenKey

_DATABASES = [row for row in ROWS if row.shared]
server_rows = pytest.mark.parametrize("row", params(names=[row.name for row in _DATABASES if row.mark != "sqlite"]))
each_way = pytest.mark.parametrize(
    ("row", "when", "how"),
    [
        pytest.param(row, when, how, id=f"{row.name}-{when}-{how}", marks=getattr(pytest.mark, row.mark))
        for row in _DATABASES
        for when in ("before", "after")
        for how in (("reset",) if row.mark == "sqlite" else ("reset", "end"))
    ],
)
BIG = "x" * 200_000


async def _store(store: AuthTokenStore, tag: str) -> None:
    await store.store_tokens("github", "u1", tag, None, datetime.now(UTC) + timedelta(hours=1))


async def _tag(store: AuthTokenStore) -> str | None:
    record = await store.load_tokens("github", "u1")
    return None if record is None else record["access_token"]


@asynccontextmanager
async def _two_ways(url: str, keyring: Keyring) -> AsyncIterator[tuple[Faults, AuthTokenStore]]:
    """The faults before a table, and a store that goes round them."""
    async with open_store(url, keyring=keyring) as direct, faulty(url) as faults:
        await direct.setup()
        yield faults, direct


@asynccontextmanager
async def _connected(faults: Faults, direct: AuthTokenStore, keyring: Keyring) -> AsyncIterator[AuthTokenStore]:
    """A new store that goes through the faults, with a connection, over a row that holds "old"."""
    await _store(direct, "old")
    async with open_store(faults.url, keyring=keyring) as store:
        assert await _tag(store) == "old"
        yield store
        assert source_of(store).in_use == 0


async def _count(faults: Faults, direct: AuthTokenStore, keyring: Keyring, tag: str = "new") -> list[str]:
    async with _connected(faults, direct, keyring) as store:
        with faults.counted() as statements:
            await _store(store, tag)
    return statements


def _write(row: Row, statements: list[str]) -> int:
    """Which statement commits the write: on a server, the write itself."""
    [write] = [at for at, text in enumerate(statements) if text.startswith("INSERT")]
    return write


@shared_rows
def test_counting_is_the_same_in_each_run(row: Row, url: str, keyring: Keyring) -> None:
    """Whatever the size of what is sent, and however it is split on its way; what goes round does not count."""

    async def main() -> None:
        async with _two_ways(url, keyring) as (faults, direct):
            first = await _count(faults, direct, keyring)
            assert _write(row, first) >= 0
            assert [await _count(faults, direct, keyring, tag) for tag in ("new", "other", BIG)] == [first] * 3
            assert await _tag(direct) == BIG
            with faults.counted() as statements:
                await _store(direct, "new")
            assert statements == []

    asyncio.run(main())


@each_way
def test_a_write_that_is_cut_at_each_statement(row: Row, url: str, when: When, how: How, keyring: Keyring) -> None:
    """Before the write it has not happened, after it has, whatever the caller is told; the store goes on working."""

    async def main() -> None:
        async with _two_ways(url, keyring) as (faults, direct):
            clean = await _count(faults, direct, keyring)
            write = _write(row, clean)
            for at, statement in enumerate(clean):
                async with _connected(faults, direct, keyring) as store:
                    told = "new"
                    with faults.cut(at, when, how) as cut:
                        try:
                            await _store(store, "new")
                        except BackendUnavailableError:
                            told = "old" if at < write or (at == write and when == "before") else "new"
                            assert await _tag(direct) == told, (at, statement)
                        else:
                            assert at != write, "nobody may be told that this write went well"
                    assert cut.happened
                    assert cut.statements[: at + 1] == clean[: at + 1]
                    assert await _tag(direct) == told, (at, statement)
                    if row.mark == "sqlite" and statement == "COMMIT":
                        with suppress(BackendUnavailableError):  # from a connection that should not have been kept
                            await _tag(store)
                    assert await _tag(store) == told
                    await _store(store, "later")
                    assert await _tag(direct) == "later"

    asyncio.run(main())


@server_rows
@pytest.mark.parametrize("when", ["before", "after"])
def test_silence_lasts_until_every_connection_is_cut(row: Row, url: str, when: When, keyring: Keyring) -> None:
    async def main() -> None:
        async with _two_ways(url, keyring) as (faults, direct):
            write = _write(row, await _count(faults, direct, keyring))
            async with _connected(faults, direct, keyring) as store:
                with faults.cut(write, when, "silence") as cut:
                    task = asyncio.create_task(_store(store, "new"))
                    await until(lambda: cut.happened)
                assert await _tag(direct) == {"before": "old", "after": "new"}[when]
                assert not task.done()
                faults.cut_all()
                with pytest.raises(BackendUnavailableError):
                    await task
                assert await _tag(store) == await _tag(direct)

    asyncio.run(main())


@shared_rows
def test_cutting_all_connections(row: Row, url: str, keyring: Keyring) -> None:
    """Dead connections are replaced before anything is sent over them; a read that meets one is sent again."""

    async def main() -> None:
        async with _two_ways(url, keyring) as (faults, direct), _connected(faults, direct, keyring) as store:
            faults.cut_all()
            assert await _tag(store) == "old"
            await _store(store, "new")
            assert await _tag(direct) == "new"

    asyncio.run(main())


async def _list(store: AuthTokenStore) -> int:
    return len([entry async for entry in store.list_tokens()])


async def _get_two(store: AuthTokenStore) -> int:
    rows = await store._backend.get([TokenKey("github", "u1"), TokenKey("github", "nobody")])
    return len([row for row in rows if row is not None])


async def _refresh_due(store: AuthTokenStore) -> int:
    async def refresh(_: object) -> dict[str, object]:
        return {"access_token": "fresh", "expires_in": 3600}

    return len([result async for result in store.refresh_due(within=86400, provider="github", refresh=refresh)])


@pytest.mark.parametrize("call", [_list, _get_two, _refresh_due])
@each_way
def test_a_read_of_several_rows_that_meets_a_dead_connection_is_sent_again(
    row: Row, url: str, keyring: Keyring, call: Callable[[AuthTokenStore], Awaitable[int]], when: When, how: How
) -> None:
    """An idle connection that looked alive: its first statement finds out that it is dead."""

    async def main() -> None:
        async with _two_ways(url, keyring) as (faults, direct), _connected(faults, direct, keyring) as store:
            expiry = datetime.now(UTC) + timedelta(hours=1)
            await direct.store_tokens("github", "u1", "old", "refresh", expiry)
            with faults.cut(0, when, how) as cut:
                assert await call(store) == 1
            assert cut.happened

    asyncio.run(main())


@shared_rows
def test_refused_connections(row: Row, url: str, keyring: Keyring) -> None:
    async def main() -> None:
        async with _two_ways(url, keyring) as (faults, direct), open_store(faults.url, keyring=keyring) as store:
            faults.refuse = True
            with pytest.raises(BackendUnavailableError):
                await _store(store, "new")
            assert await _tag(direct) is None
            faults.refuse = False
            await _store(store, "new")
            assert await _tag(direct) == "new"

    asyncio.run(main())


@shared_rows
def test_several_cuts_may_be_armed_and_each_counts_for_itself(row: Row, url: str, keyring: Keyring) -> None:
    async def main() -> None:
        async with _two_ways(url, keyring) as (faults, direct), _connected(faults, direct, keyring) as store:
            with faults.cut(0, "before") as first, faults.cut(1, "after") as second, faults.cut(1000, "after") as third:
                for _ in range(2):  # the second one meets the retry, or the next call
                    with suppress(BackendUnavailableError):
                        await _store(store, "new")
                assert (first.happened, second.happened, third.happened) == (True, True, False)
                assert first.statements == second.statements == third.statements
            with faults.counted() as statements:
                await _store(store, "new")
            assert statements
            assert first.statements == third.statements  # which ended with the block
            assert await _tag(direct) == "new"

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
                await _tag(store)

    asyncio.run(main())


@pytest.mark.parametrize("row", params(names=["sqlite"]))
def test_a_cut_read_leaves_nothing_open_in_sqlite(url: str, row: Row, keyring: Keyring) -> None:
    async def main() -> None:
        async with _two_ways(url, keyring) as (faults, direct), _connected(faults, direct, keyring) as store:
            with faults.counted() as statements:
                await _tag(store)
            with faults.cut(len(statements) - 1, "after") as cut:
                assert await _tag(store) == "old", "a read is sent again, over another connection"
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
