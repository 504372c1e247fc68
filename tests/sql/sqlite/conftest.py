"""The database file of the tests of SQLite."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.database import Place
from support.matrix import row_named


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.db"


@pytest.fixture
def place(path: Path) -> Place:
    return Place(row_named("sqlite"), f"sqlite:///{path}")
