"""``tokenstore demo``: many processes find one expired token at the same moment, in three rounds.

They use ``load_fresh_tokens``, the row lock by hand, and neither. Every number about the provider comes from the
provider's own counters, and a token counts as working only if the provider's ``/resource`` took it after the round was
over.
"""

from __future__ import annotations

import asyncio
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self, cast
from urllib.parse import parse_qsl, urlencode

from tokenstore.errors import BackendError, ConfigurationError, MissingDependencyError, TokenStoreError
from tokenstore.keyring import Keyring, generate_key
from tokenstore.records import TokenRecord
from tokenstore.registry import backend_for_url
from tokenstore.store import AuthTokenStore, open_store
from tokenstore.testing.provider import ProviderError, ProviderStats, StrictRotatingProvider, refresh_over_http

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

__all__ = ["Report", "Round", "run_demo"]

_PROVIDER: Final = "strict"
_USERS: Final = 300
# The user whose token is found expired, amid the others.
_USER: Final = "user-137"
_OWN_OPTIONS: Final = frozenset({"table", "pool_size", "lock_timeout"})
_LOCK_TIMEOUT: Final = 30.0
# Of each process; all of them together stay far below a server's usual 100 connections.
_POOL_SIZE: Final = 4
_PATIENCE: Final = 60.0
_START: Final = 0.1  # seconds from the word "go" until everybody has it
_CLEANUP: Final = 10.0

_Served = Literal["refreshed", "waited"]
_Mode = Literal["fresh", "row_lock", "neither"]
_TITLES: Final[Mapping[_Mode, str]] = {
    "fresh": "load_fresh_tokens",
    "row_lock": "Row lock",
    "neither": "Neither",
}


