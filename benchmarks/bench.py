"""What one worker process does: it opens the contenders on one table and measures one when the controller asks."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import count, cycle
from time import perf_counter_ns
from typing import Any, Final, NamedTuple

from sqlalchemy import inspect, text

from benchmarks.contenders import OURS, Contender, MissingError, Operations, TableTarget, Tokenstore, contenders
from benchmarks.databases import Database
from benchmarks.floors import connect, fill
from benchmarks.measure import Operation, Sample, closed_loop, percentile, resident
from benchmarks.settings import Settings
from benchmarks.tokens import ACCESS, EXTENT, REFRESH, Place, key, sealed_row
from tokenstore.records import SealedTokens, TokenKey

__all__ = ["CASES", "Bench", "ContenderInfo"]

_HOT: Final = 8
_DRAWN: Final = 5000
_READERS: Final = 4
_PAGE: Final = 500
_POSTGRES_SETTINGS: Final = ("fsync", "synchronous_commit", "shared_buffers", "max_connections")
_MYSQL_SETTINGS: Final = ("innodb_flush_log_at_trx_commit", "sync_binlog", "innodb_buffer_pool_size", "max_connections")


class Case(NamedTuple):
    """One workload: the operation that callers repeat, and the keys of the rows."""

    pick: Callable[[Operations], Operation | None]
    keys: Callable[[Bench], Iterator[Place]]
    finds: bool | None = None
    """For a load: whether the row exists; None: not a load."""


class ContenderInfo(NamedTuple):
    """What the controller knows of a contender; ``problem`` says why it is not measured, empty if it is."""

    name: str
    kind: str
    title: str
    most_callers: int
    problem: str = ""


class Bench:
    """The contenders on one database, in one process and one event loop."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database = database
        self.settings = settings
        self._contenders: dict[str, Contender] = {}
        self._fresh = count()
        self._salt = f"new{random.randrange(16**5):05x}"
        self._rows = 0

    # ---- Setting up and cleaning up

    async def setup(self, table: str, rows: int) -> None:
        """Create and fill the shared table. Called in one process, before any other process opens the table."""
        target = self._target(table)
        ours = Tokenstore(target)
        await ours.open()
        try:
            await ours.store.setup()
            if self.database.dialect:
                await fill(target, rows)
            elif not self.database.one_process:
                await _put(ours, rows)
        finally:
            await ours.close()

    async def open(self, table: str, rows: int, *, only: tuple[str, ...] = ()) -> list[ContenderInfo]:
        """Open all contenders, or only those named, except those whose package is not installed."""
        target, self._rows, infos = self._target(table), rows, []
        for contender in contenders(target, peers=self.settings.peers):
            if only and contender.name not in only:
                continue
            problem = ""
            try:
                await contender.open()
            except MissingError as error:
                problem = str(error)
            else:
                self._contenders[contender.name] = contender
            infos.append(
                ContenderInfo(contender.name, contender.kind, contender.title, contender.most_callers, problem)
            )
        if self.database.one_process:
            await self._ours.store.setup()
            await _put(self._ours, rows)
        return infos

    async def fill(self, *, first: bool) -> None:
        """Prepare the contenders; the first process also fills the contenders' own tables."""
        for contender in self._contenders.values():
            if first or contender.kind in ("floor", "reference"):
                await contender.fill(self._rows)
        # Exempt these objects from garbage collection: they live to the end, and scanning them would cost time.
        gc.collect()
        gc.freeze()

    async def server(self) -> dict[str, str]:
        """Return the server's version, and its settings that decide the cost of a commit."""
        if not self.database.dialect:
            return {}
        sqlite, mysql = (self.database.dialect == name for name in ("sqlite", "mysql"))
        names = _MYSQL_SETTINGS if mysql else _POSTGRES_SETTINGS
        listed = ", ".join(f"'{name}'" for name in names)
        settings = (
            f"SHOW VARIABLES WHERE Variable_name IN ({listed})"
            if mysql
            else f"SELECT name, setting FROM pg_settings WHERE name IN ({listed})"
        )
        engine = self.database.engine(1)
        try:
            async with engine.connect() as connection:
                query = f"SELECT {'sqlite_version()' if sqlite else 'version()'}"
                version = str((await connection.execute(text(query))).scalar_one())
                rows = [] if sqlite else (await connection.execute(text(settings))).all()
                return {"version": version, **{str(name): str(value) for name, value in rows}}
        finally:
            await engine.dispose()

    async def clean(self, tables: list[str], rows: int) -> None:
        """Drop these tables; on a database that only tokenstore can open, delete the rows instead."""
        if not self.database.dialect:
            ours = Tokenstore(self._target(""))
            await ours.open()
            for number in range(rows):
                await ours.store.delete_tokens(*key(number))
            await ours.close()
            return
        engine = self.database.engine(1, isolation_level="AUTOCOMMIT")
        try:
            async with engine.connect() as connection:
                found = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
                for table in {*tables} & {*found}:
                    await connection.execute(text(f"DROP TABLE {table}"))
        finally:
            await engine.dispose()

    async def close(self) -> None:
        """Close all contenders. Afterwards another table can be opened."""
        while self._contenders:
            _, contender = self._contenders.popitem()
            await contender.close()

    def _target(self, table: str) -> TableTarget:
        return TableTarget(self.database, table, self.settings.pool_size)

    @property
    def _ours(self) -> Tokenstore:
        ours = self._contenders[OURS]
        assert isinstance(ours, Tokenstore)
        return ours

    # ---- Measuring

    async def supports(self, name: str, case: str) -> bool:
        """Whether this contender has the workload's operation."""
        contender = self._contenders[name]
        await contender.prepare(1)
        return CASES[case].pick(contender.operations(0)) is not None

    async def measure(self, name: str, case: str, callers: int, seconds: float) -> Sample:
        """Measure one contender for that many seconds."""
        contender, chosen = self._contenders[name], CASES[case]
        await contender.prepare(callers)
        operations = [chosen.pick(contender.operations(caller)) for caller in range(callers)]
        keys = chosen.keys(self)
        if chosen.finds is not None and (operation := operations[0]) is not None:
            found = await operation(*next(keys))
            if (found is not None) is not chosen.finds:
                raise RuntimeError(f"{case}: {name} returned {'a row' if found else 'no row'}")
        gc.collect()
        return await closed_loop([operation for operation in operations if operation is not None], keys, seconds)

    def hot(self) -> Iterator[Place]:
        """A few keys, used by all callers."""
        return cycle(random.sample([key(number) for number in range(_HOT)], _HOT))

    def cold(self, below: int | None = None) -> Iterator[Place]:
        """Random keys of the table, each equally likely."""
        count = self._rows if below is None else min(below, self._rows)
        return cycle([key(random.randrange(count)) for _ in range(_DRAWN)])

    def writable(self) -> Iterator[Place]:
        """Keys for which the floors have prepared sealed values."""
        return self.cold(EXTENT)

    def missing(self) -> Iterator[Place]:
        """Keys without a row."""
        return cycle([key(number, "nobody") for number in range(100)])

    def fresh(self) -> Iterator[Place]:
        """Keys of rows that do not exist yet, each used once."""
        return (key(number, self._salt) for number in self._fresh)

    # ---- Workloads without a closed loop

    async def refresh(self) -> dict[str, float]:
        """Let many callers refresh one expired token while a few others load other rows; times in µs."""
        store, waiting, seconds = self._ours.store, self.settings.waiting, self.settings.provider_seconds
        place = ("bench", "hot")
        calls = 0

        async def provider(_record: object) -> dict[str, Any]:
            nonlocal calls
            calls += 1
            await asyncio.sleep(seconds)
            return {"access_token": ACCESS, "refresh_token": REFRESH, "expires_in": 3600}

        async def caller() -> None:
            record = await store.load_fresh_tokens(*place, refresh=provider)
            assert record is not None

        await store.store_tokens(*place, ACCESS, REFRESH, datetime.now(UTC) - timedelta(hours=1))
        idle = await self._beside(asyncio.sleep(seconds))
        busy = await self._beside(asyncio.gather(*(caller() for _ in range(waiting))))
        await store.delete_tokens(*place)
        return {
            **{f"idle_p{percent}": percentile(percent, idle) / 1000 for percent in (50, 99)},
            **{f"busy_p{percent}": percentile(percent, busy) / 1000 for percent in (50, 99)},
            "ratio": percentile(99, busy) / percentile(99, idle),
            "calls": calls,
        }

    async def _beside(self, work: Any) -> list[int]:
        """Run ``work``; return the sorted latencies in nanoseconds of concurrent loads of other rows."""
        load, lengths = self._ours.store.load_tokens, []

        async def read(keys: Iterator[Place]) -> None:
            for place in keys:
                began = perf_counter_ns()
                await load(*place)
                lengths.append(perf_counter_ns() - began)
                await asyncio.sleep(0.001)

        async with asyncio.TaskGroup() as group:
            readers = [group.create_task(read(self.cold())) for _ in range(_READERS)]
            await work
            for reader in readers:
                reader.cancel()
        return sorted(lengths)

    async def list_all(self, name: str) -> dict[str, float]:
        """List all rows: µs for each row, and the growth of the process's memory in MB (only on Linux)."""
        gc.collect()
        before, most, seen = resident(), 0.0, 0
        began = perf_counter_ns()
        if name == OURS:
            async for _ in self._ours.store.list_tokens(page_size=_PAGE):
                seen += 1
                if seen % 1000 == 0:
                    most = max(most, resident())
        else:
            seen = await self._scan()
        elapsed = perf_counter_ns() - began
        if seen != self._rows:
            raise RuntimeError(f"{name} listed {seen} of {self._rows} rows")
        result = {"us": elapsed / seen / 1000, "rows": seen}
        return result | ({"growth_mb": max(most - before, 0.0)} if name == OURS and before else {})

    async def _scan(self) -> int:
        """Read all rows with keyset pagination on one connection of the driver; return their number."""
        link = await connect(self._ours.target)
        try:
            seen, after = 0, ("", "", "")
            while True:
                page: list[Any] = []
                for statement, where in link.sql.scans:
                    if (wanted := _PAGE - len(page)) > 0:
                        keys = where(*after)
                        found = await link.fetch(statement, (*(link.part(part) for part in keys), wanted))
                        page += found
                seen += len(page)
                if len(page) < _PAGE:
                    return seen
                provider, user_id, account = map(_text, page[-1][:3])
                after = (provider, user_id, account)
        finally:
            await link.close()


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else bytes(value).decode()


