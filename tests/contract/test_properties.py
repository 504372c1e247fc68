"""What the backends promise, checked on programs that Hypothesis writes.

Whatever several tasks do at once, over one store or several, cancelled or undone at any point: each row behaves as if
one caller at a time had used it. No update made under the lock is lost; a lease has one holder; no reader sees parts
of two writes; each write adds one to the generation; an undone transaction leaves no trace; nothing stays locked.
"""

from __future__ import annotations

import gc
from pathlib import Path

from support.generated_programs import STORES, Step, programs
from support.matrix import Row, every_row
from support.program_search import Lab, search
from tokenstore.registry import backend_for_url

# Enough programs that the seeded faults of test_broken_backends.py show many times over.
_EXAMPLES = {"memory": 200}


@every_row
def test_each_row_behaves_as_if_used_by_one_caller_at_a_time(row: Row, tmp_path: Path) -> None:
    """Stores, loads, locked updates, deletes and leases, cancelled or undone anywhere, leave possible histories."""
    url = row.url_for(tmp_path)
    backends = [backend_for_url(url, {}) for _ in range(STORES if row.shared else 1)]
    with Lab(backends) as lab:
        finding = search(lab.run, programs(), examples=_EXAMPLES.get(row.name, 60), shrinks=300)
    if finding is not None:
        raise finding.violation


@every_row
def test_a_transaction_cancelled_anywhere_leaves_nothing_locked(row: Row, tmp_path: Path) -> None:
    """Others can lock the row at once, with no help from the garbage collector; so they can after a cancelled write."""
    url = row.url_for(tmp_path)
    backends = [backend_for_url(url, {"lock_timeout": 5.0}) for _ in range(STORES if row.shared else 1)]
    gc.disable()
    try:
        with Lab(backends) as lab:
            for point in range(1, 40):
                lab.run(((Step("update", pause=1, cancel_at=point),), (Step("store", cancel_at=point),)))
    finally:
        gc.enable()
