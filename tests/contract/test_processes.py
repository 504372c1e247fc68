"""The same promises between real processes, and what the death or sleep of one does to the others."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import Any

import pytest

from support import store_jobs
from support.broken_backends import Fault, fault_named
from support.generated_programs import AFTER, BEFORE, Program, programs
from support.matrix import Row, each_database, shared_rows
from support.program_search import Finding, search
from support.store_jobs import Grant
from support.workers import Team
from tokenstore.testing.history import Operation, check_history
from tokenstore.testing.provider import StrictRotatingProvider

_EXAMPLES = 20
_PROCESSES = 4
_LEASE = 1.0
# SQLite's clock counts milliseconds, and a machine's clocks may be adjusted against each other.
_CLOCK_ERROR = 0.05
_LONG, _PROMPTLY = 60.0, 10.0


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    team = Team()
    yield team
    team.close()


@pytest.fixture
def ready(row: Row, tmp_path: Path, team: Team) -> str:
    """A URL whose table exists and holds one row."""
    url = row.url_for(tmp_path)
    team[0].call(store_jobs.set_up, url)
    team[0].call(store_jobs.store, url, "old")
    return url


@shared_rows
def test_processes_that_set_up_at_once_all_succeed(row: Row, tmp_path: Path, team: Team) -> None:
    """``setup`` in eight processes on an empty database creates one table, without an error in any."""
    for _ in range(3):
        url = row.url_for(tmp_path)
        team.all_at_once(store_jobs.set_up, url, count=8)
        team[0].call(store_jobs.store, url, "first")


@shared_rows
def test_each_row_behaves_as_if_used_by_one_caller_at_a_time(row: Row, tmp_path: Path, team: Team) -> None:
    """Generated programs whose tasks are spread over processes leave possible histories on the clock they share."""
    finding = _search(row.url_for(tmp_path), team, None, examples=_EXAMPLES, shrinks=100)
    if finding is not None:
        raise finding.violation


@pytest.mark.seeded
@each_database
@pytest.mark.parametrize("name", ["lock that only reads", "read-then-write upsert"])
def test_the_programs_find_a_seeded_fault_between_processes(name: str, row: Row, tmp_path: Path, team: Team) -> None:
    """The faults of test_broken_backends.py that are races show between processes, too."""
    fault = fault_named(name, row.mark)
    assert _search(row.url_for(tmp_path), team, fault, examples=300, kinds=fault.kinds) is not None


def _search(url: str, team: Team, fault: Fault | None, **bounds: Any) -> Finding | None:
    """Run programs whose tasks are dealt to the processes."""
    team[0].call(store_jobs.set_up, url)
    numbers = itertools.count()

    def run(program: Program) -> None:
        def job(name: str, part: Program) -> tuple[Any, ...]:
            return store_jobs.play, url, f"{name}-", user_id, part, fault

        user_id = f"u{next(numbers)}."
        history: list[Operation] = team[0].call(*job("first", BEFORE))
        for operations in team.together([job(str(n), program[n::_PROCESSES]) for n in range(_PROCESSES)]):
            history += operations
        history += team[1].call(*job("last", AFTER))
        check_history(history)

    return search(run, programs(tasks=8, steps=4), **bounds)


@each_database
def test_a_fleet_refreshes_an_expired_token_once(row: Row, tmp_path: Path, team: Team) -> None:
    """Of 20 processes with 10 tasks each, one refreshes; all others wait, without an error, and get its new token."""
    url = row.url_for(tmp_path)
    team[0].call(store_jobs.set_up, url)
    with StrictRotatingProvider() as provider:
        team[0].call(store_jobs.store_grant, url, provider.new_grant("user")["refresh_token"])
        client = {"client_id": provider.client_id, "client_secret": provider.client_secret}
        results = team.all_at_once(store_jobs.refresh, url, provider.token_url, client, 10, count=20)
        stats = provider.stats()
    assert (stats.requests, stats.refreshes, stats.reuses, stats.revoked_grants) == (1, 1, 0, 0)
    tokens = [token for process in results for token in process]
    assert len(tokens) == 200
    assert len(set(tokens)) == 1


@shared_rows
def test_a_killed_process_gives_up_its_row_lock(ready: str, team: Team) -> None:
    """Who waits for the lock of a process that is killed gets it at once, and the row as it was before."""
    holder, waiter = team.first(2)
    before = team[0].call(store_jobs.load, ready)
    holder.start(store_jobs.hold_lock, ready)
    holder.met()
    waiter.start(store_jobs.wait_for_lock, ready, _LONG)
    waiter.met()
    waiter.go_on()
    killed_at = time.monotonic()
    holder.signal(SIGKILL)
    team.dismiss(holder)
    assert waiter.result() == before
    assert time.monotonic() - killed_at < _PROMPTLY


@shared_rows
def test_a_killed_holder_s_lease_is_taken_over_once_when_it_expires(ready: str, team: Team) -> None:
    """Nobody can claim before the dead holder's lease has run out; then one process can, and completes."""
    dead = team[0]
    dead.start(store_jobs.hold_lease, ready, "dead", _LEASE)
    lost: Grant = dead.met()
    dead.signal(SIGKILL)
    team.dismiss(dead)
    names = ["a", "b", "c", "d"]
    grants = team.together([(store_jobs.take_over, ready, name, lost) for name in names])
    [grant] = [grant for grant in grants if grant is not None]
    assert (grant.granted_at - lost.asked_at) / 1e9 > _LEASE - _CLOCK_ERROR
    assert team[0].call(store_jobs.complete, ready, grant) is True
    assert team[0].call(store_jobs.load, ready) == (f"by {grant.holder}", lost.generation + 1)


@shared_rows
def test_a_holder_that_slept_through_its_lease_has_lost_it(ready: str, team: Team) -> None:
    """A frozen process that wakes up after another took over can neither complete nor release, and harms nothing."""
    sleeper, other = team.first(2)
    sleeper.start(store_jobs.hold_lease, ready, "sleeper", _LEASE)
    lost: Grant = sleeper.met()
    sleeper.signal(SIGSTOP)
    grant = other.call(store_jobs.take_over, ready, "other", lost)
    assert grant is not None
    sleeper.signal(SIGCONT)
    sleeper.go_on()
    assert sleeper.result() == [False, False]
    assert other.call(store_jobs.take_over, ready, "third", grant._replace(holder="sleeper")) is None
    assert other.call(store_jobs.complete, ready, grant) is True
    assert other.call(store_jobs.load, ready) == ("by other", lost.generation + 1)
