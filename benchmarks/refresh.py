"""What a refresh costs everybody else: ``python -m benchmarks.refresh [URL …]``, in the root of the checkout.

Each database gets a table of its own for the time of the run; without a URL, the private servers of the tests are
started. The provider is real, over HTTP, in a process of its own. It counts: a refresh too many is an error.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import chain
from multiprocessing.synchronize import Barrier
from pathlib import Path
from secrets import token_hex
from statistics import median
from typing import Any, NamedTuple

from sqlalchemy import make_url

from tokenstore import Keyring, open_store
from tokenstore.records import RefreshableRecord
from tokenstore.store import AuthTokenStore
from tokenstore.testing.provider import StrictRotatingProvider, refresh_over_http

KEY = ("provider", "user")
CLIENT = {"client_id": "demo-client", "client_secret": "demo-secret"}
HOUR = timedelta(hours=1)
# Processes are copies of one that has imported everything.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tokenstore_sql.backend", "tokenstore.testing.provider", "httpx"])


class Scale(NamedTuple):
    """How much is measured; times in seconds.

    Attributes:
        callers: Of one process, who want one token.
        pool_size: Their connections, at most.
        readers: Who read other rows meanwhile.
        rounds: How often, for each way.
        call: How long the provider takes.
        waiters: Processes that wait for another one's refresh.
        waits: How often.
        fleet: Processes whose statements are counted.
        long_call: How long the provider takes for them.
        stampede: How long it takes them to find their pace.
    """

    callers: int = 200
    pool_size: int = 10
    readers: int = 4
    rounds: int = 5
    call: float = 1.0
    waiters: int = 15
    waits: int = 20
    fleet: int = 100
    long_call: float = 10.0
    stampede: float = 3.0


QUICK = Scale(callers=20, rounds=1, call=0.5, waiters=2, waits=2, fleet=3, long_call=1.0, stampede=0.5)

Target = tuple[str, str, str, Scale]  # a URL, a table, the URL of the provider
Table = list[list[str]]
Log = list[tuple[float, str]]
Way = Callable[["Probe"], Awaitable[object]]


class Probe:
    """A store, and a log of what it does, with the times of the machine's monotonic clock in seconds.

    The log has ``read`` (a SELECT from the table) and ``other`` statements, ``call`` and ``answer`` of the provider,
    ``commit`` of new tokens and ``done``. Beside it stands how many connections were in use, whenever that changed.
    """

    def __init__(self, target: Target) -> None:
        self.log: Log = []
        url, self._table, self.token_url, scale = target
        self.in_use: list[tuple[float, int]] = []
        self.store: AuthTokenStore = open_store(
            url,
            keyring=Keyring({"k1": bytes(32)}),
            refreshers={KEY[0]: self.refresh},
            on_refreshed=lambda _: self._note("commit"),
            table=self._table,
            pool_size=scale.pool_size,
        )
        self._readers = scale.readers
        backend: Any = self.store._backend
        self.backend = backend
        self._pool = pool = backend._source
        pool._connect = self._noting_statements(pool._connect)
        # Every way to a connection, and back, is one of these.
        pool.take, pool.put_back = map(self._noting_use, (pool.take, pool.put_back))
        pool._open = self._noting_opened(pool._open)

    def _note(self, what: str) -> None:
        self.log.append((time.monotonic(), what))

    def _noting_statements(self, connect: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
        async def connected() -> Any:
            connection = await connect()
            send = connection.send

            async def noted(sql: str, *rest: Any) -> Any:
                self._note("read" if sql.startswith("SELECT") and self._table in sql else "other")
                return await send(sql, *rest)

            connection.send = noted
            return connection

        return connected

    def _note_use(self) -> None:
        self.in_use.append((time.monotonic(), self._pool.in_use))

    def _noting_use(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            result = change(*args)
            self._note_use()
            return result

        return noted

    def _noting_opened(self, open_one: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
        async def noted() -> Any:
            connection = await open_one()
            self._note_use()
            return connection

        return noted

    async def refresh(self, record: RefreshableRecord) -> dict[str, Any]:
        """Call the provider."""
        self._note("call")
        new = await refresh_over_http(self.token_url, record["refresh_token"], **CLIENT, timeout=60)
        self._note("answer")
        return new

    async def expire(self, refresh_token: str) -> None:
        """Store a new grant, whose access token has expired, and rows of others."""
        await self.store.store_tokens(*KEY, "expired", refresh_token, datetime.now(UTC) - HOUR)
        for number in range(self._readers):
            await self.store.store_tokens("other", str(number), "access", "refresh", datetime.now(UTC) + HOUR)

    async def load_leased(self) -> None:
        """Get a valid token by the engine."""
        await self.store.load_fresh_tokens(*KEY)
        self._note("done")

    async def load_locked(self) -> None:
        """Get a valid token by the three steps under a row lock."""
        async with self.store.transaction() as transaction:
            record = await transaction.load_tokens(*KEY, for_update=True)
            if record is None or self.store.is_access_token_valid(record):
                return
            if self.store.is_refresh_token_valid(record):
                new = await self.refresh(record)
                pair = new["access_token"], new["refresh_token"]
                await transaction.store_tokens(*KEY, *pair, datetime.now(UTC) + HOUR)


@contextmanager
def _provider(url: str, scale: Scale, latency: float, grants: int) -> Iterator[tuple[Target, list[str]]]:
    """A table, and refresh tokens of a provider, each of which has to be used once by the end."""
    with StrictRotatingProvider(latency=latency) as provider:
        target = url, f"bench_{token_hex(8)}", provider.token_url, scale
        asyncio.run(_once(target, lambda probe: probe.store.setup()))
        try:
            yield target, [provider.new_grant("user")["refresh_token"] for _ in range(grants)]
        finally:
            asyncio.run(_once(target, lambda probe: probe.backend.drop()))
        stats = provider.stats()
        if (stats.requests, stats.refreshes, stats.reuses) != (grants, grants, 0):
            raise RuntimeError(f"{grants} refreshes were due: {stats}")


async def _once(target: Target, action: Way) -> None:
    probe = Probe(target)
    async with probe.store:
        await action(probe)


def bystanders(url: str, scale: Scale) -> Table:
    """Many callers in one process wait for a slow provider, while others read other rows."""
    # The provider keeps this process to itself, and takes no time from those who are measured.
    grants = len(WAYS) * (1 + scale.rounds)
    with _provider(url, scale, scale.call, grants) as served, ProcessPoolExecutor(1, _context) as process:
        return process.submit(_bystanders, *served).result()


def _bystanders(target: Target, tokens: list[str]) -> Table:
    lines: Table = []
    with asyncio.Runner() as runner:
        probe, scale = Probe(target), target[-1]

        def crowds(readers: int) -> list[Crowd]:
            return [runner.run(_crowd(probe, way, tokens.pop(), scale, readers)) for way in WAYS.values()]

        alone, *rounds = crowds(0), *(crowds(scale.readers) for _ in range(scale.rounds))
        runner.run(probe.store.aclose())
    for way, name in enumerate(WAYS):
        for part, title in enumerate(("all", "call")):
            idle = [crowds[way].idle for crowds in rounds]
            busy = [crowds[way].busy[part] for crowds in rounds]
            ratio = median(_percentile(99, one) / _percentile(99, other) for one, other in zip(busy, idle, strict=True))
            used = alone[way].in_use[part], max(crowds[way].in_use[part] for crowds in rounds)
            lines.append(
                [
                    str(scale.callers),
                    name,
                    title,
                    *map(str, used),
                    *_ms(idle, 50, 99),
                    *_ms(busy, 50, 99),
                    f"{ratio:.2f}",
                ]
            )
    return lines


class Crowd(NamedTuple):
    """Of a refresh that many wait for: all of it from their arrival on, and the provider's call alone."""

    in_use: list[int]  # the most connections taken; of the call in its second half, when all have read the row
    idle: list[float]  # how long each read of another row took before that, in seconds
    busy: list[list[float]]  # the same in each part


