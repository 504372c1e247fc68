"""The clock of tests."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from tokenstore.testing import FakeClock


def test_a_fake_clock_stands_still_until_it_is_moved() -> None:
    clock = FakeClock(1_700_000_000.5)
    assert (clock(), clock.now) == (1_700_000_000.5, datetime(2023, 11, 14, 22, 13, 20, 500_000, UTC))
    clock.advance(1.25)
    clock.advance(timedelta(days=1))
    clock.advance(0)
    assert clock() == 1_700_086_401.75
    assert repr(clock) == "<FakeClock at 2023-11-15T22:13:21.750000+00:00>"


def test_a_fake_clock_begins_now_and_does_not_go_back() -> None:
    before = time.time()
    clock = FakeClock()
    assert before <= clock() <= time.time()
    with pytest.raises(ValueError, match="does not go back"):
        clock.advance(timedelta(seconds=-1))
