"""Waiting for another holder's lease: processes notice its end soon, and poll the server at a limited rate."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import make_url

from support.database import Place
from support.matrix import Row, server_rows
from support.sent_statements import sent_statements
from support.watched_backend import KEY, opened_backend, watched_for
from tokenstore.errors import BackendError
from tokenstore_sql import polling
from tokenstore_sql.polling import Clients, PollInterval, interval_for

# Seconds, long enough for a busy machine; waits that must not end by themselves are longer.
_IN_TIME, _NEVER = 20.0, 600.0


def test_the_poll_interval_depends_on_the_process_s_share_of_the_connections() -> None:
    """The interval is between 36 ms and 1 s, and does not depend on the number of connections of each process."""
    for pooled in (1, 3, 10):
        assert [interval_for(Clients(processes * pooled, pooled)) for processes in (1, 2, 15)] == [0.036] * 3
        assert interval_for(Clients(43 * pooled, pooled)) == pytest.approx(0.1)
        assert interval_for(Clients(100 * pooled, pooled)) == pytest.approx(0.2326, abs=1e-4)
        assert interval_for(Clients(5000 * pooled, pooled)) == 1.0
    assert interval_for(Clients(0, 0)) == 0.036, "behind a pooler the server counts no connections"


@pytest.mark.parametrize("pools", [[1] * 100, [10] * 100, [1] * 50 + [10] * 50, [100] + [1] * 99, list(range(1, 101))])
def test_a_hundred_waiting_processes_send_at_most_500_statements_a_second(pools: list[int]) -> None:
    """Reads and counts together, for all pool sizes; jitter makes the mean of 1 / interval 1.4 % higher."""
    total = 0.0
    for own in pools:
        interval = interval_for(Clients(sum(pools), own))
        recount = polling._RECOUNT_SMALL_AFTER if interval == polling._SHORTEST else polling._RECOUNT_AFTER
        total += 1.014 * (1 / interval + 1 / recount)
    assert total < 500


def test_up_to_16_processes_notice_a_commit_within_50_ms() -> None:
    """The longest interval with its jitter is shorter than 50 ms, so that time for the read is left."""
    assert max(polling.jittered(interval_for(Clients(16, 1))) for _ in range(1000)) < 0.045


def test_the_number_of_connections_is_cached_for_some_seconds() -> None:
    """All waiting callers share it. A small number is cached for only one second: more processes may be starting."""

    async def main() -> None:
        counts = [Clients(86, 1), Clients(4, 1)]
        counted: list[Clients] = []

        async def count() -> Clients:
            await asyncio.sleep(0)
            counted.append(counts[min(len(counted), 1)])
            return counted[-1]

        subject = PollInterval()
        first = await asyncio.gather(*(subject.current(count) for _ in range(50)))
        assert first[0] == 0.2
        assert [await subject.current(count) for _ in range(50)] == [0.2] * 50
        assert len(counted) == 1
        loop = asyncio.get_running_loop()
        assert 2.3 < subject._next_count - loop.time() < 3.7
        subject._next_count = loop.time()
        assert await subject.current(count) == 0.036
        assert 0.7 < subject._next_count - loop.time() < 1.3

    asyncio.run(main())


def test_waiting_goes_on_if_counting_the_connections_fails_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last interval (or else a medium one) is kept, and the next count is not made at once."""

    async def main() -> None:
        monkeypatch.setattr(polling, "_COUNT_TIMEOUT", 0.05)
        asked = 0

        async def refused() -> Clients:
            nonlocal asked
            asked += 1
            raise BackendError("no privilege")

        async def hangs() -> Clients:
            nonlocal asked
            asked += 1
            await asyncio.Event().wait()
            raise AssertionError

        async def counts() -> Clients:
            return Clients(215, 1)

        for fails in (refused, hangs):
            subject = PollInterval()
            asked = 0
            assert [await subject.current(fails) for _ in range(3)] == [0.1] * 3
            assert asked == 1
            subject._next_count = 0.0
            assert await subject.current(counts) == 0.5
            subject._next_count = 0.0
            assert await subject.current(fails) == 0.5

    asyncio.run(main())


@server_rows
def test_the_server_counts_the_connections_of_all_processes(row: Row, url: str) -> None:
    """The count contains this process's connections, and those of another process."""

    async def main() -> None:
        async with opened_backend(url) as backend, opened_backend(url, setup=False) as other:
            await asyncio.gather(*(backend.get(KEY) for _ in range(3)))
            await asyncio.gather(*(other.get(KEY) for _ in range(4)))
            found = await backend._count_clients()
            assert 1 <= found.own <= 3
            assert found.all >= found.own + 1
            assert (await other._count_clients()).all == found.all

    asyncio.run(main())


@server_rows
def test_a_database_user_without_privileges_can_count_its_connections(row: Row, url: str) -> None:
    """Counting the user's own connections needs no right to see those of other users."""
    place = Place(row, url)
    server = place.server()
    user = "watcher"
    for statement in (
        [f"DROP ROLE IF EXISTS {user}", f"CREATE ROLE {user} LOGIN PASSWORD 'secret'"]
        if row.mark == "postgres"
        else [
            f"DROP USER IF EXISTS {user}",
            f"CREATE USER {user} IDENTIFIED BY 'secret'",
            f"GRANT SELECT ON {server.database}.* TO {user}",
        ]
    ):
        server.execute(statement)
    parsed = make_url(url).set(username=user, password="secret")

    async def main() -> None:
        async with opened_backend(parsed.render_as_string(hide_password=False), setup=False) as backend:
            await asyncio.gather(*(backend._count_clients() for _ in range(3)))
            found = await backend._count_clients()
            assert found.all >= found.own >= 1

    asyncio.run(main())


@server_rows
def test_watch_holds_no_connection_while_it_waits(row: Row, url: str) -> None:
    """Many calls send only one statement, which counts the connections."""

    async def main() -> None:
        async with opened_backend(url, pool_size=1) as backend:
            with sent_statements() as sent:
                await backend.watch(KEY)
            assert len(sent) <= 3, (
                "more than 3 statements; MySQL 9 may need two for the count, and the first connection one"
            )
            with sent_statements() as sent:
                watching = [asyncio.create_task(backend.watch(KEY)) for _ in range(50)]
                await asyncio.sleep(0.02)
                assert backend._source.in_use == 0
                await backend.get(KEY)
                await asyncio.gather(*watching)
            assert len(sent) == 1

    asyncio.run(main())


@pytest.mark.postgres
def test_watch_raises_no_error_for_an_unreachable_server() -> None:
    """It waits as usual; the next read raises the error."""

    async def main() -> None:
        async with opened_backend("postgresql://nobody:x@127.0.0.1:1/none", setup=False) as backend:
            await asyncio.wait_for(watched_for(backend), _IN_TIME)

    asyncio.run(main())