async def _crowd(probe: Probe, way: Way, token: str, scale: Scale, readers: int) -> Crowd:
    await probe.expire(token)
    idle = await _read_beside(probe, asyncio.sleep(scale.call), readers)
    arrived = time.monotonic()
    reads = await _read_beside(probe, asyncio.gather(*(way(probe) for _ in range(scale.callers))), readers)
    called, answered = max(_when([probe.log], "call")), max(_when([probe.log], "answer"))
    return Crowd(
        [_most_in_use(probe.in_use, start, answered) for start in (arrived, (called + answered) / 2)],
        [length for _, length in idle],
        [[length for began, length in reads if start <= began <= answered] for start in (arrived, called)],
    )


def _most_in_use(numbers: Sequence[tuple[float, int]], start: float, end: float) -> int:
    before = [number for at, number in numbers if at < start]
    return max([*before[-1:], *(number for at, number in numbers if start <= at <= end)], default=0)


async def _read_beside(probe: Probe, work: Awaitable[object], readers: int) -> list[tuple[float, float]]:
    """Read other rows until the work is done: when each read began, and how long it took, in seconds."""
    reads: list[tuple[float, float]] = []

    async def read(user_id: str) -> None:
        while True:
            began = time.monotonic()
            await probe.store.load_tokens("other", user_id)
            reads.append((began, time.monotonic() - began))
            await asyncio.sleep(0.005)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(read(str(number))) for number in range(readers)]
        await work
        for task in tasks:
            task.cancel()
    return reads