async def _put(ours: Tokenstore, rows: int) -> None:
    """Store rows through the backend protocol, for a database that only tokenstore can open."""

    async def put(number: int) -> None:
        row = sealed_row(key(number))
        tokens = SealedTokens(
            access_token=row.access_token,
            refresh_token=row.refresh_token,
            extra=None,
            access_token_expires_at=row.access_token_expires_at,
            refresh_token_expires_at=None,
            key_id=row.key_id,
        )
        await ours.backend.put(TokenKey(*key(number)), tokens)

    for start in range(0, rows, 1000):
        await asyncio.gather(*(put(number) for number in range(start, min(start + 1000, rows))))


def _mixed(operations: Operations) -> Operation | None:
    """Nineteen loads and one store, in random order."""
    load, store = operations.load, operations.store
    if store is None:
        return None
    writes = cycle(random.sample([True] + [False] * 19, 20))
    write = store

    def act(provider: str, user_id: str) -> Any:
        return (write if next(writes) else load)(provider, user_id)

    return act


CASES: Final[dict[str, Case]] = {
    "load/hot": Case(lambda can: can.load, Bench.hot, finds=True),
    "load/cold": Case(lambda can: can.load, Bench.cold, finds=True),
    "load/missing": Case(lambda can: can.load, Bench.missing, finds=False),
    "store/update": Case(lambda can: can.store, Bench.writable),
    "mixed": Case(_mixed, Bench.writable),
    "lock": Case(lambda can: can.lock, Bench.writable),
    "store/insert": Case(lambda can: can.store, Bench.fresh),
}
"""Workloads by name and variant. Inserts come last because they make the table larger."""
