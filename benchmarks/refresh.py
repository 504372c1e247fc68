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
from itertools import accumulate, chain
from multiprocessing.synchronize import Barrier
from pathlib import Path
from secrets import token_hex
from statistics import median
from typing import Any, NamedTuple

from sqlalchemy import event, make_url

from tokenstore import Keyring, open_store
from tokenstore.records import TokenRecord
from tokenstore.store import AuthTokenStore
from tokenstore.testing.provider import StrictRotatingProvider, refresh_over_http

CALLERS, POOL_SIZE, READERS, ROUNDS, CALL = 200, 10, 4, 5, 1.0
WAITERS, WAITS = 15, 20
FLEET, LONG_CALL, STAMPEDE = 100, 10.0, 3.0

KEY = ("provider", "user")
CLIENT = {"client_id": "demo-client", "client_secret": "demo-secret"}
HOUR = timedelta(hours=1)
# Processes are copies of one that has imported everything.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tokenstore_sql.base", "tokenstore.testing.provider", "httpx"])

Target = tuple[str, str, str]  # a URL, a table, and the URL of the provider
Table = list[list[str]]
Log = list[tuple[float, str]]
Way = Callable[["Probe"], Awaitable[object]]


class Probe:
    """A store, and a log of what it does, with the times of the machine's monotonic clock in seconds.

    The log has ``read`` (a SELECT from the table) and ``other`` statements, ``checkout`` (which pings the server) and
    ``checkin`` of connections, ``call`` and ``answer`` of the provider, ``commit`` of new tokens and ``done``.
    """

    def __init__(self, target: Target) -> None:
        self.log: Log = []
        url, table, self.token_url = target
        self.store: AuthTokenStore = open_store(
            url,
            keyring=Keyring({"k1": bytes(32)}),
            refreshers={KEY[0]: self.refresh},
            on_refreshed=lambda _: self._note("commit"),
            table=table,
            pool_size=POOL_SIZE,
        )
        backend: Any = self.store._backend
        self.backend, engine = backend, backend._engine.sync_engine

        @event.listens_for(engine, "before_cursor_execute")
        def _(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            self._note("read" if statement.lstrip().startswith("SELECT") and table in statement else "other")

        for change in ("checkout", "checkin"):
            event.listen(engine.pool, change, lambda *_, change=change: self._note(change))

    def _note(self, what: str) -> None:
        self.log.append((time.monotonic(), what))

    async def refresh(self, record: TokenRecord) -> dict[str, Any]:
        """Call the provider."""
        self._note("call")
        new = await refresh_over_http(self.token_url, record["refresh_token"], **CLIENT, timeout=60)
        self._note("answer")
        return new

    async def expire(self, refresh_token: str) -> None:
        """Store a new grant, whose access token has expired, and rows of others."""
        await self.store.store_tokens(*KEY, "expired", refresh_token, datetime.now(UTC) - HOUR)
        for number in range(READERS):
            await self.store.store_tokens("other", str(number), "access", "refresh", datetime.now(UTC) + HOUR)

    async def load_leased(self) -> None:
        """Get a valid token by the engine."""
        await self.store.load_fresh_tokens(*KEY)
        self._note("done")

    async def load_locked(self) -> None:
        """Get a valid token by the three steps under a row lock."""
        async with self.store.transaction() as transaction:
            record = await transaction.load_tokens(*KEY, for_update=True)
            if record is not None and not self.store.is_access_token_valid(record):
                new = await self.refresh(record)
                pair = new["access_token"], new["refresh_token"]
                await transaction.store_tokens(*KEY, *pair, datetime.now(UTC) + HOUR)


@contextmanager
def _provider(url: str, latency: float, grants: int) -> Iterator[tuple[Target, list[str]]]:
    """A table, and refresh tokens of a provider, each of which has to be used once by the end."""
    with StrictRotatingProvider(latency=latency) as provider:
        target = url, f"bench_{token_hex(8)}", provider.token_url
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


def bystanders(url: str) -> Table:
    """200 callers in one process wait for a provider that takes a second, while others read other rows."""
    # The provider keeps this process to itself, and takes no time from those who are measured.
    with _provider(url, CALL, len(WAYS) * (1 + ROUNDS)) as served, ProcessPoolExecutor(1, _context) as process:
        return process.submit(_bystanders, *served).result()


def _bystanders(target: Target, tokens: list[str]) -> Table:
    lines: Table = []
    with asyncio.Runner() as runner:
        probe = Probe(target)

        def crowds(readers: int) -> list[Crowd]:
            return [runner.run(_crowd(probe, way, tokens.pop(), readers)) for way in WAYS.values()]

        alone, *rounds = crowds(0), *(crowds(READERS) for _ in range(ROUNDS))
        runner.run(probe.store.aclose())
    for way, name in enumerate(WAYS):
        for part, title in enumerate(("all", "call")):
            idle = [crowds[way].idle for crowds in rounds]
            busy = [crowds[way].busy[part] for crowds in rounds]
            ratio = median(_percentile(99, one) / _percentile(99, other) for one, other in zip(busy, idle, strict=True))
            used = alone[way].in_use[part], max(crowds[way].in_use[part] for crowds in rounds)
            lines.append([name, title, *map(str, used), *_ms(idle, 50, 99), *_ms(busy, 50, 99), f"{ratio:.2f}"])
    return lines


class Crowd(NamedTuple):
    """Of a refresh that many wait for: all of it from their arrival on, and the provider's call alone."""

    in_use: list[int]  # the most connections that were taken
    idle: list[float]  # how long each read of another row took before that, in seconds
    busy: list[list[float]]  # the same in each part


async def _crowd(probe: Probe, way: Way, token: str, readers: int) -> Crowd:
    await probe.expire(token)
    idle = await _read_beside(probe, asyncio.sleep(CALL), readers)
    arrived = time.monotonic()
    reads = await _read_beside(probe, asyncio.gather(*(way(probe) for _ in range(CALLERS))), readers)
    called, answered = max(_when([probe.log], "call")), max(_when([probe.log], "answer"))
    return Crowd(
        [_most_in_use(probe.log, start, answered) for start in (arrived, called)],
        [length for _, length in idle],
        [[length for began, length in reads if start <= began <= answered] for start in (arrived, called)],
    )


def _most_in_use(log: Log, start: float, end: float) -> int:
    numbers = accumulate({"checkout": 1, "checkin": -1}.get(what, 0) for _, what in log)
    return max((number for (at, _), number in zip(log, numbers, strict=True) if start <= at <= end), default=0)


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


def waits(url: str) -> Table:
    """From the commit of new tokens until another process that waits for them has them."""
    lengths: list[float] = []
    with _provider(url, CALL, WAITS) as (target, tokens):
        for logs in _all_want(target, tokens, 1 + WAITERS):
            [committed] = _when(logs, "commit")
            lengths += [max(_when([log], "done")) - committed for log in logs if not _when([log], "call")]
    return [[str(WAITERS), str(len(lengths)), *_ms([lengths], 50, 95, 100)]]


def statements(url: str) -> Table:
    """What 100 processes send to the database while they wait for a provider that takes ten seconds."""
    with _provider(url, LONG_CALL, 1) as (target, tokens):
        [logs] = _all_want(target, tokens, FLEET)
    [called], [answered] = _when(logs, "call"), _when(logs, "answer")
    lines = []
    for part, start in (("call", called), (f"call after {STAMPEDE:g} s", called + STAMPEDE)):
        kinds = [_when(logs, kind) for kind in ("read", "other", "checkout")]
        rates = [sum(start <= at <= answered for at in times) / (answered - start) for times in kinds]
        lines.append([part, *(f"{rate:.0f}" for rate in (rates[0] + rates[1], *rates))])
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
MEASUREMENTS: dict[str, tuple[Callable[[str], Table], list[str]]] = {
    "bystanders": (
        bystanders,
        ["way", "part", "in use", "with reads", "idle p50, ms", "p99", "busy p50, ms", "p99", "p99 ratio"],
    ),
    "waits": (waits, ["waiting processes", "waits", "p50, ms", "p95", "longest"]),
    "statements": (statements, ["part", "statements/s", "reads of the row/s", "others/s", "pings/s"]),
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
    console.Console(width=120).print(grid)


def main() -> None:
    """Measure and print; an error ends the run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refresh", description=__doc__)
    parser.add_argument("urls", nargs="*", metavar="URL")
    parser.add_argument("--only", choices=MEASUREMENTS, action="append", help="may be repeated")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        urls = arguments.urls
        if not urls:
            sys.path.append(str(Path(__file__).parents[1] / "tests"))
            servers: Any = importlib.import_module("servers")
            urls = [f"sqlite:///{folder}/t.db", servers.postgres().url("asyncpg"), servers.mariadb().url("asyncmy")]
        for name in arguments.only or MEASUREMENTS:
            measure, columns = MEASUREMENTS[name]
            lines = [[make_url(url).drivername, *line] for url in urls for line in measure(url)]
            _show(str(measure.__doc__), ["database", *columns], lines)


if __name__ == "__main__":
    main()
