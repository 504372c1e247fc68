"""What a refresh costs everybody else: ``python -m benchmarks.refresh [URL …]``, in the root of the checkout.

Each database gets a table of its own for the time of the run; without a URL, the private servers of the tests are
started. The provider is real, over HTTP, in a process of its own. It counts: a refresh too many is an error.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from secrets import token_hex
from statistics import median
from typing import Any, ClassVar, Final, NamedTuple

from sqlalchemy import event, make_url

from tokenstore import Keyring, open_store
from tokenstore.records import TokenRecord
from tokenstore.store import AuthTokenStore
from tokenstore.testing.provider import StrictRotatingProvider, refresh_over_http

ROUNDS, CALLERS, POOL_SIZE, READERS, OTHER_ROWS, A_CALL = 5, 200, 10, 4, 50, 1.0
WAITS, WAITERS = 20, 15
FLEET, A_LONG_CALL, STAMPEDE = 100, 10.0, 3.0

KEY = ("provider", "user")
HOUR: Final = timedelta(hours=1)
_PATIENCE: Final = 120.0
# Children begin as copies of one process that has imported everything.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tokenstore_sql.base", "tokenstore.testing.provider", "httpx"])

Table = list[list[str]]


class Target(NamedTuple):
    """A table, and the provider of its tokens."""

    url: str
    table: str
    token_url: str
    client: dict[str, str]


@dataclass
class Notes:
    """What a process did, and when, in seconds of the machine's monotonic clock."""

    calls: list[tuple[float, float]] = field(default_factory=list)  # of the provider: begin and end
    commits: list[float] = field(default_factory=list)  # of new tokens
    reads: list[float] = field(default_factory=list)  # statements that read the table
    others: list[float] = field(default_factory=list)  # all other statements
    checkouts: list[float] = field(default_factory=list)  # each of them pings the server
    in_use: list[tuple[float, int]] = field(default_factory=list)  # connections, at each change
    done: float = 0.0


class Probe:
    """A store, and notes of what it does."""

    def __init__(self, target: Target) -> None:
        self.notes = Notes()
        self.target = target
        options: dict[str, Any] = {"table": target.table, "pool_size": POOL_SIZE}
        self.store: AuthTokenStore = open_store(
            target.url, keyring=Keyring({"k1": bytes(32)}), refreshers={KEY[0]: self.refresh}, **options
        )
        self.backend: Any = self.store._backend
        engine, complete_lease = self.backend._engine.sync_engine, self.backend.complete_lease
        event.listen(engine, "before_cursor_execute", lambda *arguments: self._sent(arguments[2]))
        event.listen(engine.pool, "checkout", lambda *_: self._took(1))
        event.listen(engine.pool, "checkin", lambda *_: self._took(-1))

        async def complete(*arguments: Any, **named: Any) -> bool:
            written: bool = await complete_lease(*arguments, **named)
            self.notes.commits.append(time.monotonic())
            return written

        self.backend.complete_lease = complete

    def _sent(self, statement: str) -> None:
        reads = statement.lstrip().startswith("SELECT") and self.target.table in statement
        (self.notes.reads if reads else self.notes.others).append(time.monotonic())

    def _took(self, change: int) -> None:
        self.notes.in_use.append((time.monotonic(), self.notes.in_use[-1][1] + change if self.notes.in_use else change))
        if change > 0:
            self.notes.checkouts.append(time.monotonic())

    async def refresh(self, record: TokenRecord) -> dict[str, Any]:
        """Call the provider."""
        began = time.monotonic()
        new = await refresh_over_http(self.target.token_url, record["refresh_token"], **self.target.client, timeout=60)
        self.notes.calls.append((began, time.monotonic()))
        return new

    async def expire(self, refresh_token: str) -> None:
        """Store a new grant, whose access token has expired."""
        await self.store.store_tokens(*KEY, "expired", refresh_token, datetime.now(UTC) - HOUR)

    async def load_leased(self) -> object:
        """A valid token, by the engine."""
        return await self.store.load_fresh_tokens(*KEY)

    async def load_locked(self) -> object:
        """A valid token, by the three steps under a row lock."""
        async with self.store.transaction() as transaction:
            record = await transaction.load_tokens(*KEY, for_update=True)
            if record is not None and not self.store.is_access_token_valid(record):
                new = await self.refresh(record)
                expires_at = datetime.now(UTC) + timedelta(seconds=new["expires_in"])
                await transaction.store_tokens(*KEY, new["access_token"], new["refresh_token"], expires_at)
            return record


# Processes


