"""Of many processes that pop one value, one gets it; of many that insert one, one does; on every database."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from support import store_jobs, value_jobs
from support.broken_backends import Fault
from support.matrix import Row, shared_rows
from support.value_jobs import InsertThatReadsThenPuts, PopThatReadsThenDeletes
from support.workers import Team

_PROCESSES, _TASKS = 4, 3


@pytest.fixture
def ready(row: Row, tmp_path: Path, team: Team) -> str:
    """A URL of tables without rows."""
    url = row.url_for(tmp_path)
    team[0].call(store_jobs.set_up, url)
    return url


def _popped(url: str, team: Team, names: Sequence[str], fault: Fault | None = None) -> Counter[str]:
    """Put a value under each name, and let all processes pop them; return how often each value was returned."""
    team[0].call(value_jobs.put_each, url, names)
    found = team.all_at_once(value_jobs.pop_each, url, names, _TASKS, fault, count=_PROCESSES)
    return Counter(value for values in found for value in values)


@shared_rows
def test_each_value_is_popped_once_by_all_processes_together(ready: str, team: Team) -> None:
    names = [f"state-{number}" for number in range(60)]
    assert _popped(ready, team, names) == Counter(names)


@shared_rows
def test_the_race_finds_a_pop_that_reads_and_then_deletes(ready: str, team: Team) -> None:
    """Otherwise it would prove nothing."""
    for round_number in itertools.count():
        names = [f"state-{round_number}-{number}" for number in range(60)]
        counts = _popped(ready, team, names, PopThatReadsThenDeletes())
        if max(counts.values()) > 1:
            break
        assert round_number < 10, "the race did not find the fault"


@shared_rows
def test_each_value_is_inserted_once_by_all_processes_together(ready: str, team: Team) -> None:
    names = [f"key-{number}" for number in range(30)]
    inserted = team.all_at_once(value_jobs.insert_each, ready, names, _TASKS, count=_PROCESSES)
    assert sorted(name for some in inserted for name in some) == sorted(names)


@shared_rows
def test_the_race_finds_an_insert_that_reads_and_then_puts(ready: str, team: Team) -> None:
    """Otherwise it would prove nothing."""
    for round_number in itertools.count():
        names = [f"key-{round_number}-{number}" for number in range(30)]
        fault = InsertThatReadsThenPuts()
        inserted = team.all_at_once(value_jobs.insert_each, ready, names, _TASKS, fault, count=_PROCESSES)
        if sum(map(len, inserted)) > len(names):
            break
        assert round_number < 10, "the race did not find the fault"
