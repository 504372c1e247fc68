"""Fixtures of the tests of the pool."""

from __future__ import annotations

import asyncio

import pytest

from tokenstore_sql.connections import pool as pool_module


@pytest.fixture(autouse=True)
def _one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pool read the event loop's clock, so that a :class:`FakeClockLoop` also controls the pool."""

    def now() -> float:
        return asyncio.get_running_loop().time()  # other event loops on Linux use the pool's usual clock

    monkeypatch.setattr(pool_module, "monotonic", now)
