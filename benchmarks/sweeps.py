"""What `refresh_due` and `list_tokens` cost in a large table: ``python -m benchmarks.sweeps [URL …]``.

Run it in the root of the checkout. The program creates a table on each database and drops it at the end. Without a URL,
it starts the private servers of the tests.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from secrets import token_hex
from statistics import median
from typing import Any, Final

from sqlalchemy import make_url

from benchmarks.contenders import TableTarget
from benchmarks.databases import databases, private_urls
from benchmarks.floors import connect
from benchmarks.measure import resident
from benchmarks.report import console, number
from benchmarks.tokens import KEYRING, SealedRow, key, sealed_row
from tokenstore import RefreshableRecord, open_store
from tokenstore.store import AuthTokenStore

PROVIDER: Final = "github"
_DAY_US: Final = 86_400_000_000
_PAGE: Final = 500
_ROUNDS: Final = 50


async def _refresh(_: RefreshableRecord) -> dict[str, Any]:
    return {"access_token": "gho_" + "n" * 36, "refresh_token": "ghr_" + "n" * 76, "expires_in": 28800}


def _open(target: TableTarget) -> AuthTokenStore:
    refreshers = {PROVIDER: _refresh}
    return open_store(target.database.url, keyring=KEYRING, table=target.table, refreshers=refreshers)


def _rows(count: int, due: bool) -> Iterator[SealedRow]:
    """Rows of one provider that are due, or are not due before tomorrow. Only those that are due can be opened."""
    now = int(time.time() * 1e6)
    copied = sealed_row((PROVIDER, "copied"))
    for n in range(count):
        _, user_id = key(n, "due" if due else "user")
        row = sealed_row((PROVIDER, user_id)) if due else copied._replace(user_id=user_id)
        at = now - 1_000_000 + n if due else now + _DAY_US + n
        # Stored an hour ago, so that the refreshes see a token of more than an hour.
        yield row._replace(access_token_expires_at=at, due_at=at, created_at=now, updated_at=now - 3_600_000_000)


async def _fill(target: TableTarget, rows: Iterator[SealedRow]) -> None:
    link = await connect(target)
    try:
        await link.fill(rows)
    finally:
        await link.close()


async def _none_due(target: TableTarget) -> dict[str, str]:
    """Time a sweep that finds nothing, and the same query on the driver, one after the other."""
    ours, bare = [], []
    link = await connect(target)
    try:
        async with _open(target) as store:
            for _ in range(_ROUNDS):
                began = time.perf_counter()
                async for _result in store.refresh_due(within=60, page_size=_PAGE):
                    raise RuntimeError("a row is due")
                between = time.perf_counter()
                until = int(time.time() * 1e6) + 60_000_000
                await link.fetch(link.sql.due, (link.part(PROVIDER), until, _PAGE))
                ours.append(between - began)
                bare.append(time.perf_counter() - between)
    finally:
        await link.close()
    ratio = median(one / other for one, other in zip(ours, bare, strict=True))
    return {
        "refresh_due, none due, ms": number(median(ours) * 1000),
        "bare query, ms": number(median(bare) * 1000),
        "ratio": number(ratio),
    }


async def _some_due(target: TableTarget) -> dict[str, str]:
    """Time a sweep that refreshes rows, with a provider that answers at once."""
    done = 0
    async with _open(target) as store:
        began, cpu = time.perf_counter(), time.process_time()
        async for result in store.refresh_due(within=60, page_size=_PAGE):
            if result.outcome != "refreshed":
                raise RuntimeError(f"a row was not refreshed: {result.outcome}, {result.error}")
            done += 1
        elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {
        "rows refreshed": str(done),
        "refreshed rows/s": number(done / elapsed),
        "CPU of this process, % of the time": number(100 * cpu / elapsed),
    }


def _listed(target: TableTarget) -> dict[str, float]:
    return asyncio.run(_list_all(target))


async def _list_all(target: TableTarget) -> dict[str, float]:
    async with _open(target) as store:
        await store.load_tokens(PROVIDER, "nobody")  # opens a connection
        gc.collect()
        before, most, seen, first = resident(), 0.0, 0, 0.0
        began = time.perf_counter()
        async for _ in store.list_tokens(page_size=_PAGE):
            first = first or time.perf_counter() - began
            seen += 1
            if seen % 1000 == 0:
                most = max(most, resident())
        elapsed = time.perf_counter() - began
    return {"first": first, "rows": seen, "rate": seen / elapsed, "growth": max(most - before, 0.0)}


def _first_line(target: TableTarget, *options: str) -> float:
    """Start the command `list`, and time the first line that it prints."""
    url = make_url(target.database.url).update_query_dict({"table": target.table})
    environment = {**os.environ, "TOKENSTORE_URL": url.render_as_string(hide_password=False)}
    began = time.perf_counter()
    command = [sys.executable, "-m", "tokenstore", "list", *options]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, bufsize=0) as running:
        assert running.stdout is not None
        if not running.stdout.readline():
            raise RuntimeError("the command `list` printed nothing")
        elapsed = time.perf_counter() - began
        running.stdout.close()
        running.wait(60)
    return elapsed


async def _measure(target: TableTarget, rows: int, due: int) -> dict[str, str]:
    async with _open(target) as store:
        backend: Any = store._backend
        await store.setup()
        try:
            await _fill(target, _rows(rows, due=False))
            figures = await _none_due(target)
            await _fill(target, _rows(due, due=True))
            figures |= await _some_due(target)
            # In a process of its own, which has not filled the table.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
                listed = await asyncio.get_running_loop().run_in_executor(processes, _listed, target)
            return figures | {
                "list_tokens, first row, s": number(listed["first"]),
                "rows listed": str(int(listed["rows"])),
                "listed rows/s": number(listed["rate"]),
                "growth of memory, MB": number(listed["growth"]),
                "list --json, first line, s": number(_first_line(target, "--json")),
                "list, first line, s": number(_first_line(target)),
            }
        finally:
            await backend.drop()


def _show(columns: Sequence[str], figures: Sequence[dict[str, str]], rows: int) -> None:
    from rich.table import Table

    grid = Table("", *columns, title=f"{rows:,} rows, none due, then some more that are due", title_justify="left")
    for name in figures[0]:
        grid.add_row(name, *(found[name] for found in figures))
    console().print(grid)


def _positive(text: str) -> int:
    value = int(text.replace("_", ""))
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def main() -> None:
    """Measure and print; an error ends the run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweeps", description=__doc__)
    parser.add_argument("urls", nargs="*", metavar="URL")
    parser.add_argument(
        "--rows", type=_positive, default=1_000_000, help="rows that are not due (default: %(default)s)"
    )
    parser.add_argument("--due", type=_positive, default=20_000, help="rows that are due (default: %(default)s)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = databases(chosen.urls or private_urls(folder))
        figures = []
        for database in found:
            target = TableTarget(database, f"bench_{token_hex(8)}", pool_size=10)
            figures.append(asyncio.run(_measure(target, chosen.rows, chosen.due)))
        _show([database.name for database in found], figures, chosen.rows)


if __name__ == "__main__":
    main()
