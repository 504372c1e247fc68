"""The backends' guarantees, checked with programs that Hypothesis generates.

Several tasks use one store or several at the same time, and are cancelled or rolled back at any point. Each row must
behave as if its calls had been made one after the other: no update under the lock is lost, a lease has one holder, no
read mixes two writes, each write adds one to the generation, a rolled back transaction changes nothing, and no row
stays locked.
"""

from __future__ import annotations

import gc
from pathlib import Path

from support.generated_programs import STORES, Step
from support.matrix import Row, every_row
from support.program_search import ProgramRunner, search
from support.program_strategy import programs
from tokenstore.registry import backend_for_url

# Several times as many programs as are needed to find the seeded faults of test_broken_backends.py.
_EXAMPLES = {"memory": 200}


@every_row
def test_generated_programs_are_linearizable(row: Row, tmp_path: Path) -> None:
    """Stores, loads, locked updates, deletes and leases, cancelled or rolled back anywhere, have possible histories."""
    url = row.url_for(tmp_path)
    backends = [backend_for_url(url, {}) for _ in range(STORES if row.shared else 1)]
    with ProgramRunner(backends) as runner:
        finding = search(runner.run, programs(), examples=_EXAMPLES.get(row.name, 60), shrinks=300)
    if finding is not None:
        raise finding.violation


@every_row
def test_a_call_cancelled_at_any_point_leaves_no_row_locked(row: Row, tmp_path: Path) -> None:
    """After a cancelled transaction or write, other callers can lock the row at once, without a garbage collection."""
    url = row.url_for(tmp_path)
    backends = [backend_for_url(url, {"lock_timeout": 5.0}) for _ in range(STORES if row.shared else 1)]
    gc.disable()
    try:
        with ProgramRunner(backends) as runner:
            for point in range(1, 40):
                runner.run(((Step("update", pause=1, cancel_at=point),), (Step("store", cancel_at=point),)))
    finally:
        gc.enable()
