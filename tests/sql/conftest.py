"""Fixtures of the tests of the SQL backends."""

from __future__ import annotations

import pytest

from support.database import Place
from support.matrix import Row


@pytest.fixture
def place(row: Row, url: str) -> Place:
    """The table of the test's URL."""
    return Place(row, url)