@dataclass(frozen=True, slots=True)
class Round:
    """What happened while all tasks at once wanted the expired token of one user.

    Attributes:
        requests: Calls of the provider's token endpoint.
        refreshes: Those that issued new tokens.
        reuses: Those that presented a refresh token which had been used already.
        grant_alive: Whether the provider takes the stored access token and has not revoked the grant.
        refreshed: Tasks that got new tokens from the provider by their own call.
        waited: Tasks that got those which another one's call had brought.
        working: Tasks whose access token the provider took once the round was over.
        errors: What the other tasks got, and how many of them.
        connections: To the database: how many all processes held while the provider was answering; None if nobody
            called it.
        wait_p50: Seconds until a waiting task had its token: the median.
        wait_max: The longest of those waits.
    """

    requests: int
    refreshes: int
    reuses: int
    grant_alive: bool
    refreshed: int
    waited: int
    working: int
    errors: Mapping[str, int]
    connections: int | None
    wait_p50: float | None
    wait_max: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """The three rounds, on one database."""

    database: str
    processes: int
    tasks: int
    users: int
    latency: float
    seconds: float
    fresh: Round
    row_lock: Round
    neither: Round

    @property
    def passed(self) -> bool:
        """Whether lease and lock did what they are there for: one call, no reuse, no error, everybody served."""
        return all(
            (found.requests, found.refreshes, found.reuses, found.working) == (1, 1, 0, self.processes * self.tasks)
            and found.grant_alive
            and not found.errors
            for found in (self.fresh, self.row_lock)
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a worker process needs to know; it travels through a pipe, so that neither key nor URL shows in ``ps``."""

    url: str
    table: str
    key: str
    base_url: str
    token_url: str
    client_id: str
    client_secret: str
    tasks: int

    @property
    def database(self) -> str:
        return self.url.partition(":")[0].partition("+")[0]

    def open_store(self) -> AuthTokenStore:
        options: dict[str, Any] = {"table": self.table, "pool_size": _POOL_SIZE, "lock_timeout": _LOCK_TIMEOUT}
        return open_store(self.url, keyring=Keyring.from_string(self.key), **options)


class _Outcome(NamedTuple):
    """What one task came to, and after how many seconds."""

    role: _Served | Literal["failed"]
    seconds: float
    error: str = ""


class _Failed(NamedTuple):
    """What ended a worker."""

    message: str


def run_demo(
    url: str | None = None, *, processes: int = 8, tasks: int = 25, latency: float = 0.5, quiet: bool = False
) -> Report:
    """Run the three rounds and show them on standard output.

    Args:
        url: The database; None: a temporary SQLite file. A table named ``tokenstore_demo_…`` is made and dropped.
        processes: How many worker processes.
        tasks: How many tasks in each.
        latency: Seconds that the provider takes to answer a refresh.
        quiet: Show nothing.

    Raises:
        ConfigurationError: The database cannot be shared by processes, or the URL is not acceptable.
        BackendError: The database refused or failed.
    """
    if url is not None and url.lower().startswith("memory:"):
        raise ConfigurationError(
            "memory:// lives inside one process, so the demo's processes could not share it: leave --url out for a "
            "temporary SQLite file, or name a database"
        )
    try:
        import httpx  # noqa: F401  # before anything was started: the refreshes go over real HTTP
    except ImportError:
        raise MissingDependencyError('the demo needs httpx: pip install "tokenstore[cli]"') from None
    begun = time.monotonic()
    display = _Display(processes * tasks, quiet=quiet)
    with ExitStack() as stack:
        interrupts = stack.enter_context(_Interrupts())
        if url is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tokenstore-demo-"))
            url = f"sqlite:///{Path(folder).as_posix()}/demo.db"
        provider = stack.enter_context(StrictRotatingProvider(latency=latency))
        plan = _Plan(
            url=_without_our_options(url),
            table=f"tokenstore_demo_{token_hex(6)}",
            key=generate_key("demo"),
            base_url=provider.base_url,
            token_url=provider.token_url,
            client_id=provider.client_id,
            client_secret=provider.client_secret,
            tasks=tasks,
        )
        display.introduce(plan, processes, tasks, latency)
        stack.enter_context(_own_table(plan))
        asyncio.run(_fill(plan, provider))
        interrupts.check()
        fleet = stack.enter_context(_Fleet(plan, processes, interrupts))
        stack.enter_context(display)
        rounds = [_round(plan, provider, fleet, display, mode) for mode in _TITLES]
    report = Report(plan.database, processes, tasks, _USERS, latency, round(time.monotonic() - begun, 3), *rounds)
    display.conclude(report)
    return report


# -- in every worker process -----------------------------------------------------------------------


def _worker(pipe: Connection, plan: _Plan) -> None:
    with suppress(EOFError, BrokenPipeError):  # the parent is gone, or done with us
        try:
            asyncio.run(_serve_rounds(pipe, plan))
        except TokenStoreError as error:
            pipe.send(_Failed(str(error)))
        except Exception as error:
            # Its class alone: nobody has checked what else it would show.
            pipe.send(_Failed(f"a worker ended with {type(error).__name__}"))
            raise


async def _serve_rounds(pipe: Connection, plan: _Plan) -> None:
    # Reading from the pipe blocks this process's event loop, where nothing else is to run between the rounds.
    import httpx

    async with plan.open_store() as store, httpx.AsyncClient(base_url=plan.base_url, trust_env=False) as client:
        while (mode := pipe.recv()) is not None:
            await store.load_tokens(_PROVIDER, _USER)  # every import done and a connection open before the start
            pipe.send("ready")
            start = pipe.recv()
            await asyncio.sleep(start - time.time())
            tasks = (_task(pipe, plan, store, mode) for _ in range(plan.tasks))
            _, *tokens = await asyncio.gather(_count(pipe, store), *tasks)
            # Only when all are through is it known what the tokens are worth.
            pipe.recv()
            answers = [
                await client.get("/resource", headers={"Authorization": f"Bearer {token}"}) for token in tokens if token
            ]
            pipe.send(sum(answer.status_code == 200 for answer in answers))


async def _count(pipe: Connection, store: Any) -> None:
    """When asked, tell how many connections are held all the while: a query that comes and goes holds none."""
    await asyncio.to_thread(pipe.recv)
    held = []
    for _ in range(20):
        held.append(store._backend._source.in_use)
        await asyncio.sleep(0.01)  # shorter than the pause between two polls of a leased row
    pipe.send(min(held))


async def _task(pipe: Connection, plan: _Plan, store: AuthTokenStore, mode: _Mode) -> str | None:
    """The access token that one task ends up with, or None."""
    import httpx

    began = time.perf_counter()
    try:
        if mode == "fresh":
            role, access_token = await _fresh(plan, store)
        else:
            async with store.transaction() as tx:
                role, access_token = await _contract(plan, store, tx, locked=mode == "row_lock")
    except (ProviderError, TokenStoreError) as error:
        outcome = _Outcome("failed", time.perf_counter() - began, str(error))
        access_token = None
    except httpx.TransportError as error:
        outcome = _Outcome("failed", time.perf_counter() - began, type(error).__name__)
        access_token = None
    else:
        outcome = _Outcome(role, time.perf_counter() - began)
    pipe.send(outcome)
    return access_token


async def _fresh(plan: _Plan, store: AuthTokenStore) -> tuple[_Served, str]:
    """The one call that the README shows."""
    role: _Served = "waited"

    async def refresh(record: TokenRecord) -> dict[str, Any]:
        nonlocal role
        role = "refreshed"
        return await _ask(plan, record)

    record: Any = await store.load_fresh_tokens(_PROVIDER, _USER, refresh=refresh)
    return role, record["access_token"]


async def _contract(plan: _Plan, store: AuthTokenStore, tx: Any, *, locked: bool) -> tuple[_Served, str]:
    """The three steps of a refresh by hand: load (with the lock or, wrongly, without), refresh, store."""
    record = await tx.load_tokens(_PROVIDER, _USER, for_update=locked)
    if store.is_access_token_valid(record):
        return "waited", record["access_token"]
    new = await _ask(plan, record)
    expires_at = datetime.now(UTC) + timedelta(seconds=new["expires_in"])
    await tx.store_tokens(_PROVIDER, _USER, new["access_token"], new["refresh_token"], expires_at)
    return "refreshed", new["access_token"]


async def _ask(plan: _Plan, record: Mapping[str, Any]) -> dict[str, Any]:
    return await refresh_over_http(
        plan.token_url, record["refresh_token"], client_id=plan.client_id, client_secret=plan.client_secret
    )


# -- in the parent ---------------------------------------------------------------------------------


class _Fleet:
    """The worker processes: one pipe each, no lock or queue between them but the database."""

    def __init__(self, plan: _Plan, processes: int, interrupts: _Interrupts) -> None:
        self._plan = plan
        self._size = processes
        self._interrupts = interrupts
        self._processes: list[SpawnProcess] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> Self:
        context = get_context("spawn")
        try:
            with self._interrupts.kept_from_children():
                for number in range(self._size):
                    ours, theirs = context.Pipe()
                    self._pipes.append(ours)
                    with theirs:
                        arguments = theirs, self._plan
                        process = context.Process(target=_worker, args=arguments, name=f"demo-{number}", daemon=True)
                        process.start()
                    self._processes.append(process)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        for pipe in self._pipes:
            pipe.close()  # a worker between rounds ends at that
        deadline = time.monotonic() + _CLEANUP
        for process in self._processes:
            if any(exc_info):
                process.terminate()
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()

    def __len__(self) -> int:
        return self._size

    def tell(self, word: object) -> None:
        """Send to all."""
        for pipe in self._pipes:
            with suppress(BrokenPipeError):  # hear() tells why
                pipe.send(word)

    def hear(self, each: int = 1) -> Iterator[tuple[int, Any]]:
        """So many messages of each worker as they come, with the worker's number.

        Raises:
            BackendError: A worker failed, or fell silent.
        """
        missing = dict.fromkeys(self._pipes, each)
        deadline = time.monotonic() + _PATIENCE
        while missing:
            self._interrupts.check()
            ready = wait(list(missing), timeout=0.1)
            if not ready and time.monotonic() > deadline:
                raise BackendError(f"{len(missing)} of the demo's processes did nothing for {_PATIENCE:g} s")
            for pipe in cast(list[Connection], ready):
                try:
                    message = pipe.recv()
                except (EOFError, ConnectionError):
                    message = _Failed("one of the demo's processes died")
                if isinstance(message, _Failed):
                    raise BackendError(message.message)
                yield self._pipes.index(pipe), message
                missing[pipe] -= 1
                if not missing[pipe]:
                    del missing[pipe]


def _round(plan: _Plan, provider: StrictRotatingProvider, fleet: _Fleet, display: _Display, mode: _Mode) -> Round:
    display.begin(_TITLES[mode])
    asyncio.run(_expire(plan, provider))
    fleet.tell(mode)
    for _ in fleet.hear():
        pass
    before = provider.stats()
    outcomes: list[tuple[int, _Outcome]] = []
    held: list[int] = []
    with ExitStack() as answers:
        answers.enter_context(provider.hold())  # until all have counted their connections
        fleet.tell(time.time() + _START)
        with suppress(TimeoutError):  # the outcomes will say why nobody calls it
            provider.wait_for_requests(before.requests + 1)
        time.sleep(provider.latency / 2)
        called = provider.stats().in_flight > 0
        fleet.tell("count your connections")
        for number, message in fleet.hear(plan.tasks + 1):
            if isinstance(message, _Outcome):
                outcomes.append((number, message))
                display.advance(number, message)
                continue
            held.append(message)
            if len(held) == len(fleet):
                answers.close()
    fleet.tell("all are through")
    working = sum(count for _, count in fleet.hear())
    after = provider.stats()
    display.end()
    alive = asyncio.run(_stored_token_works(plan))
    return _evaluate(outcomes, working, sum(held) if called else None, before, after, alive=alive)


def _evaluate(
    outcomes: Sequence[tuple[int, _Outcome]],
    working: int,
    connections: int | None,
    before: ProviderStats,
    after: ProviderStats,
    *,
    alive: bool,
) -> Round:
    roles = Counter(outcome.role for _, outcome in outcomes)
    waits = sorted(outcome.seconds for _, outcome in outcomes if outcome.role == "waited")
    return Round(
        requests=after.requests - before.requests,
        refreshes=after.refreshes - before.refreshes,
        reuses=after.reuses - before.reuses,
        grant_alive=alive and after.revoked_grants == before.revoked_grants,
        refreshed=roles["refreshed"],
        waited=roles["waited"],
        working=working,
        errors=dict(Counter(outcome.error for _, outcome in outcomes if outcome.role == "failed").most_common()),
        connections=connections,
        wait_p50=round(statistics.median(waits), 3) if waits else None,
        wait_max=round(waits[-1], 3) if waits else None,
    )


async def _fill(plan: _Plan, provider: StrictRotatingProvider) -> None:
    async with plan.open_store() as store:
        await store.setup()
        async with store.transaction() as tx:
            for number in range(_USERS):
                await _log_in(tx, provider, f"user-{number:03}", timedelta(hours=1))


async def _expire(plan: _Plan, provider: StrictRotatingProvider) -> None:
    """Log the one user in anew, with an access token that has run out meanwhile."""
    async with plan.open_store() as store:
        await _log_in(store, provider, _USER, timedelta(minutes=-5))


async def _log_in(store: Any, provider: StrictRotatingProvider, user: str, lifetime: timedelta) -> None:
    grant = provider.new_grant(user)
    expires_at = datetime.now(UTC) + lifetime
    await store.store_tokens(_PROVIDER, user, grant["access_token"], grant["refresh_token"], expires_at)


async def _stored_token_works(plan: _Plan) -> bool:
    import httpx

    async with plan.open_store() as store, httpx.AsyncClient(base_url=plan.base_url, trust_env=False) as client:
        record = await store.load_tokens(_PROVIDER, _USER)
        if record is None:
            return False
        answer = await client.get("/resource", headers={"Authorization": f"Bearer {record['access_token']}"})
        return answer.status_code == 200


@contextmanager
def _own_table(plan: _Plan) -> Iterator[None]:
    """Drop the demo's table at the end, however that comes about."""
    try:
        yield
    except BaseException:
        with suppress(TokenStoreError):  # what failed before may well keep this from working, and says why
            asyncio.run(_drop_table(plan))
        raise
    asyncio.run(_drop_table(plan))


async def _drop_table(plan: _Plan) -> None:
    backend: Any = backend_for_url(plan.url, {"table": plan.table})
    try:
        async with asyncio.timeout(_CLEANUP):
            await backend.drop()
    except TimeoutError:
        raise BackendError(f"the demo's table {plan.table} could not be dropped within {_CLEANUP:g} s") from None
    finally:
        await backend.aclose()


def _without_our_options(url: str) -> str:
    """The URL without the options that the demo sets, so that none of them can name somebody's table."""
    base, _, query = url.partition("?")
    kept = [(name, value) for name, value in parse_qsl(query, keep_blank_values=True) if name not in _OWN_OPTIONS]
    return f"{base}?{urlencode(kept)}" if kept else base


class _Interrupts:
    """Ctrl-C and SIGTERM, held until all that has been started can be cleaned up. A second one is not held."""

    def __init__(self) -> None:
        self._caught = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others can and need not handle signals
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        insists = self._caught != 0
        self._caught = number
        if insists:
            self.check()

    def check(self) -> None:
        """Where it is safe: end, if somebody asked for that."""
        if self._caught == signal.SIGINT:
            raise KeyboardInterrupt
        if self._caught:
            sys.exit(128 + self._caught)

    @contextmanager
    def kept_from_children(self) -> Iterator[None]:
        """Processes started inside ignore Ctrl-C, which reaches a whole terminal: it is the parent that ends them."""
        if not self._before:
            yield
            return
        ours = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a child inherits
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, ours)


