"""How a refresh slows other callers: ``python -m benchmarks.refresh [URL …]``, in the root of the checkout.

The program creates a table on each database and drops it at the end. Without a URL, it starts the private servers of
the tests. The provider is an HTTP server in another process; if it gets more token requests than expected, the run
fails.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import multiprocessing
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

from benchmarks.databases import private_urls
from tokenstore import Keyring, open_store
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.records import RefreshableRecord, TokenKey
from tokenstore.refresh.gates import DEFAULT_CONCURRENCY
from tokenstore.store import AuthTokenStore
from tokenstore.testing.provider import StrictRotatingProvider, refresh_over_http

KEY = ("provider", "user")
CLIENT = {"client_id": "demo-client", "client_secret": "demo-secret"}
HOUR = timedelta(hours=1)
# Processes are forked from a server process that has imported everything, so that they start fast.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tokenstore_sql.backend", "tokenstore.testing.provider", "httpx"])


class Scale(NamedTuple):
    """How much is measured; times in seconds.

    Attributes:
        callers: Callers in one process that need the same token.
        pool_size: The maximum number of connections of that process.
        readers: Callers that read other rows meanwhile.
        rounds: Rounds for each load method.
        call: Duration of the provider's call.
        waiters: Processes that wait for another process's refresh.
        waits: The number of such refreshes.
        fleet: Processes whose statements are counted.
        long_call: Duration of the provider's call while statements are counted.
        settling: Time after which the processes poll at their longest interval.
        hanging: Callers of one process whose provider does not answer.
        refreshes: The number of refreshes of another provider's users, before and beside them.
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
    settling: float = 3.0
    hanging: int = 400
    refreshes: int = 300


QUICK = Scale(
    callers=20,
    rounds=1,
    call=0.5,
    waiters=2,
    waits=2,
    fleet=3,
    long_call=1.0,
    settling=0.5,
    hanging=40,
    refreshes=5,
)

Target = tuple[str, str, str, Scale]  # a URL, a table, the URL of the provider
Table = list[list[str]]
Log = list[tuple[float, str]]
LoadMethod = Callable[["Probe"], Awaitable[object]]


