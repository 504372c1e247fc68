"""A server that accepts connections and does not answer, and an event loop that was blocked."""

from __future__ import annotations

import asyncio
import socket
import time
from datetime import UTC, datetime, timedelta

import pytest

from support.connection_faults import Faults, faulty
from support.database import connection_of, source_of
from support.matrix import Row, params
from tokenstore import AuthTokenStore, BackendUnavailableError, Keyring, LockTimeoutError, open_store
from tokenstore_sql.connections import pool

main_rows = pytest.mark.parametrize("row", params(names=["postgresql+asyncpg", "mariadb+asyncmy"]))
server_rows = pytest.mark.parametrize(
    "row", params(names=["postgresql+asyncpg", "postgresql+psycopg", "mariadb+aiomysql", "mariadb+asyncmy"])
)


async def _store(store: AuthTokenStore, tag: str) -> None:
    await store.store_tokens("github", "u1", tag, None, datetime.now(UTC) + timedelta(hours=1))


async def _tag(store: AuthTokenStore) -> str | None:
    record = await store.load_tokens("github", "u1")
    return None if record is None else record["access_token"]


async def _idle(store: AuthTokenStore, faults: Faults, count: int) -> None:
    """Let the pool open so many connections, and leave them idle."""
    source = source_of(store)
    connections = [await source.acquire(transactional=False, write=False) for _ in range(count)]
    for connection in connections:
        await source.release(connection)
    assert source.open == count


@server_rows
def test_a_load_takes_no_longer_than_statement_timeout(row: Row, url: str, keyring: Keyring) -> None:
    """Then it is retried on a new connection. The idle connections, which lead to the same server, are closed."""

    async def main() -> None:
        async with open_store(url, keyring=keyring) as direct, faulty(url) as faults:
            await direct.setup()
            await _store(direct, "old")
            async with open_store(faults.url, keyring=keyring, statement_timeout=0.5) as store:
                assert await _tag(store) == "old"
                await _idle(store, faults, 3)
                with faults.cut(0, when="before", how="silence"):
                    started = time.monotonic()
                    assert await _tag(store) == "old"
                # psycopg waits 5 s for the cancellation of a statement.
                assert 0.4 <= time.monotonic() - started < (12 if "psycopg" in row.name else 5)
                assert source_of(store).open == 1

    asyncio.run(main())


@main_rows
def test_a_write_that_times_out_closes_the_idle_connections(row: Row, url: str, keyring: Keyring) -> None:
    """So the next write does not wait for each of them in turn. The error says that the result is unknown."""

    async def main() -> None:
        async with open_store(url, keyring=keyring) as direct, faulty(url) as faults:
            await direct.setup()
            async with open_store(faults.url, keyring=keyring, lock_timeout=0.2) as store:
                await _store(store, "old")
                await _idle(store, faults, 3)
                with faults.cut(0, when="before", how="silence"), pytest.raises(LockTimeoutError, match="is unknown"):
                    await _store(store, "lost")
                assert source_of(store).open == 0
                await _store(store, "new")
                assert await _tag(direct) == "new"

    asyncio.run(main())


@main_rows
def test_a_ping_without_an_answer_closes_the_idle_connections(
    row: Row, url: str, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a write does not ping each of them in turn, for 5 seconds each, before it reaches another server."""
    monkeypatch.setattr(pool, "_TRUSTED", 0.0)
    monkeypatch.setattr(pool, "_PING_TIMEOUT", 0.5)

    async def main() -> None:
        async with open_store(url, keyring=keyring) as direct, faulty(url) as faults:
            await direct.setup()
            async with open_store(faults.url, keyring=keyring) as store:
                await _idle(store, faults, 3)
                with faults.cut(0, when="before", how="silence"):
                    await _store(store, "new")
                assert source_of(store).open == 1
                assert await _tag(direct) == "new"

    asyncio.run(main())


@main_rows
def test_a_blocked_event_loop_does_not_cause_a_statement_timeout(row: Row, url: str, keyring: Keyring) -> None:
    """The answer arrived while the event loop was blocked; it is read before the timeout is checked."""

    async def main() -> None:
        async with open_store(url, keyring=keyring, lock_timeout=0.2, statement_timeout=1) as store:
            await store.setup()
            await _store(store, "old")
            for call in (_store(store, "new"), _tag(store)):
                task = asyncio.ensure_future(call)
                for _ in range(20):  # the statement is sent in the first steps of the event loop
                    await asyncio.sleep(0)
                    if source_of(store).in_use:
                        break
                await asyncio.sleep(0)
                time.sleep(1.8)  # noqa: ASYNC251 - the fault itself
                await task
            assert await _tag(store) == "new"

    asyncio.run(main())


@server_rows
def test_tcp_keep_alive_and_user_timeout_are_set(row: Row, url: str, keyring: Keyring) -> None:
    """So the kernel closes a connection whose server does not acknowledge data any more."""

    async def main() -> None:
        async with open_store(url, keyring=keyring) as store:
            await store.setup()
            async with connection_of(store) as connection:
                number = connection.socket()  # type: ignore[attr-defined]
                with socket.socket(fileno=number) as found:
                    try:
                        assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                        assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15
                        assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
                    finally:
                        found.detach()

    asyncio.run(main())


@main_rows
def test_connect_timeout_limits_the_wait_for_a_server_that_never_answers(row: Row, keyring: Keyring) -> None:
    """The server accepts the connection and sends no data."""

    async def main() -> None:
        accepted = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            scheme = row.name.replace("mariadb", "mysql")
            async with open_store(f"{scheme}://u:p@127.0.0.1:{port}/d", keyring=keyring, connect_timeout=1) as store:
                started = time.monotonic()
                with pytest.raises(BackendUnavailableError):
                    await _tag(store)
                accepted.append(time.monotonic() - started)
        assert accepted[0] < 5

    asyncio.run(main())