class Child:
    """A process, and the messages to and from it."""

    def __init__(self, serve: Callable[..., None], *arguments: object) -> None:
        self._pipe, there = _context.Pipe()
        self._process = _context.Process(target=serve, args=(there, *arguments), daemon=True)
        self._process.start()
        there.close()

    def ask(self, message: object) -> Child:
        self._pipe.send(message)
        return self

    def answer(self) -> Any:
        """Wait for its next message."""
        if not self._pipe.poll(_PATIENCE):
            raise TimeoutError(f"no answer from a process within {_PATIENCE:g} s")
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()
        self._process.join(_PATIENCE)


def _provide(pipe: Connection, latency: float, grants: int) -> None:
    with StrictRotatingProvider(latency=latency) as provider:
        tokens = [provider.new_grant("user")["refresh_token"] for _ in range(grants)]
        client = {"client_id": provider.client_id, "client_secret": provider.client_secret}
        pipe.send((provider.token_url, client, tokens))
        pipe.recv()
        stats = provider.stats()
        pipe.send((stats.requests, stats.refreshes, stats.reuses))


@contextmanager
def provider(url: str, latency: float, grants: int) -> Iterator[tuple[Target, list[str]]]:
    """A table, and refresh tokens of a provider, each of which has to be used once by the end."""
    child = Child(_provide, latency, grants)
    try:
        token_url, client, tokens = child.answer()
        target = Target(url, f"bench_{token_hex(8)}", token_url, client)
        asyncio.run(_with_table(target, "setup"))
        try:
            yield target, tokens
        finally:
            asyncio.run(_with_table(target, "drop"))
        if (counted := child.ask("stop").answer()) != (grants, grants, 0):
            raise RuntimeError(f"{grants} refreshes were due; requests, refreshes and reuses were {counted}")
    finally:
        child.close()


async def _with_table(target: Target, action: str) -> None:
    probe = Probe(target)
    async with probe.store:
        await getattr(probe.backend, action)()


def _want(pipe: Connection, target: Target) -> None:
    """Whenever told to, want a valid token; send what was noted until it was there."""

    async def want() -> Notes:
        await probe.load_leased()
        notes, probe.notes = probe.notes, Notes(in_use=probe.notes.in_use[-1:])
        notes.done = time.monotonic()
        return notes

    probe = Probe(target)
    with asyncio.Runner() as runner:
        runner.run(probe.store.load_tokens(*KEY))  # connects
        pipe.send("ready")
        try:
            while pipe.recv():
                pipe.send(runner.run(want()))
        except EOFError:
            runner.run(probe.store.aclose())


def all_want(target: Target, tokens: Sequence[str], count: int) -> Iterator[list[Notes]]:
    """For each token: processes that all want a valid one at once, and their notes."""
    children = [Child(_want, target) for _ in range(count)]
    try:
        for child in children:
            child.answer()
        for token in tokens:
            asyncio.run(_expire(target, token))
            yield [child.answer() for child in [child.ask("go") for child in children]]
    finally:
        for child in children:
            child.close()


async def _expire(target: Target, token: str) -> None:
    probe = Probe(target)
    async with probe.store:
        await probe.expire(token)


# Measurements


def bystanders(url: str) -> Table:
    """200 callers in one process wait for a provider that takes a second, while others read other rows."""
    ways = {"lease": Probe.load_leased, "row lock": Probe.load_locked}
    with provider(url, A_CALL, len(ways) * (1 + ROUNDS)) as (target, tokens):
        return asyncio.run(_bystanders(target, ways, tokens))


async def _bystanders(target: Target, ways: dict[str, Callable[[Probe], Awaitable[object]]], tokens: list[str]) -> Table:
    lines: Table = []
    probe = Probe(target)
    async with probe.store:
        for number in range(OTHER_ROWS):
            await probe.store.store_tokens("other", str(number), "access", "refresh", datetime.now(UTC) + HOUR)
        unread = {name: await _crowd(probe, way, tokens.pop(), readers=0) for name, way in ways.items()}
        rounds = [{name: await _crowd(probe, way, tokens.pop()) for name, way in ways.items()} for _ in range(ROUNDS)]
    for name in ways:
        measured = [each[name] for each in rounds]
        idle = [length for crowd in measured for length in crowd.idle]
        for of, part in enumerate(Crowd.PARTS):
            busy = [length for crowd in measured for length in crowd.busy[of]]
            ratio = median(at(99, crowd.busy[of]) / at(99, crowd.idle) for crowd in measured)
            used = str(unread[name].in_use[of]), str(max(crowd.in_use[of] for crowd in measured))
            lines.append([name, part, *used, ms(50, idle), ms(99, idle), ms(50, busy), ms(99, busy), f"{ratio:.2f}"])
    return lines


@dataclass(frozen=True)
class Crowd:
    """One refresh that many wait for, in two parts: from their arrival on, and while the provider is asked.

    Attributes:
        in_use: The most connections that were taken in each part.
        idle: How long a read of another row took before all that, in seconds.
        busy: The same in each part.
    """

    PARTS: ClassVar = ("arrival, call", "call")

    in_use: list[int]
    idle: list[float]
    busy: list[list[float]]


