"""What the tests of the pool share."""

from __future__ import annotations

import asyncio

import pytest

from tokenstore_sql.connections import pool as pool_module


@pytest.fixture(autouse=True)
def _one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's clock is the loop's, where the loop is one of these."""

    def now() -> float:
        return asyncio.get_running_loop().time()  # on Linux the same clock, where it is no such loop

    monkeypatch.setattr(pool_module, "monotonic", now)
