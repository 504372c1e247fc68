"""The backends' guarantees between processes, also if a process is killed or suspended."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest

from support import store_jobs
from support.broken_backends import Fault, fault_named
from support.generated_programs import AFTER, BEFORE, Program
from support.matrix import Row, each_database, shared_rows
from support.program_search import Finding, search
from support.program_strategy import programs
from support.store_jobs import Grant
from support.workers import Team
from tokenstore.testing.history import Operation, check_history
from tokenstore.testing.provider import StrictRotatingProvider

_EXAMPLES = 20
_PROCESSES = 4
_LEASE = 1.0
# Seconds; SQLite's clock has a resolution of milliseconds, and the system may adjust its clocks differently.
_CLOCK_ERROR = 0.05
_LONG, _PROMPTLY = 60.0, 10.0


@pytest.fixture
def ready(row: Row, tmp_path: Path, team: Team) -> str:
    """A URL whose table has one row."""
    url = row.url_for(tmp_path)
    team[0].call(store_jobs.set_up, url)
    team[0].call(store_jobs.store, url, "old")
    return url


@shared_rows
def test_setup_from_eight_processes_at_once_succeeds_in_each(row: Row, tmp_path: Path, team: Team) -> None:
    """``setup`` in eight processes on an empty database creates one table and raises no error."""
    for _ in range(3):
        url = row.url_for(tmp_path)
        team.all_at_once(store_jobs.set_up, url, count=8)
        team[0].call(store_jobs.store, url, "first")


@shared_rows
def test_generated_programs_over_several_processes_are_linearizable(row: Row, tmp_path: Path, team: Team) -> None:
    """The tasks of generated programs run in several processes, and their history is possible for a single row."""
    finding = _search(row.url_for(tmp_path), team, None, examples=_EXAMPLES, shrinks=100)
    if finding is not None:
        raise finding.violation


@pytest.mark.seeded
@each_database
@pytest.mark.parametrize("name", ["lock that only reads", "read-then-write upsert"])
def test_generated_programs_find_a_seeded_fault_between_processes(
    name: str, row: Row, tmp_path: Path, team: Team
) -> None:
    """The programs also find those faults of test_broken_backends.py that are races between processes."""
    fault = fault_named(name, row.mark)
    assert _search(row.url_for(tmp_path), team, fault, examples=300, kinds=fault.kinds) is not None


def _search(url: str, team: Team, fault: Fault | None, **bounds: Any) -> Finding | None:
    """Run generated programs, with their tasks distributed to the processes."""
    team[0].call(store_jobs.set_up, url)
    numbers = itertools.count()

    def run(program: Program) -> None:
        def job(name: str, part: Program) -> tuple[Any, ...]:
            return store_jobs.run_program, url, f"{name}-", user_id, part, fault

        user_id = f"u{next(numbers)}."
        history: list[Operation] = team[0].call(*job("first", BEFORE))
        for operations in team.together([job(str(n), program[n::_PROCESSES]) for n in range(_PROCESSES)]):
            history += operations
        history += team[1].call(*job("last", AFTER))
        check_history(history)

    return search(run, programs(tasks=8, steps=4), **bounds)


@each_database
def test_twenty_processes_refresh_an_expired_token_once(row: Row, tmp_path: Path, team: Team) -> None:
    """Of 20 processes with 10 tasks each, one task refreshes; the others wait and get its new token."""
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
def test_updates_of_metadata_by_several_processes_lose_nothing(ready: str, team: Team) -> None:
    """While 20 fields are added by as many callers in four processes, a fifth process stores tokens."""
    assert _updated_at_once(ready, team, None) == []


@pytest.mark.seeded
@each_database
def test_the_race_of_updates_finds_a_write_without_a_comparison(row: Row, ready: str, team: Team) -> None:
    fault = fault_named("metadata written without a comparison", row.mark)
    assert any(_updated_at_once(ready, team, fault, f"{attempt}-") for attempt in range(10))


def _updated_at_once(url: str, team: Team, fault: Fault | None, prefix: str = "") -> list[str]:
    """Add fields in several processes at once, and return those that were lost."""
    names = [f"{prefix}{number:02}" for number in range(20)]
    jobs: list[tuple[Any, ...]] = [
        (store_jobs.update_metadata, url, names[n::_PROCESSES], fault) for n in range(_PROCESSES)
    ]
    team.together([*jobs, (store_jobs.store, url, "new")])
    found = team[0].call(store_jobs.load_metadata, url)
    return [name for name in names if name not in found]


@shared_rows
def test_the_row_lock_of_a_killed_process_is_released(ready: str, team: Team) -> None:
    """A caller that waits for the lock gets it at once, and reads the row without the uncommitted write."""
    holder, waiter = team.first(2)
    before = team[0].call(store_jobs.load, ready)
    holder.start(store_jobs.hold_lock, ready)
    holder.met()
    waiter.start(store_jobs.wait_for_lock, ready, _LONG)
    waiter.met()
    waiter.go_on()
    killed_at = time.monotonic()
    holder.kill()
    team.remove(holder)
    assert waiter.result() == before
    assert time.monotonic() - killed_at < _PROMPTLY


@shared_rows
def test_the_lease_of_a_killed_process_can_be_claimed_once_after_it_expires(ready: str, team: Team) -> None:
    """No claim is granted before the lease expires; then one claim is granted, and its holder can complete."""
    dead = team[0]
    dead.start(store_jobs.hold_lease, ready, "dead", _LEASE)
    lost: Grant = dead.met()
    dead.kill()
    team.remove(dead)
    names = ["a", "b", "c", "d"]
    grants = team.together([(store_jobs.take_over, ready, name, lost) for name in names])
    [grant] = [grant for grant in grants if grant is not None]
    assert (grant.granted_at - lost.asked_at) / 1e9 > _LEASE - _CLOCK_ERROR
    assert team[0].call(store_jobs.complete, ready, grant) is True
    assert team[0].call(store_jobs.load, ready) == (f"by {grant.holder}", lost.generation + 1)


@shared_rows
def test_a_process_that_was_suspended_during_its_lease_cannot_end_the_next_lease(ready: str, team: Team) -> None:
    """A suspended process that resumes after another process got the lease can neither complete nor release."""
    suspended, other = team.first(2)
    suspended.start(store_jobs.hold_lease, ready, "suspended", _LEASE)
    lost: Grant = suspended.met()
    suspended.stop()
    grant = other.call(store_jobs.take_over, ready, "other", lost)
    assert grant is not None
    suspended.resume()
    suspended.go_on()
    assert suspended.result() == [False, False]
    assert other.call(store_jobs.take_over, ready, "third", grant._replace(holder="suspended")) is None
    assert other.call(store_jobs.complete, ready, grant) is True
    assert other.call(store_jobs.load, ready) == ("by other", lost.generation + 1)