async def _crowd(probe: Probe, way: Callable[[Probe], Awaitable[object]], token: str, readers: int = READERS) -> Crowd:
    await probe.expire(token)
    idle = await _read_beside(probe, asyncio.sleep(A_CALL), readers)
    arrived = time.monotonic()
    reads = await _read_beside(probe, asyncio.gather(*(way(probe) for _ in range(CALLERS))), readers)
    began, ended = probe.notes.calls[-1]
    return Crowd(
        [max(_in_use(probe, start, ended)) for start in (arrived, began)],
        [length for _, length in idle],
        [[length for at, length in reads if start <= at <= ended] for start in (arrived, began)],
    )


def _in_use(probe: Probe, start: float, end: float) -> Iterator[int]:
    yield next((number for at, number in reversed(probe.notes.in_use) if at <= start), 0)
    yield from (number for at, number in probe.notes.in_use if start < at <= end)


async def _read_beside(probe: Probe, work: Awaitable[object], readers: int) -> list[tuple[float, float]]:
    """Read other rows until the work is done: when each read began, and how long it took, in seconds."""
    reads: list[tuple[float, float]] = []

    async def read(number: int) -> None:
        while True:
            began = time.monotonic()
            await probe.store.load_tokens("other", str(number))
            reads.append((began, time.monotonic() - began))
            await asyncio.sleep(0.005)
            number = (number + 1) % OTHER_ROWS

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(read(number)) for number in range(readers)]
        await work
        for task in tasks:
            task.cancel()
    return reads


def waits(url: str) -> Table:
    """From the commit of new tokens until another process that waits for them has them."""
    with provider(url, A_CALL, WAITS) as (target, tokens):
        lengths = []
        for everybody in all_want(target, tokens, 1 + WAITERS):
            [committed] = [at for notes in everybody for at in notes.commits]
            lengths += [notes.done - committed for notes in everybody if not notes.calls]
    return [[str(WAITERS), str(len(lengths)), *(ms(percent, lengths) for percent in (50, 95, 100))]]


def statements(url: str) -> Table:
    """What a fleet sends to the database while it waits for a slow provider."""
    with provider(url, A_LONG_CALL, 1) as (target, tokens):
        [everybody] = all_want(target, tokens, FLEET)
    [(began, ended)] = [call for notes in everybody for call in notes.calls]
    lines: Table = []
    for part, start in (("whole call", began), (f"after its first {STAMPEDE:g} s", began + STAMPEDE)):
        rates = [
            sum(start <= at <= ended for notes in everybody for at in getattr(notes, kind)) / (ended - start)
            for kind in ("reads", "others", "checkouts")
        ]
        lines.append([str(FLEET), part, *(f"{rate:.0f}" for rate in (sum(rates[:2]), *rates))])
    return lines


def at(percent: float, lengths: Sequence[float]) -> float:
    """A percentile."""
    return sorted(lengths)[max(math.ceil(len(lengths) * percent / 100), 1) - 1]


def ms(percent: float, lengths: Sequence[float]) -> str:
    """A percentile of seconds, in milliseconds."""
    return f"{at(percent, lengths) * 1000:.1f}"


MEASUREMENTS: dict[str, tuple[Callable[[str], Table], list[str]]] = {
    "bystanders": (
        bystanders,
        ["way", "part", "in use", "with reads", "idle p50", "idle p99", "busy p50", "busy p99, ms", "p99 ratio"],
    ),
    "waits": (waits, ["waiting processes", "waits", "p50, ms", "p95, ms", "longest, ms"]),
    "statements": (statements, ["processes", "during", "statements/s", "reads/s", "others/s", "pings/s"]),
}


def show(title: str, columns: Sequence[str], lines: Table) -> None:
    """Print a table."""
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        print(f"\n{title}", *map(" | ".join, [columns, *lines]), sep="\n")
        return
    table = RichTable(*columns, title=title, title_justify="left")
    for line in lines:
        table.add_row(*line)
    Console(width=max(120, Console().width)).print(table)


def _private_urls(stack: ExitStack) -> list[str]:
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import servers

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    return [f"sqlite:///{folder}/tokens.db", servers.postgres().url("asyncpg"), servers.mariadb().url("asyncmy")]


def main() -> None:
    """Measure and print; an error ends the run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refresh", description=__doc__)
    parser.add_argument("urls", nargs="*", metavar="URL")
    parser.add_argument("--only", choices=MEASUREMENTS, action="append", help="may be repeated")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        urls = arguments.urls or _private_urls(stack)
        for name in arguments.only or MEASUREMENTS:
            measure, columns = MEASUREMENTS[name]
            lines = [[make_url(url).drivername, *line] for url in urls for line in measure(url)]
            show(str(measure.__doc__), ["database", *columns], lines)


if __name__ == "__main__":
    main()
