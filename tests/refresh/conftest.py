"""Fixtures of the tests of the refresh engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.observer import Observer, observing


@pytest.fixture
def seen() -> Iterator[Observer]:
    """Collects the logs, metrics and spans of the test's refreshes."""
    with observing() as observer:
        yield observer
