"""One worker's part: its contenders on one table, and a turn of each when the controller says so."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import count, cycle
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Final, NamedTuple

from sqlalchemy import inspect, text

from benchmarks.contenders import OURS, Arena, Contender, MissingError, Operations, Tokenstore, contenders
from benchmarks.databases import Database
from benchmarks.floors import connect, fill
from benchmarks.measure import Operation, Sample, closed_loop, percentile
from benchmarks.settings import Settings
from benchmarks.tokens import ACCESS, EXTENT, REFRESH, key, sealed_row
from tokenstore.records import SealedTokens, TokenKey

__all__ = ["CASES", "Bench", "Entrant"]

_HOT: Final = 8
_DRAWN: Final = 5000
_READERS: Final = 4
_PAGE: Final = 500
_POSTGRES_SETTINGS: Final = ("fsync", "synchronous_commit", "shared_buffers", "max_connections")
_MYSQL_SETTINGS: Final = ("innodb_flush_log_at_trx_commit", "sync_binlog", "innodb_buffer_pool_size", "max_connections")
_STATM: Final = Path("/proc/self/statm")


class Case(NamedTuple):
    """What callers do, and to which rows."""

    pick: Callable[[Operations], Operation | None]
    keys: Callable[[Bench], Iterator[TokenKey]]
    finds: bool | None = None
    """Of a load: whether there is a row."""


class Entrant(NamedTuple):
    """A contender as the controller knows it; ``problem`` says why it does not take part."""

    name: str
    kind: str
    title: str
    most_callers: int
    problem: str = ""


class Bench:
    """The contenders of one database, in one process and one event loop."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database = database
        self.settings = settings
        self._contenders: dict[str, Contender] = {}
        self._fresh = count()
        self._salt = f"new{random.randrange(16**5):05x}"
        self._rows = 0

    # ---- Before and after

    async def setup(self, table: str, rows: int) -> None:
        """Create the shared table, and fill it. One process does so before the others open anything."""
        arena = self._arena(table)
        ours = Tokenstore(arena)
        await ours.open()
        try:
            await ours.store.setup()
            if self.database.dialect:
                await fill(arena, rows)
            elif not self.database.one_process:
                await _put(ours, rows)
        finally:
            await ours.close()

    async def open(self, table: str, rows: int, *, only: tuple[str, ...] = ()) -> list[Entrant]:
        """Open every contender (or only these), except those that are missing something."""
        arena, self._rows, entrants = self._arena(table), rows, []
        for contender in contenders(arena, peers=self.settings.peers):
            if only and contender.name not in only:
                continue
            problem = ""
            try:
                await contender.open()
            except MissingError as error:
                problem = str(error)
            else:
                self._contenders[contender.name] = contender
            entrants.append(Entrant(contender.name, contender.kind, contender.title, contender.most_callers, problem))
        if self.database.one_process:
            await self._ours.store.setup()
            await _put(self._ours, rows)
        return entrants

    async def fill(self, *, first: bool) -> None:
        """Fill the contenders' own tables, in the first process; in the others only get ready."""
        for contender in self._contenders.values():
            if first or contender.kind in ("floor", "reference"):
                await contender.fill(self._rows)
        # What stays to the end need not be looked through before each turn.
        gc.collect()
        gc.freeze()

    async def server(self) -> dict[str, str]:
        """The server's version, and its settings that decide what a commit costs."""
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
        """Drop these tables, or delete our rows where tables are not ours to drop."""
        if not self.database.dialect:
            ours = Tokenstore(self._arena(""))
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
        """Close every contender; another table can be opened then."""
        while self._contenders:
            _, contender = self._contenders.popitem()
            await contender.close()

    def _arena(self, table: str) -> Arena:
        return Arena(self.database, table, self.settings.pool_size)

    @property
    def _ours(self) -> Tokenstore:
        ours = self._contenders[OURS]
        assert isinstance(ours, Tokenstore)
        return ours

    # ---- Turns

    async def able(self, name: str, case: str) -> bool:
        """Whether this contender can do that at all."""
        contender = self._contenders[name]
        await contender.prepare(1)
        return CASES[case].pick(contender.operations(0)) is not None

    async def turn(self, name: str, case: str, callers: int, seconds: float) -> Sample:
        """One turn of one contender."""
        contender, chosen = self._contenders[name], CASES[case]
        await contender.prepare(callers)
        operations = [chosen.pick(contender.operations(caller)) for caller in range(callers)]
        keys = chosen.keys(self)
        if chosen.finds is not None and (operation := operations[0]) is not None:
            found = await operation(*next(keys))
            if (found is not None) is not chosen.finds:
                raise RuntimeError(f"{name} answers {'something' if found else 'nothing'} in {case}")
        gc.collect()
        return await closed_loop([operation for operation in operations if operation is not None], keys, seconds)

    def hot(self) -> Iterator[TokenKey]:
        """A few keys that everybody wants."""
        return cycle(random.sample([key(number) for number in range(_HOT)], _HOT))

    def cold(self, below: int | None = None) -> Iterator[TokenKey]:
        """Any key, each as likely."""
        count = self._rows if below is None else min(below, self._rows)
        return cycle([key(random.randrange(count)) for _ in range(_DRAWN)])

    def writable(self) -> Iterator[TokenKey]:
        """Keys whose sealed values the floors have ready."""
        return self.cold(EXTENT)

    def missing(self) -> Iterator[TokenKey]:
        """Keys without a row."""
        return cycle([key(number, "nobody") for number in range(100)])

    def fresh(self) -> Iterator[TokenKey]:
        """Keys that nobody has used yet."""
        return (key(number, self._salt) for number in self._fresh)

    # ---- What has a shape of its own

    async def refresh(self) -> dict[str, float]:
        """Many callers on one expired token, beside a few that load other rows; times in µs."""
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
        """How long loads of other rows take while the work is done, in nanoseconds, sorted."""
        load, lengths = self._ours.store.load_tokens, []

        async def read(keys: Iterator[TokenKey]) -> None:
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
        """Walk over all rows: µs a row, and by how much the process grew, in MB (where the system tells)."""
        gc.collect()
        before, most, seen = _resident(), 0.0, 0
        began = perf_counter_ns()
        if name == OURS:
            async for _ in self._ours.store.list_tokens(page_size=_PAGE):
                seen += 1
                if seen % 1000 == 0:
                    most = max(most, _resident())
        else:
            seen = await self._scan()
        elapsed = perf_counter_ns() - began
        if seen != self._rows:
            raise RuntimeError(f"{name} listed {seen} of {self._rows} rows")
        result = {"us": elapsed / seen / 1000, "rows": seen}
        return result | ({"growth_mb": max(most - before, 0.0)} if name == OURS and before else {})

    async def _scan(self) -> int:
        """The bare keyset scan, on one connection."""
        link = await connect(self._ours.arena)
        try:
            seen, after = 0, ("", "")
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
                provider, user_id = page[-1][:2]
                after = (_text(provider), _text(user_id))
        finally:
            await link.close()


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else bytes(value).decode()


def _resident() -> float:
    """Memory of this process that is in RAM, in MB; 0 where the system does not tell."""
    if not _STATM.exists():
        return 0.0
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def _put(ours: Tokenstore, rows: int) -> None:
    """Fill through the protocol, for a backend that we know nothing of."""

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
        await ours.backend.put(key(number), tokens)

    for start in range(0, rows, 1000):
        await asyncio.gather(*(put(number) for number in range(start, min(start + 1000, rows))))


def _mixed(operations: Operations) -> Operation | None:
    """Nineteen loads, and a store somewhere among them."""
    load, store = operations.load, operations.store
    if store is None:
        return None
    dice = cycle(random.sample([True] + [False] * 19, 20))
    write = store

    def act(provider: str, user_id: str) -> Any:
        return (write if next(dice) else load)(provider, user_id)

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
"""By the name of the workload, and of its variant. Inserts come last: they leave rows behind."""