class Probe:
    """A store with a log of what it does; times are of the machine's monotonic clock, in seconds.

    The log has statements (``read``, a SELECT from the table, and ``other``), the beginning and the end of a provider
    call (``call``, ``answer``), the ``commit`` of new tokens, and ``done``. ``in_use`` records each change of the
    number of connections in use. The provider is called only when the callers that ``expect_reads`` announced have
    read the row.
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
        self._unread = 0
        self._all_read = asyncio.Event()
        self._all_read.set()
        backend: Any = self.store._backend
        self.backend = backend
        self._pool = pool = backend._source
        pool._connect = self._noting_statements(pool._connect)
        # Every connection is taken and returned by one of these methods.
        pool.take, pool.put_back = map(self._noting_use, (pool.take, pool.put_back))
        pool._open = self._noting_opened(pool._open)
        backend.get = self._noting_reads(backend.get)

    def expect_reads(self, callers: int) -> None:
        """Put off the next call of the provider until so many callers have read the row."""
        self._unread = callers
        self._all_read.clear()

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

    def _noting_reads(self, get: Callable[[TokenKey], Awaitable[Any]]) -> Callable[[TokenKey], Awaitable[Any]]:
        async def noted(key: TokenKey) -> Any:
            row = await get(key)
            if key.provider == KEY[0] and self._unread:
                self._unread -= 1
                if not self._unread:
                    self._all_read.set()
            return row

        return noted

    async def refresh(self, record: RefreshableRecord) -> dict[str, Any]:
        """Call the provider."""
        await self._all_read.wait()
        self._note("call")
        new = await refresh_over_http(self.token_url, record["refresh_token"], **CLIENT, timeout=60)
        self._note("answer")
        return new

    async def expire(self, refresh_token: str) -> None:
        """Store the tokens of a new grant with an expired access token, and the rows that other callers read."""
        await self.store.store_tokens(*KEY, "expired", refresh_token, datetime.now(UTC) - HOUR)
        for number in range(self._readers):
            await self.store.store_tokens("other", str(number), "access", "refresh", datetime.now(UTC) + HOUR)

    async def load_leased(self) -> None:
        """Get a valid token from the refresh engine."""
        await self.store.load_fresh_tokens(*KEY)
        self._note("done")

    async def load_locked(self) -> None:
        """Get a valid token under a row lock: load for update, refresh, store."""
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
    """Create a table and grants of a provider; at the end each refresh token must have been used exactly once."""
    with StrictRotatingProvider(latency=latency) as provider:
        target = url, f"bench_{token_hex(8)}", provider.token_url, scale
        asyncio.run(_once(target, lambda probe: probe.store.setup()))
        try:
            yield target, [provider.new_grant("user")["refresh_token"] for _ in range(grants)]
        finally:
            asyncio.run(_once(target, lambda probe: probe.backend.drop()))
        stats = provider.stats()
        if (stats.requests, stats.refreshes, stats.reuses) != (grants, grants, 0):
            raise RuntimeError(f"expected {grants} refreshes, but got {stats}")


async def _once(target: Target, action: LoadMethod) -> None:
    probe = Probe(target)
    async with probe.store:
        await action(probe)


def bystanders(url: str, scale: Scale) -> Table:
    """Reads of other rows while many callers in one process wait for a slow provider."""
    # The measured callers run in another process, so that the provider takes no time from their event loop.
    grants = len(LOAD_METHODS) * (1 + scale.rounds)
    with _provider(url, scale, scale.call, grants) as served, ProcessPoolExecutor(1, _context) as process:
        return process.submit(_bystanders, *served).result()


def _bystanders(target: Target, tokens: list[str]) -> Table:
    lines: Table = []
    with asyncio.Runner() as runner:
        probe, scale = Probe(target), target[-1]

        def measure_all(readers: int) -> list[SharedRefresh]:
            return [
                runner.run(_measure(probe, method, tokens.pop(), scale, readers)) for method in LOAD_METHODS.values()
            ]

        alone, *rounds = measure_all(0), *(measure_all(scale.readers) for _ in range(scale.rounds))
        runner.run(probe.store.aclose())
    for index, name in enumerate(LOAD_METHODS):
        for part, title in enumerate(("all", "call")):
            idle = [refreshes[index].idle for refreshes in rounds]
            busy = [refreshes[index].busy[part] for refreshes in rounds]
            ratio = median(_percentile(99, one) / _percentile(99, other) for one, other in zip(busy, idle, strict=True))
            used = alone[index].in_use[part], max(refreshes[index].in_use[part] for refreshes in rounds)
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


class SharedRefresh(NamedTuple):
    """A refresh for which many callers wait. There are two parts: from their first call, and the provider's call alone.

    Attributes:
        in_use: The most connections in use, for each part; of the provider's call only the second half counts, when the
            connections of the callers' reads have long been returned.
        idle: Seconds that each read of another row took before the refresh.
        busy: Seconds that each read of another row took, for each part.
    """

    in_use: list[int]
    idle: list[float]
    busy: list[list[float]]


async def _measure(probe: Probe, method: LoadMethod, token: str, scale: Scale, readers: int) -> SharedRefresh:
    await probe.expire(token)
    idle = await _read_beside(probe, asyncio.sleep(scale.call), readers)
    if method is Probe.load_leased:  # with a row lock, a caller reads the row when the callers before it are done
        probe.expect_reads(scale.callers)
    arrived = time.monotonic()
    reads = await _read_beside(probe, asyncio.gather(*(method(probe) for _ in range(scale.callers))), readers)
    called, answered = max(_when([probe.log], "call")), max(_when([probe.log], "answer"))
    return SharedRefresh(
        [_most_in_use(probe.in_use, start, answered) for start in (arrived, (called + answered) / 2)],
        [length for _, length in idle],
        [[length for began, length in reads if start <= began <= answered] for start in (arrived, called)],
    )


def _most_in_use(numbers: Sequence[tuple[float, int]], start: float, end: float) -> int:
    before = [number for at, number in numbers if at < start]
    return max([*before[-1:], *(number for at, number in numbers if start <= at <= end)], default=0)


async def _read_beside(probe: Probe, work: Awaitable[object], readers: int) -> list[tuple[float, float]]:
    """Read other rows until the work is done; return when each read began and how long it took, in seconds."""
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
    """Time from the commit of new tokens until a waiting process has them."""
    lengths: list[float] = []
    with _provider(url, scale, scale.call, scale.waits) as (target, tokens):
        for logs in _all_load(target, tokens, 1 + scale.waiters):
            [committed] = _when(logs, "commit")
            lengths += [max(_when([log], "done")) - committed for log in logs if not _when([log], "call")]
    return [[str(scale.waiters), str(len(lengths)), *_ms([lengths], 50, 95, 100)]]


def statements(url: str, scale: Scale) -> Table:
    """Statements that many processes send to the database while they wait for a slow provider."""
    with _provider(url, scale, scale.long_call, 1) as (target, tokens):
        [logs] = _all_load(target, tokens, scale.fleet)
    [called], [answered] = _when(logs, "call"), _when(logs, "answer")
    lines = []
    for part, start in (("call", called), (f"call after {scale.settling:g} s", called + scale.settling)):
        kinds = [_when(logs, kind) for kind in ("read", "other")]
        rates = [sum(start <= at <= answered for at in times) / (answered - start) for times in kinds]
        lines.append([str(scale.fleet), part, *(f"{rate:.0f}" for rate in (sum(rates), *rates))])
    return lines


def hanging(url: str, scale: Scale) -> Table:
    """Refreshes of one provider's users while another provider accepts connections and never answers."""
    return asyncio.run(_hanging(url, scale))


