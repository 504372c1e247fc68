"""The property tests and the conformance tests must find each fault of the deliberately broken backends.

Otherwise they prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from support.broken_backends import FAULTS, KIT_FAULTS, Fault, fault_named
from support.generated_programs import STORES
from support.matrix import Row, row_named
from support.program_search import ProgramRunner, search
from support.program_strategy import programs
from tokenstore.errors import TokenStoreError
from tokenstore.protocol import Backend
from tokenstore.testing.conformance import (
    BackendConformance,
    ProcessConformance,
    RowLockConformance,
    SharedBackendConformance,
    ValueConformance,
)

pytestmark = pytest.mark.seeded

# Most faults are found within 50 programs, the rarest within 250.
_EXAMPLES = 1500
# One driver for each database, because the faults do not depend on the driver.
_ROWS = [row_named(name) for name in ("memory", "sqlite", "postgresql+asyncpg", "mariadb+asyncmy")]


def _faulty_rows(faults: Sequence[Fault]) -> list[object]:
    """Combine each fault with the databases to which it applies."""
    return [
        pytest.param(fault, row, id=f"{fault.name}-{row.name}", marks=getattr(pytest.mark, row.mark))
        for fault in faults
        for row in _ROWS
        if row.mark in fault.marks
    ]


@pytest.mark.parametrize(("fault", "row"), _faulty_rows(FAULTS))
def test_the_property_tests_find_a_seeded_fault(fault: Fault, row: Row, tmp_path: Path) -> None:
    """Generated programs on a broken backend fail, and the violation has one of the kinds expected for the fault."""
    url = row.url_for(tmp_path)
    backends = [fault.backend(url) for _ in range(STORES if row.shared else 1)]
    with ProgramRunner(backends) as runner:
        finding = search(runner.run, programs(), examples=_EXAMPLES, kinds=fault.kinds)
    assert finding is not None, f"{_EXAMPLES} programs did not find the fault: {fault.name}"


class BrokenBackend(
    ProcessConformance, SharedBackendConformance, BackendConformance, RowLockConformance, ValueConformance
):
    """The conformance tests of a backend with a fault."""

    def __init__(self, row: Row, fault: Fault) -> None:
        self._row, self._fault = row, fault

    def make_url(self, tmp_path: Path) -> str:
        return self._row.url_for(tmp_path)

    def open(self, url: str, **options: Any) -> Backend:
        return cast(Backend, self._fault.backend(url, **options))

    def opener(self) -> Callable[[str], Backend]:
        return self._fault.backend


BrokenBackend.__test__ = False  # pytest would run all its tests


@pytest.fixture(scope="module")
def processes() -> Iterator[None]:
    BrokenBackend.setup_class()
    yield
    BrokenBackend.teardown_class()


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(("fault", "row"), _faulty_rows(KIT_FAULTS))
def test_the_conformance_tests_find_a_seeded_fault(fault: Fault, row: Row, tmp_path: Path) -> None:
    """Otherwise an author of a backend could ship it."""
    for name in fault.kinds:
        broken = BrokenBackend(row, fault)
        for _ in range(10):
            try:
                getattr(broken, name)(tmp_path)
            except (AssertionError, TokenStoreError, ValueError):
                break
            finally:
                broken.teardown_method()
        else:
            pytest.fail(f"{name} did not find the fault")


@pytest.mark.sqlite
def test_two_backends_in_one_process_do_not_show_locks_in_its_memory(tmp_path: Path) -> None:
    """So only the tests of several processes find that fault."""
    broken = BrokenBackend(row_named("sqlite"), fault_named("row locks in one process's memory", "sqlite"))
    RowLockConformance.test_increments_under_the_lock_are_not_lost(broken, tmp_path)
