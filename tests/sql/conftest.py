"""What the tests of the SQL backends share."""

from __future__ import annotations

import pytest

from support.database import Place
from support.matrix import Row


@pytest.fixture
def place(row: Row, url: str) -> Place:
    """The table that the URL of the test's row names."""
    return Place(row, url)
