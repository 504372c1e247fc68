"""An exception that ends the wait for a call, such as Ctrl-C, stops the waiter, and never a refresh."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import Any

import pytest

from support.matrix import Row, params
from support.refreshers import NEW, NEW_PAIR, OLD, pair
from support.sync_stores import Open, interrupted

_memory_and_sqlite = pytest.mark.parametrize("row", params(names=["memory", "sqlite"]))


class TimeLimit(Exception):
    """Like Celery's SoftTimeLimitExceeded, which a signal handler raises."""


@_memory_and_sqlite
@pytest.mark.parametrize("raised", [KeyboardInterrupt, TimeLimit])
@pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
def test_a_refresh_goes_on_after_its_waiter_was_interrupted(
    row: Row, open_sync: Open, raised: type[BaseException], is_async: bool
) -> None:
    """The provider is called once, and the new tokens are stored."""
    goes_on = threading.Event()
    calls: list[object] = []

    def plain(record: Mapping[str, Any]) -> Mapping[str, Any]:
        calls.append(record["user_id"])
        assert goes_on.wait(30)
        return NEW

    async def refresh(record: Mapping[str, Any]) -> Mapping[str, Any]:
        return await asyncio.to_thread(plain, record)

    def handler(number: int, frame: FrameType | None) -> None:
        raise raised

    store = open_sync(refreshers={"github": refresh if is_async else plain})
    store.store_tokens("github", "u1", *OLD, datetime.now(UTC) - timedelta(hours=1), extra={"expires_in": 3600})
    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(raised):
            interrupted(lambda: store.load_fresh_tokens("github", "u1"))
    finally:
        signal.signal(signal.SIGINT, before)
    goes_on.set()
    assert pair(store.load_fresh_tokens("github", "u1", missing="raise")) == NEW_PAIR
    assert calls == ["u1"]


@pytest.mark.parametrize("row", params(names=["sqlite", "postgresql+asyncpg", "mariadb+asyncmy"]))
def test_a_call_that_was_interrupted_while_it_waited_for_a_lock_is_given_up(row: Row, open_sync: Open) -> None:
    """Its task is cancelled, so that it takes effect at most once, and never later than the next call."""
    store = open_sync(lock_timeout=60)
    store.store_tokens("github", "u1", "first", None, None)
    with store.transaction() as tx:
        tx.load_tokens("github", "u1", for_update=True)
        with pytest.raises(KeyboardInterrupt):
            interrupted(lambda: store.store_tokens("github", "u1", "given up", None, None))
        tx.store_tokens("github", "u1", "second", None, None)
    store.store_tokens("github", "u2", "other", None, None)
    record = store.load_tokens("github", "u1")
    assert record is not None
    assert record["access_token"] == "second"
