"""Lost connections are replaced, and never handed out."""

from __future__ import annotations

import asyncio

import pytest

from support.fake_driver import FakeServer, acquired, used_up
from support.waitless_loop import everybody_waits, run_waitless
from tokenstore.cancellation import FINISH_GRACE
from tokenstore_sql.connections import pool as pool_module
from tokenstore_sql.errors import ConnectionLostError


@pytest.mark.parametrize("statement", ["SELECT 1", "BEGIN"])
@pytest.mark.parametrize("ends", ["fails", "is silent"])
def test_after_idleness_a_write_asks_first_and_replaces_the_dead(statement: str, ends: str) -> None:
    """The caller notices nothing; one that is silent has a bounded time to answer. A transaction's BEGIN asks, too."""

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
        await everybody_waits()
        assert (connection.number, dead.sent, dead.closed) == (2, [statement], True)
        assert server.open == {connection}

    run_waitless(main)


def test_nobody_is_asked_for_a_sign_of_life_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before a read, which is sent again if need be; nor one that was in use a moment ago."""

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

    run_waitless(main)


def test_a_lost_connection_is_not_kept() -> None:
    """Given back or idle: nobody gets it, and another one is opened in its place."""

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
        await everybody_waits()
        assert server.open == {third}
        assert (first.closed, second.closed) == (True, True)

    run_waitless(main)


def test_a_transaction_that_cannot_begin_leaves_nothing_behind() -> None:
    """On a new connection, that is: its caller gets the driver's error, and the next one another connection."""

    async def main() -> None:
        server = FakeServer()
        pool = server.pool()
        server.failing = {"BEGIN"}
        with pytest.raises(ConnectionLostError, match="gone"):
            await acquired(pool, transactional=True)
        server.failing = set()
        assert (await acquired(pool, transactional=True)).number == 2
        await everybody_waits()
        assert server.made[0].closed

    run_waitless(main)


def test_a_rollback_that_fails_is_the_servers_affair() -> None:
    """It tells nobody, and the connection is not kept."""

    async def main() -> None:
        pool = FakeServer().pool()
        connection = await acquired(pool, transactional=True)
        connection.fail.add("ROLLBACK")
        await pool.release(connection)
        await everybody_waits()
        assert (pool.open, connection.closed) == (0, True)

    run_waitless(main)


def test_a_rollback_without_an_answer_ends() -> None:
    """Whoever leaves a transaction waits for a bounded time, and notices nothing but that."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        pool = FakeServer().pool()
        connection = await acquired(pool, transactional=True)
        connection.hang["ROLLBACK"] = asyncio.Event()
        started = loop.time()
        await pool.release(connection)
        assert loop.time() <= started + pool_module._PING_TIMEOUT + FINISH_GRACE
        await everybody_waits()
        assert (pool.open, connection.closed) == (0, True)

    run_waitless(main)


def test_those_that_nobody_uses_can_be_discarded() -> None:
    """Those in use stay, and are kept when they are given back."""

    async def main() -> None:
        server = FakeServer()
        pool = server.pool(3)
        first, second, third = await used_up(pool, 3)
        await pool.release(first)
        await pool.release(second)
        pool.discard_idle()
        await everybody_waits()
        assert server.open == {third}
        await pool.release(third)
        assert await acquired(pool) is third

    run_waitless(main)
