"""The shipped conformance tests on every backend and driver, by URL and on an application's engine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from support.matrix import Row, each_database, every_row, shared_rows
from tokenstore.protocol import Backend
from tokenstore.registry import backend_for_engine
from tokenstore.testing.conformance import (
    BackendConformance,
    ProcessConformance,
    RowLockConformance,
    SharedBackendConformance,
    Testbed,
    ValueConformance,
)


class OnRow(Testbed):
    """Opens the backend of the row with which the class is parametrised."""

    row: Row

    @pytest.fixture(autouse=True)
    def _take_row(self, row: Row) -> None:
        self.row = row
        self.in_memory = row.name == "memory"  # type: ignore[misc]  # only known when the test runs
        self.needs_setup = not self.in_memory  # type: ignore[misc]

    def make_url(self, tmp_path: Path) -> str:
        return self.row.url_for(tmp_path)


@every_row
class TestByUrl(OnRow, BackendConformance, RowLockConformance, ValueConformance):
    """One backend object, as in a single process."""


@shared_rows
class TestShared(OnRow, SharedBackendConformance, RowLockConformance, ValueConformance):
    """Two backend objects, as in two processes."""


@each_database
class TestProcesses(OnRow, ProcessConformance):
    """Several processes."""


@each_database
class TestOnEngine(OnRow, BackendConformance, RowLockConformance, ValueConformance):
    """A backend on an engine with SQLAlchemy's defaults, which the backend must not change."""

    def open(self, url: str, **options: Any) -> Backend:
        plain, _, query = url.partition("?")
        engine = create_async_engine(plain.replace("sqlite:", "sqlite+aiosqlite:"))
        backend = backend_for_engine(engine, {**dict(parse_qsl(query)), **options})
        self.engines = {**getattr(self, "engines", {}), backend: engine}
        return backend

    engines: Mapping[Backend, AsyncEngine]

    async def close(self, backend: Backend) -> None:
        await backend.aclose()
        await self.engines[backend].dispose()


@pytest.mark.parametrize(("module", "needs"), [("conformance", "pytest"), ("machine", "hypothesis")])
def test_without_its_dependency_a_testing_module_says_what_to_install(module: str, needs: str) -> None:
    program = f"""
import sys
sys.modules[{needs!r}] = None
import tokenstore.testing
from tokenstore import MissingDependencyError
try:
    import tokenstore.testing.{module}
except MissingDependencyError as error:
    assert {needs!r} in str(error).lower(), error
    assert 'pip install "tokenstore[testing]"' in str(error), error
else:
    raise AssertionError("imported")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
