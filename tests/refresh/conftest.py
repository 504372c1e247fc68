"""What the tests of the refresh share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.observer import Observer, observing


@pytest.fixture
def seen() -> Iterator[Observer]:
    """What an operator sees of the test's refreshes."""
    with observing() as observer:
        yield observer