def waits(url: str, scale: Scale) -> Table:
    """From the commit of new tokens until another process that waits for them has them."""
    lengths: list[float] = []
    with _provider(url, scale, scale.call, scale.waits) as (target, tokens):
        for logs in _all_want(target, tokens, 1 + scale.waiters):
            [committed] = _when(logs, "commit")
            lengths += [max(_when([log], "done")) - committed for log in logs if not _when([log], "call")]
    return [[str(scale.waiters), str(len(lengths)), *_ms([lengths], 50, 95, 100)]]


def statements(url: str, scale: Scale) -> Table:
    """What a fleet of processes sends to the database while it waits for a provider that takes its time."""
    with _provider(url, scale, scale.long_call, 1) as (target, tokens):
        [logs] = _all_want(target, tokens, scale.fleet)
    [called], [answered] = _when(logs, "call"), _when(logs, "answer")
    lines = []
    for part, start in (("call", called), (f"call after {scale.stampede:g} s", called + scale.stampede)):
        kinds = [_when(logs, kind) for kind in ("read", "other")]
        rates = [sum(start <= at <= answered for at in times) / (answered - start) for times in kinds]
        lines.append([str(scale.fleet), part, *(f"{rate:.0f}" for rate in (sum(rates), *rates))])
    return lines


def _all_want(target: Target, tokens: Sequence[str], count: int) -> Iterator[list[Log]]:
    """For each token: processes that all want a valid one at once, and their logs."""
    everybody = _context.Barrier(count)
    with ProcessPoolExecutor(count, _context, _open, (target, everybody)) as processes:
        for token in tokens:
            asyncio.run(_once(target, lambda probe, token=token: probe.expire(token)))  # type: ignore[misc]
            yield list(processes.map(_want, range(count)))


_mine: list[tuple[asyncio.Runner, Probe, Barrier]] = []


def _open(target: Target, everybody: Barrier) -> None:
    _mine.append((asyncio.Runner(), Probe(target), everybody))
    runner, probe, _ = _mine[0]
    runner.run(probe.store.load_tokens(*KEY))  # connects


def _want(_: int) -> Log:
    runner, probe, everybody = _mine[0]
    everybody.wait(120)  # so that each process gets one of these jobs
    probe.log.clear()
    runner.run(probe.load_leased())
    return probe.log


def _when(logs: Sequence[Log], wanted: str) -> list[float]:
    return [at for log in logs for at, what in log if what == wanted]


def _percentile(percent: float, lengths: Sequence[float]) -> float:
    return sorted(lengths)[max(math.ceil(len(lengths) * percent / 100), 1) - 1]


def _ms(lengths: Sequence[list[float]], *percents: float) -> list[str]:
    return [f"{_percentile(percent, [*chain(*lengths)]) * 1000:.1f}" for percent in percents]


WAYS: dict[str, Way] = {"lease": Probe.load_leased, "row lock": Probe.load_locked}
MEASUREMENTS: dict[str, tuple[Callable[[str, Scale], Table], list[str]]] = {
    "bystanders": (
        bystanders,
        ["callers", "way", "part", "in use", "with reads", "idle p50, ms", "p99", "busy p50, ms", "p99", "p99 ratio"],
    ),
    "waits": (waits, ["waiting processes", "waits", "p50, ms", "p95", "longest"]),
    "statements": (statements, ["processes", "part", "statements/s", "reads of the row/s", "others/s"]),
}


def _show(title: str, columns: Sequence[str], lines: Table) -> None:
    try:
        from rich import console, table
    except ImportError:
        print(f"\n{title}", *map(" | ".join, [columns, *lines]), sep="\n")
        return
    grid = table.Table(*columns, title=title, title_justify="left")
    for line in lines:
        grid.add_row(*line)
    console.Console(width=132).print(grid)


def main() -> None:
    """Measure and print; an error ends the run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refresh", description=__doc__)
    parser.add_argument("urls", nargs="*", metavar="URL")
    parser.add_argument("--only", choices=MEASUREMENTS, action="append", help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="to see that it runs; the figures say little")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else Scale()
    with tempfile.TemporaryDirectory() as folder:
        urls = arguments.urls
        if not urls:
            sys.path.append(str(Path(__file__).parents[1] / "tests"))
            servers: Any = importlib.import_module("servers")
            urls = [f"sqlite:///{folder}/t.db", servers.postgres().url("asyncpg"), servers.mariadb().url("asyncmy")]
        for name in arguments.only or MEASUREMENTS:
            measure, columns = MEASUREMENTS[name]
            lines = [[make_url(url).drivername, *line] for url in urls for line in measure(url, scale)]
            _show(str(measure.__doc__), ["database", *columns], lines)


if __name__ == "__main__":
    main()
