"""Races between processes."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import ClassVar

from tokenstore.records import TokenKey
from tokenstore.testing.conformance import _process_jobs as jobs
from tokenstore.testing.conformance._helpers import KEY, PAUSE
from tokenstore.testing.conformance._testbed import Testbed
from tokenstore.testing.conformance._workers import Team

_PROCESSES = 4
_ROUNDS = 30


class ProcessConformance(Testbed):
    """Tests of processes that open the same data, for backends whose data several processes can open.

    The processes are new Python processes, started at first use and shared by the tests of a class. A backend whose
    locks are in the memory of one process passes all other tests.
    """

    team: ClassVar[Team]

    @classmethod
    def setup_class(cls) -> None:
        """Called by pytest before the first test of the class."""
        cls.team = Team()

    @classmethod
    def teardown_class(cls) -> None:
        """Called by pytest after the last test of the class: end the processes."""
        cls.team.close()

    def teardown_method(self) -> None:
        """Called by pytest after each test: end the processes that a failed test has left busy."""
        self.team.remove_busy_workers()

    def opener(self) -> jobs.Opener:
        """Return what makes the backend for a URL in another process; it is pickled.

        The default looks the URL up in the registry. Override it together with :meth:`open`.
        """
        return jobs.open_url

    def test_setup_from_several_processes_at_once(self, tmp_path: Path) -> None:
        """Each succeeds, and then writes a row."""
        for _ in range(3):
            of = self.opener(), self.make_url(tmp_path)
            self.team.together([(jobs.set_up, *of, f"user-{number}") for number in range(_PROCESSES)])
            rows = [TokenKey("github", f"user-{number}") for number in range(_PROCESSES)]
            assert self.team[0].call(jobs.insert, *of, rows, "late") == [], "a row is missing"

    def test_one_process_inserts_a_row(self, tmp_path: Path) -> None:
        """Of several processes that insert the same rows, one succeeds for each row, and its tokens stay."""
        of = self._prepared(tmp_path)
        rows = _rows("new")
        inserted = self.team.together([(jobs.insert, *of, rows, f"{number}") for number in range(_PROCESSES)])
        assert Counter(key for keys in inserted for key in keys) == Counter(rows)

    def test_every_put_gets_its_own_generation(self, tmp_path: Path) -> None:
        of = self._prepared(tmp_path, KEY)
        before, _ = self.team[0].call(jobs.read, *of)
        self.team.all_at_once(jobs.put, *of, _ROUNDS, count=_PROCESSES)
        after, _ = self.team[0].call(jobs.read, *of)
        assert after == before + _PROCESSES * _ROUNDS

    def test_one_process_gets_a_lease(self, tmp_path: Path) -> None:
        """Of several processes that claim the same leases, one gets each."""
        of, rows = (self.opener(), self.make_url(tmp_path)), _rows("leased")
        generations = self.team[0].call(jobs.prepare, *of, rows, [])
        granted = self.team.together([(jobs.claim, *of, rows, generations, f"h{n}") for n in range(_PROCESSES)])
        assert Counter(key for keys in granted for key in keys) == Counter(rows)

    def test_increments_under_the_lock_are_not_lost(self, tmp_path: Path) -> None:
        """Several processes lock a row, add one to a number in it, and write it, again and again."""
        of = self._prepared(tmp_path, KEY)
        has_locks, _ = self.team[0].call(jobs.capabilities, *of)
        if not has_locks:
            return
        self.team.all_at_once(jobs.increment, *of, _ROUNDS, count=_PROCESSES)
        _, number = self.team[0].call(jobs.read, *of)
        assert number == _PROCESSES * _ROUNDS

    def test_one_process_pops_a_value(self, tmp_path: Path) -> None:
        """Of several processes that pop the same values, one gets each."""
        of = self._prepared(tmp_path)
        _, keeps_values = self.team[0].call(jobs.capabilities, *of)
        if not keeps_values:
            return
        names = [f"value-{number}" for number in range(_ROUNDS)]
        self.team[0].call(jobs.prepare, *of, [], names)
        popped = self.team.all_at_once(jobs.pop, *of, names, count=_PROCESSES)
        assert Counter(name for found in popped for name in found) == Counter(names)

    def test_the_lock_of_a_killed_process_is_released(self, tmp_path: Path) -> None:
        """The process that waited for the lock gets it, and reads the row without the uncommitted write."""
        of = self._prepared(tmp_path, KEY)
        has_locks, _ = self.team[0].call(jobs.capabilities, *of)
        if not has_locks:
            return
        holder, waiter = self.team.first(2)
        holder.start(jobs.hold_lock, *of)
        holder.met()
        holder.go_on()
        holder.met()
        waiter.start(jobs.increment, *of, 1)
        waiter.met()
        waiter.go_on()
        waited = not waiter.has_answered(PAUSE)
        holder.kill()
        self.team.remove(holder)
        waiter.result()
        assert waited, "the row was not locked for the other process"
        _, number = self.team[0].call(jobs.read, *of)
        assert number == 1

    def test_a_backend_can_be_used_in_another_event_loop(self, tmp_path: Path) -> None:
        """``asyncio.run`` can be called several times: the backend connects anew."""
        self.team[0].call(jobs.use_two_event_loops, self.opener(), self.make_url(tmp_path))

    def test_a_backend_can_be_used_after_a_fork(self, tmp_path: Path) -> None:
        """The child connects anew, and the parent keeps its connections."""
        if hasattr(os, "fork"):
            assert self.team[0].call(jobs.use_after_fork, self.opener(), self.make_url(tmp_path)) == 0

    def _prepared(self, tmp_path: Path, *rows: TokenKey) -> tuple[jobs.Opener, str]:
        of = self.opener(), self.make_url(tmp_path)
        self.team[0].call(jobs.prepare, *of, rows, [])
        return of


def _rows(name: str) -> list[TokenKey]:
    return [TokenKey("github", f"{name}-{number}") for number in range(_ROUNDS)]