# -- what there is to see --------------------------------------------------------------------------


class _Display:
    """The demo on standard output: bars on a terminal, plain lines elsewhere, nothing if quiet."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._total = total
        self._console = Console(quiet=quiet, highlight=False)
        self._live = self._console.is_terminal and not quiet
        # rich would cut lines at 80 columns where there is no terminal to measure.
        self._console.soft_wrap = not self._live
        note = TextColumn("{task.fields[note]}")
        columns = (TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn(), note)
        self._progress = Progress(*columns, console=self._console, disable=not self._live)

    def introduce(self, plan: _Plan, processes: int, tasks: int, latency: float) -> None:
        self._console.print(
            f"[bold]{processes} processes with {tasks} tasks each want one expired token at the same moment.[/]\n"
            f"The store: {plan.database}, {_USERS} users in a table of the demo's own.\n"
            f"The provider: on loopback, answers in {latency:g} s, gives a new refresh token each time\n"
            "and revokes the user's grant if an old one is used twice.\n"
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def begin(self, title: str) -> None:
        self._title = f"{title:{max(map(len, _TITLES.values()))}}"
        self._roles: Counter[str] = Counter()
        self._by = 0
        self._bar = self._progress.add_task(self._title, total=self._total, note="")

    def advance(self, number: int, outcome: _Outcome) -> None:
        self._roles[outcome.role] += 1
        if outcome.role == "refreshed":
            self._by = number + 1
        self._progress.update(self._bar, advance=1, note=self._note())

    def end(self) -> None:
        if not self._live:
            self._console.print(f"{self._title}  {self._note()}")

    def _note(self) -> str:
        refreshed = self._roles["refreshed"]
        notes = [f"process {self._by} refreshed" if refreshed == 1 else f"{refreshed} refreshed"]
        notes += [f"{self._roles[role]} {role}" for role in ("waited", "failed") if self._roles[role]]
        return ", ".join(notes)

    def conclude(self, report: Report) -> None:
        from rich import box
        from rich.table import Table

        rounds = dict(zip(_TITLES.values(), (report.fresh, report.row_lock, report.neither), strict=True))
        table = Table("", box=box.SIMPLE_HEAD, pad_edge=False)
        for title, found in rounds.items():
            table.add_column(title, header_style="bold", style="green" if found.working == self._total else "red")

        def row(label: str, cell: Callable[[Round], str]) -> None:
            table.add_row(label, *map(cell, rounds.values()))

        row("Calls of the provider", lambda found: str(found.requests))
        row("  that got new tokens", lambda found: str(found.refreshes))
        row("  with a used refresh token", lambda found: str(found.reuses))
        row("Connections held meanwhile", lambda found: _or_dash(found.connections))
        row("Median wait", lambda found: _or_dash(found.wait_p50, ".1f", " s"))
        row("Longest wait", lambda found: _or_dash(found.wait_max, ".1f", " s"))
        row("Tasks with an error", lambda found: str(sum(found.errors.values())))
        row("Tasks with a working token", lambda found: f"{found.working} of {self._total}")
        row("The user's grant", lambda found: "alive" if found.grant_alive else "revoked")
        self._console.print(table)
        for title, found in rounds.items():
            for error, count in found.errors.items():
                self._console.print(f"{title}, {count} times: {error}", markup=False)
        verdict = (
            "[green]Lease and lock held:[/] one refresh served every task"
            if report.passed
            else "[red]Lease or lock did not hold:[/] please report this with the output of `tokenstore demo --json`"
        )
        self._console.print(f"{verdict} ({report.seconds:.0f} s).")


def _or_dash(number: float | None, form: str = "", unit: str = "") -> str:
    return "-" if number is None else f"{number:{form}}{unit}"