async def _hanging(url: str, scale: Scale) -> Table:
    connections: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: connections.append(writer), "127.0.0.1", 0)
    silent = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/token"
    with StrictRotatingProvider(latency=0.005) as healthy:
        store = open_store(
            url,
            keyring=Keyring({"k1": bytes(32)}),
            refreshers={
                "hanging": OAuth2Refresher(silent, "id", "secret"),
                "healthy": OAuth2Refresher(healthy.token_url, healthy.client_id, healthy.client_secret),
            },
            table=f"bench_{token_hex(8)}",
            pool_size=scale.pool_size,
        )
        backend: Any = store._backend
        await store.setup()
        try:
            expired = datetime.now(UTC) - HOUR
            for number in range(scale.hanging):
                await store.store_tokens("hanging", str(number), "expired", "refresh", expired)

            async def refreshes(name: str) -> list[float]:
                lengths = []
                for number in range(scale.refreshes):
                    user = f"{name} {number}"
                    await store.store_tokens(
                        "healthy", user, "expired", healthy.new_grant(user)["refresh_token"], expired
                    )
                    began = time.monotonic()
                    await store.load_fresh_tokens("healthy", user)
                    lengths.append(time.monotonic() - began)
                return lengths

            await refreshes("first")  # opens connections, and imports what is needed
            idle, before = await refreshes("idle"), _descriptors()
            users = [asyncio.create_task(store.load_fresh_tokens("hanging", str(n))) for n in range(scale.hanging)]
            while len(connections) < min(scale.hanging, DEFAULT_CONCURRENCY):  # noqa: ASYNC110 - nothing to await
                await asyncio.sleep(0.01)
            busy = await refreshes("busy")
            descriptors = _descriptors() - before
            for writer in connections:
                writer.close()
            await asyncio.gather(*users, return_exceptions=True)
        finally:
            await backend.drop()
            await store.aclose()
            server.close()
    ratio = _percentile(99, busy) / _percentile(99, idle)
    return [[str(scale.hanging), *_ms([idle], 50, 99), *_ms([busy], 50, 99), f"{ratio:.2f}", str(descriptors)]]


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _all_load(target: Target, tokens: Sequence[str], count: int) -> Iterator[list[Log]]:
    """For each refresh token, let all processes load a valid access token at once, and yield their logs."""
    barrier = _context.Barrier(count)
    with ProcessPoolExecutor(count, _context, _open, (target, barrier)) as processes:
        for token in tokens:
            asyncio.run(_once(target, lambda probe, token=token: probe.expire(token)))  # type: ignore[misc]
            yield list(processes.map(_load, range(count)))


_process_state: list[tuple[asyncio.Runner, Probe, Barrier]] = []


def _open(target: Target, barrier: Barrier) -> None:
    _process_state.append((asyncio.Runner(), Probe(target), barrier))
    runner, probe, _ = _process_state[0]
    runner.run(probe.store.load_tokens(*KEY))  # opens the connection before the measurement


def _load(_: int) -> Log:
    runner, probe, barrier = _process_state[0]
    barrier.wait(120)  # each process waits here, so that each gets exactly one job
    probe.log.clear()
    runner.run(probe.load_leased())
    return probe.log


def _when(logs: Sequence[Log], wanted: str) -> list[float]:
    return [at for log in logs for at, what in log if what == wanted]


def _percentile(percent: float, lengths: Sequence[float]) -> float:
    return sorted(lengths)[max(math.ceil(len(lengths) * percent / 100), 1) - 1]


def _ms(lengths: Sequence[list[float]], *percents: float) -> list[str]:
    return [f"{_percentile(percent, [*chain(*lengths)]) * 1000:.1f}" for percent in percents]


LOAD_METHODS: dict[str, LoadMethod] = {"lease": Probe.load_leased, "row lock": Probe.load_locked}
MEASUREMENTS: dict[str, tuple[Callable[[str, Scale], Table], list[str]]] = {
    "bystanders": (
        bystanders,
        [
            "callers",
            "method",
            "part",
            "in use",
            "with reads",
            "idle p50, ms",
            "p99",
            "busy p50, ms",
            "p99",
            "p99 ratio",
        ],
    ),
    "hanging": (
        hanging,
        ["hanging callers", "idle p50, ms", "p99", "beside p50, ms", "p99", "p99 ratio", "more descriptors"],
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
    parser.add_argument(
        "--quick", action="store_true", help="a short run that tests the program; its figures are not meaningful"
    )
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else Scale()
    with tempfile.TemporaryDirectory() as folder:
        urls = arguments.urls or private_urls(folder)
        for name in arguments.only or MEASUREMENTS:
            measure, columns = MEASUREMENTS[name]
            lines = [[make_url(url).drivername, *line] for url in urls for line in measure(url, scale)]
            _show(str(measure.__doc__), ["database", *columns], lines)


if __name__ == "__main__":
    main()
