"""How waiters learn of the end of somebody else's lease: soon, and at little cost to the server."""

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

# Long enough for whatever else the machine does; a wait that nothing ends is made longer.
_IN_TIME, _NEVER = 20.0, 600.0


def test_the_interval_follows_the_process_s_share_of_the_connections() -> None:
    """The same for processes that are alike, however many connections each has; between 36 ms and 1 s."""
    for pooled in (1, 3, 10):
        assert [interval_for(Clients(processes * pooled, pooled)) for processes in (1, 2, 15)] == [0.036] * 3
        assert interval_for(Clients(43 * pooled, pooled)) == pytest.approx(0.1)
        assert interval_for(Clients(100 * pooled, pooled)) == pytest.approx(0.2326, abs=1e-4)
        assert interval_for(Clients(5000 * pooled, pooled)) == 1.0
    assert interval_for(Clients(0, 0)) == 0.036, "a pooler hides how many there are"


@pytest.mark.parametrize("pools", [[1] * 100, [10] * 100, [1] * 50 + [10] * 50, [100] + [1] * 99, list(range(1, 101))])
def test_a_hundred_processes_together_stay_within_500_statements_a_second(pools: list[int]) -> None:
    """Reads and counts, whatever their pools: the mean of 1 / interval is 1.4 % higher for the jitter."""
    total = 0.0
    for own in pools:
        interval = interval_for(Clients(sum(pools), own))
        recount = polling._RECOUNT_SMALL_AFTER if interval == polling._SHORTEST else polling._RECOUNT_AFTER
        total += 1.014 * (1 / interval + 1 / recount)
    assert total < 500


def test_a_small_fleet_sees_a_commit_within_50_ms() -> None:
    """Up to 16 processes the longest interval, jitter included, leaves time for the read."""
    assert max(polling.jittered(interval_for(Clients(16, 1))) for _ in range(1000)) < 0.045


def test_the_count_is_kept_for_some_seconds() -> None:
    """However many wait at once; one second where the fleet looks small, as it may just be starting."""

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


def test_a_count_that_fails_or_hangs_does_not_fail_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last interval stays, or one in the middle, and it is not asked for again at once."""

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
def test_a_server_counts_the_connections(row: Row, url: str) -> None:
    """Those of this process, and those of another one."""

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
def test_a_user_without_privileges_counts_as_well(row: Row, url: str) -> None:
    """The user's own connections are seen without any right to see others'."""
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
def test_watching_takes_no_connection_while_it_waits(row: Row, url: str) -> None:
    """And one statement in many calls: the count."""

    async def main() -> None:
        async with opened_backend(url, pool_size=1) as backend:
            with sent_statements() as sent:
                await backend.watch(KEY)
            assert len(sent) <= 3, "MySQL 9 may need two, and the first connection one"
            with sent_statements() as sent:
                watching = [asyncio.create_task(backend.watch(KEY)) for _ in range(50)]
                await asyncio.sleep(0.02)
                assert backend._source.in_use == 0
                await backend.get(KEY)
                await asyncio.gather(*watching)
            assert len(sent) == 1

    asyncio.run(main())


@pytest.mark.postgres
def test_watching_a_server_that_is_gone() -> None:
    """The wait goes on; it is the read that says so."""

    async def main() -> None:
        async with opened_backend("postgresql://nobody:x@127.0.0.1:1/none", setup=False) as backend:
            await asyncio.wait_for(watched_for(backend), _IN_TIME)

    asyncio.run(main())
