"""Lost connections are replaced, and callers never get one."""

from __future__ import annotations

import asyncio

import pytest

from support.fake_clock_loop import run_with_fake_clock, until_all_wait
from support.fake_driver import FakeServer, acquired, used_up
from tokenstore.cancellation import FINISH_GRACE
from tokenstore_sql.connections import pool as pool_module
from tokenstore_sql.errors import ConnectionLostError


@pytest.mark.parametrize("statement", ["SELECT 1", "BEGIN"])
@pytest.mark.parametrize("ends", ["fails", "is silent"])
def test_before_a_write_an_idle_connection_is_checked_and_replaced_if_dead(statement: str, ends: str) -> None:
    """The caller gets a working connection; the check has a timeout. In a transaction, BEGIN is the check."""

    async def main() -> None:
        server = FakeServer()
        pool = server.pool()
        dead = await acquired(pool)
        await pool.release(dead)
        if ends == "fails":
            dead.fail.add(statement)
        else:
            dead.hang[statement] = asyncio.Event()
        await asyncio.sleep(pool_module._TRUSTED + 1)
        connection = await acquired(pool, transactional=statement == "BEGIN", write=True)
        await until_all_wait()
        assert (connection.number, dead.sent, dead.closed) == (2, [statement], True)
        assert server.open == {connection}

    run_with_fake_clock(main)


def test_a_connection_is_not_checked_before_a_read_or_soon_after_its_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read can be retried on another connection."""

    async def main() -> None:
        pool = FakeServer().pool()
        connection = await acquired(pool, write=True)
        for pause, write in ((pool_module._TRUSTED, True), (100.0, False), (0.0, True)):
            await pool.release(connection)
            await asyncio.sleep(pause)
            assert await acquired(pool, write=write) is connection
        assert connection.sent == []
        monkeypatch.setattr(pool_module, "_TRUSTED", -1.0)
        await pool.release(connection)
        assert await acquired(pool, write=True) is connection
        assert connection.sent == ["SELECT 1"]

    run_with_fake_clock(main)


def test_a_lost_connection_is_not_kept_in_the_pool() -> None:
    """Whether it was lost in use or idle, no caller gets it, and another one is opened instead."""

    async def main() -> None:
        server = FakeServer()
        pool = server.pool(2)
        first, second = await used_up(pool, 2)
        first.dead = True
        await pool.release(first)
        await pool.release(second)
        assert (pool.open, pool.in_use) == (1, 0)
        second.dead = True
        third = await acquired(pool)
        await until_all_wait()
        assert server.open == {third}
        assert (first.closed, second.closed) == (True, True)

    run_with_fake_clock(main)


def test_if_begin_fails_on_a_new_connection_the_connection_is_discarded() -> None:
    """The caller gets the driver's error, and the next caller gets another connection."""

    async def main() -> None:
        server = FakeServer()
        pool = server.pool()
        server.failing = {"BEGIN"}
        with pytest.raises(ConnectionLostError, match="connection lost"):
            await acquired(pool, transactional=True)
        server.failing = set()
        assert (await acquired(pool, transactional=True)).number == 2
        await until_all_wait()
        assert server.made[0].closed

    run_with_fake_clock(main)


def test_a_failed_rollback_raises_no_error_and_discards_the_connection() -> None:
    """The server rolls back when the connection is closed."""

    async def main() -> None:
        pool = FakeServer().pool()
        connection = await acquired(pool, transactional=True)
        connection.fail.add("ROLLBACK")
        await pool.release(connection)
        await until_all_wait()
        assert (pool.open, connection.closed) == (0, True)

    run_with_fake_clock(main)


def test_a_rollback_that_is_not_answered_times_out_without_an_error() -> None:
    """The caller that leaves the transaction only waits for the timeout."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        pool = FakeServer().pool()
        connection = await acquired(pool, transactional=True)
        connection.hang["ROLLBACK"] = asyncio.Event()
        started = loop.time()
        await pool.release(connection)
        assert loop.time() <= started + pool_module._PING_TIMEOUT + FINISH_GRACE
        await until_all_wait()
        assert (pool.open, connection.closed) == (0, True)

    run_with_fake_clock(main)


def test_idle_connections_can_be_discarded() -> None:
    """Connections in use are not affected, and are kept when they are returned."""

    async def main() -> None:
        server = FakeServer()
        pool = server.pool(3)
        first, second, third = await used_up(pool, 3)
        await pool.release(first)
        await pool.release(second)
        pool.discard_idle()
        await until_all_wait()
        assert server.open == {third}
        await pool.release(third)
        assert await acquired(pool) is third

    run_with_fake_clock(main)
