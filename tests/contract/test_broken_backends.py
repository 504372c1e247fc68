"""A checker that finds none of its seeded faults is no checker: the property tests must find each of these."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.broken_backends import FAULTS, Fault
from support.generated_programs import STORES, programs
from support.matrix import Row, row_named
from support.program_search import Lab, search

pytestmark = pytest.mark.seeded

# Most are found within 50 programs, the rarest within 250.
_EXAMPLES = 1500
# A fault is the database's, whatever the driver.
_ROWS = [row_named(name) for name in ("memory", "sqlite", "postgresql+asyncpg", "mariadb+asyncmy")]


def _faulty_rows() -> list[object]:
    """Each fault on each row of the databases that it fits."""
    return [
        pytest.param(fault, row, id=f"{fault.name}-{row.name}", marks=getattr(pytest.mark, row.mark))
        for fault in FAULTS
        for row in _ROWS
        if row.mark in fault.marks
    ]


@pytest.mark.parametrize(("fault", "row"), _faulty_rows())
def test_the_property_tests_find_a_seeded_fault(fault: Fault, row: Row, tmp_path: Path) -> None:
    """Generated programs on a broken backend show its fault, and the violation is called by its name."""
    url = row.url_for(tmp_path)
    backends = [fault.backend(url) for _ in range(STORES if row.shared else 1)]
    with Lab(backends) as lab:
        finding = search(lab.run, programs(), examples=_EXAMPLES, kinds=fault.kinds)
    assert finding is not None, f"{_EXAMPLES} programs did not show: {fault.name}"
