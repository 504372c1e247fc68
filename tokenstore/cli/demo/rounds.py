"""The demo's three rounds.

They use ``load_fresh_tokens``, the row lock by hand, and neither. Every number about the provider comes from the
provider's own counters, and a token counts as working only if the provider's ``/resource`` accepted it after the round.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from secrets import token_hex
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

from tokenstore.cli.demo.display import Display
from tokenstore.cli.demo.fleet import CLEANUP_TIMEOUT, Fleet, Interrupts
from tokenstore.cli.demo.plan import (
    OWN_OPTIONS,
    PROVIDER,
    TITLES,
    USER,
    USERS,
    DemoReport,
    Mode,
    Plan,
    Round,
    TaskResult,
)
from tokenstore.errors import BackendError, ConfigurationError, MissingDependencyError, TokenStoreError
from tokenstore.keyring import generate_key
from tokenstore.registry import backend_for_url
from tokenstore.testing.provider import ProviderStats, StrictRotatingProvider

__all__ = ["run_demo"]

# From the word "go" until all processes have received it, in seconds.
_START_DELAY: Final = 0.1


def run_demo(
    url: str | None = None, *, processes: int = 8, tasks: int = 25, latency: float = 0.5, quiet: bool = False
) -> DemoReport:
    """Run the three rounds and print them.

    Args:
        url: The database; None: a temporary SQLite file. A table ``tokenstore_demo_…`` is created, and dropped again.
        processes: How many worker processes.
        tasks: How many tasks in each.
        latency: Seconds that the provider takes to answer a refresh.
        quiet: Print nothing.

    Raises:
        ConfigurationError: The database cannot be shared by processes, or the URL is not acceptable.
        BackendError: The database refused or failed.
    """
    if url is not None and url.lower().startswith("memory:"):
        raise ConfigurationError(
            "memory:// exists inside one process, so the demo's processes could not share it: pass another --url, or "
            "none for a temporary SQLite file"
        )
    try:
        import httpx  # noqa: F401  # checked before anything is started
    except ImportError:
        raise MissingDependencyError('the demo needs httpx: pip install "tokenstore[cli]"') from None
    begun = time.monotonic()
    display = Display(processes * tasks, quiet=quiet)
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        if url is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tokenstore-demo-"))
            url = f"sqlite:///{Path(folder).as_posix()}/demo.db"
        provider = stack.enter_context(StrictRotatingProvider(latency=latency))
        plan = Plan(
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
        fleet = stack.enter_context(Fleet(plan, processes, interrupts))
        stack.enter_context(display)
        rounds = [_round(plan, provider, fleet, display, mode) for mode in TITLES]
    report = DemoReport(plan.database, processes, tasks, USERS, latency, round(time.monotonic() - begun, 3), *rounds)
    display.conclude(report)
    return report


def _round(plan: Plan, provider: StrictRotatingProvider, fleet: Fleet, display: Display, mode: Mode) -> Round:
    display.begin(TITLES[mode])
    asyncio.run(_expire(plan, provider))
    fleet.tell(mode)
    for _ in fleet.hear():
        pass
    before = provider.stats()
    outcomes: list[tuple[int, TaskResult]] = []
    held: list[int] = []
    with ExitStack() as answers:
        answers.enter_context(provider.hold())  # until all processes have counted their connections
        fleet.tell(time.time() + _START_DELAY)
        with suppress(TimeoutError):  # the results of the tasks show why none has called the provider
            provider.wait_for_requests(before.requests + 1)
        time.sleep(provider.latency / 2)
        called = provider.stats().in_flight > 0
        fleet.tell("count your connections")
        for number, message in fleet.hear(plan.tasks + 1):
            if isinstance(message, TaskResult):
                outcomes.append((number, message))
                display.advance(number, message)
                continue
            held.append(message)
            if len(held) == len(fleet):
                answers.close()
    fleet.tell("all tasks have ended")
    working = sum(count for _, count in fleet.hear())
    after = provider.stats()
    display.end()
    alive = asyncio.run(_stored_token_works(plan))
    return _evaluate(outcomes, working, sum(held) if called else None, before, after, alive=alive)


def _evaluate(
    outcomes: Sequence[tuple[int, TaskResult]],
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


async def _fill(plan: Plan, provider: StrictRotatingProvider) -> None:
    async with plan.open_store() as store:
        await store.setup()
        async with store.transaction() as tx:
            for number in range(USERS):
                await _log_in(tx, provider, f"user-{number:03}", timedelta(hours=1))


async def _expire(plan: Plan, provider: StrictRotatingProvider) -> None:
    """Log the user in again, with an access token that has expired."""
    async with plan.open_store() as store:
        await _log_in(store, provider, USER, timedelta(minutes=-5))


async def _log_in(store: Any, provider: StrictRotatingProvider, user: str, lifetime: timedelta) -> None:
    grant = provider.new_grant(user)
    expires_at = datetime.now(UTC) + lifetime
    await store.store_tokens(PROVIDER, user, grant["access_token"], grant["refresh_token"], expires_at)


async def _stored_token_works(plan: Plan) -> bool:
    import httpx

    async with plan.open_store() as store, httpx.AsyncClient(base_url=plan.base_url, trust_env=False) as client:
        record = await store.load_tokens(PROVIDER, USER)
        if record is None:
            return False
        answer = await client.get("/resource", headers={"Authorization": f"Bearer {record['access_token']}"})
        return answer.status_code == 200


@contextmanager
def _own_table(plan: Plan) -> Iterator[None]:
    """Drop the demo's table at the end, also after an error or a signal."""
    try:
        yield
    except BaseException:
        with suppress(TokenStoreError):  # the first error is raised; it may be the reason for this one
            asyncio.run(_drop_table(plan))
        raise
    asyncio.run(_drop_table(plan))


async def _drop_table(plan: Plan) -> None:
    backend: Any = backend_for_url(plan.url, {"table": plan.table})
    try:
        async with asyncio.timeout(CLEANUP_TIMEOUT):
            await backend.drop()
    except TimeoutError:
        raise BackendError(f"the demo's table {plan.table} could not be dropped within {CLEANUP_TIMEOUT:g} s") from None
    finally:
        await backend.aclose()


def _without_our_options(url: str) -> str:
    """The URL without the options that the demo sets itself, so that it cannot name a table that is in use."""
    base, _, query = url.partition("?")
    kept = [(name, value) for name, value in parse_qsl(query, keep_blank_values=True) if name not in OWN_OPTIONS]
    return f"{base}?{urlencode(kept)}" if kept else base
