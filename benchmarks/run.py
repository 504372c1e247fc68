"""The controller of a run: it tells the workers which contender to measure, and collects the numbers.

In each round each contender is measured once, in an order that rotates from round to round. So other work on the
machine affects all contenders of a round equally, and ratios are taken within a round.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from secrets import token_hex
from typing import Final, NamedTuple, TypeVar

from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

from benchmarks.bench import CASES, ContenderInfo
from benchmarks.contenders import OURS
from benchmarks.databases import Database
from benchmarks.floors import floor_of
from benchmarks.measure import summary
from benchmarks.results import Cell, Place, Results
from benchmarks.settings import Settings
from benchmarks.tokens import ACCESS, KEYRING, key
from benchmarks.workers import Workers
from tokenstore.records import TokenKey

__all__ = ["Run"]

T = TypeVar("T")
Tell = Callable[[str], None]
_WARM: Final = 0.05
_LISTINGS: Final = 3
_REFRESHES: Final = 5
_IMPORTS: Final = 15
_ROW_COUNTS: Final = (1_000, 10_000, 100_000, 1_000_000)
_COMMANDS: Final = {
    "python": ("python -c pass", ("-c", "pass")),
    "import": ("import tokenstore", ("-c", "import tokenstore")),
    "help": ("tokenstore --help", ("-m", "tokenstore", "--help")),
}


class Run:
    """One run.

    Args:
        settings: What to measure.
        results: Gets the numbers as they are measured.
        tell: Called with a description of each step, to show progress.
    """

    def __init__(self, settings: Settings, results: Results, tell: Tell) -> None:
        self.settings = settings
        self.results = results
        self.tell = tell
        self.missing: dict[str, str] = {}
        self.servers: dict[str, dict[str, str]] = {}

    def database(self, database: Database, loop: str) -> None:
        """Run all workloads that need a database on this one."""
        # A separate worker creates the tables, so that this does not count in the memory of the measured workers.
        with Workers(1, loop, database, self.settings) as keeper:
            self.servers[database.name] = keeper.first("server")
            with ExitStack() as stack:
                self._callers(_Tables(self, database, loop, keeper, stack))
            with ExitStack() as stack:
                tables = _Tables(self, database, loop, keeper, stack)
                self._rows(tables)
                self._list(tables)

    def _callers(self, tables: _Tables) -> None:
        """Run the workloads of concurrent callers on one table."""
        wanted = self.settings.workloads
        cases = [case for case in CASES if case.partition("/")[0] in wanted]
        if cases or "refresh" in wanted:
            table = tables.create(self.settings.rows)
            workers, infos = tables.open(table, number=self.settings.processes)
            for case in cases:
                self._case(tables.database, tables.loop, workers, infos, case)
            if "refresh" in wanted:
                self._refresh(tables.database, tables.loop, workers)

    def _case(self, database: Database, loop: str, workers: Workers, infos: list[ContenderInfo], case: str) -> None:
        """Measure callers in a closed loop."""
        settings = self.settings
        supporting = [info for info in infos if workers.first("supports", info.name, case)]
        for number in range(-1, settings.rounds):  # round -1 warms up and is not counted
            for callers in settings.callers:
                place = Place(database.name, loop, case, callers * len(workers), settings.rows)
                self.tell(f"{database.name}, {loop}: {case}, {callers} caller(s), round {max(number, 0) + 1}")
                for info in _rotated([one for one in supporting if callers <= one.most_callers], number):
                    seconds = settings.seconds if number >= 0 else min(_WARM, settings.seconds)
                    samples = workers.each("measure", info.name, case, callers, seconds)
                    if number >= 0:
                        floor = floor_of(database.driver, callers) or ""
                        self._note(place, info, floor, summary(samples))

    def _refresh(self, database: Database, loop: str, workers: Workers) -> None:
        place = Place(database.name, loop, "refresh", self.settings.waiting, self.settings.rows)
        ours = ContenderInfo(OURS, "ours", OURS, 0)
        for number in range(min(self.settings.rounds, _REFRESHES)):
            self.tell(f"{database.name}, {loop}: refresh, round {number + 1}")
            self._note(place, ours, "", workers.first("refresh"))

    def _rows(self, tables: _Tables) -> None:
        """Measure one caller on tables of several sizes. All tables exist at once, so that a round measures each."""
        if "rows" not in self.settings.workloads:
            return
        database, loop = tables.database, tables.loop
        floor = floor_of(database.driver, 1) or ""
        counts = [count for count in _ROW_COUNTS if count <= self.settings.most_rows]
        made = [tables.create(count) for count in counts]
        opened = [(*tables.open(table, only=(OURS, floor)), table.rows) for table in made]
        for number in range(-1, self.settings.rounds):
            self.tell(f"{database.name}, {loop}: rows, round {max(number, 0) + 1}")
            for workers, infos, count in _rotated(opened, number):
                for info in _rotated(infos, number):
                    sample = workers.first("measure", info.name, "load/cold", 1, self.settings.seconds)
                    if number >= 0:
                        self._note(Place(database.name, loop, "rows", 1, count), info, floor, summary([sample]))

    def _list(self, tables: _Tables) -> None:
        """List all rows, in a new process each time so that the growth of its memory can be measured."""
        if "list" not in self.settings.workloads:
            return
        database, loop, rows = tables.database, tables.loop, self.settings.most_rows
        ours = ContenderInfo(OURS, "ours", f"{OURS}, list_tokens", 0)
        scan = ContenderInfo("keyset-scan", "floor", f"{database.driver}, keyset scan", 0)
        infos = [ours, scan] if database.dialect else [ours]
        table = tables.create(rows)
        for number in range(min(self.settings.rounds, _LISTINGS)):
            for info in _rotated(infos, number):
                self.tell(f"{database.name}, {loop}: list, {info.title}, round {number + 1}")
                workers, _ = tables.open(table, only=(OURS,))
                result = workers.first("list_all", info.name)
                workers.close()
                self._note(Place(database.name, loop, "list", 1, rows), info, scan.name, result)

    # ---- Without a database

    def seal(self) -> None:
        """Measure sealing and opening one token, and the cipher alone."""
        place, text = TokenKey(*key(1)), ACCESS
        cipher, data = AESGCMSIV(bytes(range(32))), ACCESS.encode()
        associated = b"\x01\x05bench" + "".join(place).encode() + b"access_token"
        nonce = os.urandom(12)
        encrypted, sealed = cipher.encrypt(nonce, data, associated), KEYRING.seal(place, "access_token", text)
        self._bare(
            "seal/seal",
            lambda: KEYRING.seal(place, "access_token", text),
            lambda: cipher.encrypt(os.urandom(12), data, associated),
        )
        self._bare(
            "seal/open",
            lambda: KEYRING.open(place, "access_token", sealed),
            lambda: cipher.decrypt(nonce, encrypted, associated),
        )

    def _bare(self, workload: str, ours: Callable[[], object], floor: Callable[[], object]) -> None:
        self.tell(workload)
        pairs = [
            (ContenderInfo(OURS, "ours", OURS, 0), ours),
            (ContenderInfo("aead", "floor", "AES-256-GCM-SIV alone", 0), floor),
        ]
        for number in range(-1, self.settings.rounds):
            for info, call in _rotated(pairs, number):
                us = _timed(call, min(self.settings.seconds, 0.1))
                if number >= 0:
                    self._note(Place("", "", workload, 1, 0), info, "aead", {"us": us})

    def imports(self) -> None:
        """Measure the start of processes that import tokenstore."""
        place = Place("", "", "import", 1, 0)
        for number in range(-1, max(self.settings.rounds, _IMPORTS if self.settings.rounds > 3 else 0)):
            self.tell(f"import, round {max(number, 0) + 1}")
            for name in _rotated(list(_COMMANDS), number):
                title, arguments = _COMMANDS[name]
                began = time.perf_counter_ns()
                subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
                us = (time.perf_counter_ns() - began) / 1000
                if number >= 0:
                    kind = "floor" if name == "python" else "ours"
                    self._note(place, ContenderInfo(name, kind, title, 0), "python", {"us": us})

    def _note(self, place: Place, info: ContenderInfo, floor: str, numbers: dict[str, float]) -> None:
        cell = self.results.cell(place, info.name)
        if cell is None:
            compared = "" if info.name == floor else floor
            cell = Cell(*place, info.name, info.kind, info.title, compared)
            self.results.cells.append(cell)
        cell.rounds.append(numbers)


class _Table(NamedTuple):
    name: str
    rows: int


class _Tables:
    """Tables of one database, and the workers that use them. The exit stack drops the tables and ends the workers."""

    def __init__(self, run: Run, database: Database, loop: str, keeper: Workers, stack: ExitStack) -> None:
        self.database = database
        self.loop = loop
        self._run = run
        self._keeper = keeper
        self._stack = stack
        self._filled: dict[int, _Table] = {}

    def create(self, rows: int) -> _Table:
        """Return a table with that many rows; the first call for a size creates and fills it."""
        if rows in self._filled:
            return self._filled[rows]
        self._run.tell(f"{self.database.name}: filling {rows:,} rows")
        name = f"bench_{token_hex(6)}"
        # The values of the store; the other names are of tables that peers may have created.
        names = [f"{name}{suffix}" for suffix in ("", "_values", "_orm", "_kv", "_bots", "_slack")]
        self._stack.callback(self._keeper.first, "clean", names, rows)
        self._keeper.first("setup", name, rows)
        self._filled[rows] = _Table(name, rows)
        return self._filled[rows]

    def open(
        self, table: _Table, *, number: int = 1, only: tuple[str, ...] = ()
    ) -> tuple[Workers, list[ContenderInfo]]:
        """Start workers and open all contenders in them, or only those named.

        Contenders whose package is not installed are noted in the run and left out.
        """
        number = 1 if self.database.one_process else number
        workers = self._stack.enter_context(Workers(number, self.loop, self.database, self._run.settings))
        infos = [ContenderInfo(*info) for info in workers.first("open", *table, only=only)]
        workers.others("open", *table, only=only)
        workers.first("fill", first=True)
        workers.others("fill", first=False)
        self._run.missing |= {info.title: info.problem for info in infos if info.problem}
        return workers, [info for info in infos if not info.problem]


def _rotated(values: Sequence[T], by: int) -> list[T]:
    middle = by % len(values) if values else 0
    return [*values[middle:], *values[:middle]]


def _timed(call: Callable[[], object], seconds: float) -> float:
    """Call in a loop for that long; return the µs for each call."""
    clock = time.perf_counter_ns
    calls, began = 0, clock()
    deadline = began + int(seconds * 1e9)
    while clock() < deadline:
        for _ in range(100):
            call()
        calls += 100
    return (clock() - began) / calls / 1000
