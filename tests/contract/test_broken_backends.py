"""The property tests must find each fault of the deliberately broken backends; otherwise they prove nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.broken_backends import FAULTS, Fault
from support.generated_programs import STORES
from support.matrix import Row, row_named
from support.program_search import ProgramRunner, search
from support.program_strategy import programs

pytestmark = pytest.mark.seeded

# Most faults are found within 50 programs, the rarest within 250.
_EXAMPLES = 1500
# One driver for each database, because the faults do not depend on the driver.
_ROWS = [row_named(name) for name in ("memory", "sqlite", "postgresql+asyncpg", "mariadb+asyncmy")]


def _faulty_rows() -> list[object]:
    """Combine each fault with the databases to which it applies."""
    return [
        pytest.param(fault, row, id=f"{fault.name}-{row.name}", marks=getattr(pytest.mark, row.mark))
        for fault in FAULTS
        for row in _ROWS
        if row.mark in fault.marks
    ]


@pytest.mark.parametrize(("fault", "row"), _faulty_rows())
def test_the_property_tests_find_a_seeded_fault(fault: Fault, row: Row, tmp_path: Path) -> None:
    """Generated programs on a broken backend fail, and the violation has one of the kinds expected for the fault."""
    url = row.url_for(tmp_path)
    backends = [fault.backend(url) for _ in range(STORES if row.shared else 1)]
    with ProgramRunner(backends) as runner:
        finding = search(runner.run, programs(), examples=_EXAMPLES, kinds=fault.kinds)
    assert finding is not None, f"{_EXAMPLES} programs did not find the fault: {fault.name}"
