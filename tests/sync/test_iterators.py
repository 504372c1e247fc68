"""The iterators of the store without ``await`` read page by page."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from support.matrix import Row, each_database, params, sqlite_row
from support.refreshers import NEW, OLD
from support.sync_stores import Open
from tokenstore import InvalidInputError, TamperedError

_memory = pytest.mark.parametrize("row", params(names=["memory"]))


@each_database
def test_a_page_is_read_when_its_first_row_is_asked_for(row: Row, open_sync: Open) -> None:
    """Between two pages no connection is held, and rows that were deleted meanwhile do not appear."""
    store = open_sync(pool_size=1) if row.mark != "sqlite" else open_sync()
    for number in range(6):
        store.store_tokens("github", f"u{number}", "access", None, None)
    rows = store.list_tokens(page_size=2)
    users = [next(rows)["user_id"], next(rows)["user_id"]]
    assert store.delete_tokens("github", "u3")
    users += [entry["user_id"] for entry in rows]
    assert users == ["u0", "u1", "u2", "u4", "u5"]


@_memory
def test_an_iteration_may_end_early(row: Row, open_sync: Open) -> None:
    store = open_sync()
    for number in range(6):
        store.store_tokens("github", f"u{number}", "access", None, None)
        store.put_value("login", f"v{number}", number)
    for entry in store.list_tokens(page_size=2):
        assert entry["user_id"] == "u0"
        break
    assert next(store.list_values(page_size=1))["name"] == "v0"
    with pytest.raises(InvalidInputError):
        list(store.list_tokens(page_size=0))
    with pytest.raises(InvalidInputError):
        list(store.list_tokens(page_size="many"))  # type: ignore[call-overload]


@_memory
def test_results_of_refresh_due_arrive_as_the_refreshes_end(row: Row, open_sync: Open) -> None:
    """The first result is there while the provider still works on the second row. Leaving early cancels no refresh."""
    goes_on, stored = threading.Event(), threading.Event()

    def refresh(record: Mapping[str, Any]) -> Mapping[str, Any]:
        if record["user_id"] == "slow":
            assert goes_on.wait(30)
        return NEW

    def on_refreshed(record: Mapping[str, Any]) -> None:
        if record["user_id"] == "slow":
            stored.set()

    store = open_sync(refreshers={"github": refresh}, on_refreshed=on_refreshed)
    for user in ("fast", "slow"):
        store.store_tokens("github", user, *OLD, datetime.now(UTC) + timedelta(minutes=30), extra={"expires_in": 3600})
    results = store.refresh_due(within=timedelta(hours=1))
    first = next(results)
    assert (first.user_id, first.outcome) == ("fast", "refreshed")
    results.close()
    goes_on.set()
    assert stored.wait(30)


@sqlite_row
@pytest.mark.parametrize("page_size", [1, 500])
def test_an_altered_row_is_an_error_behind_all_other_rows(row: Row, open_sync: Open, url: str, page_size: int) -> None:
    store = open_sync()
    for number in range(3):
        store.store_tokens("github", f"u{number}", "access", None, None)
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE oauth_tokens SET generation = -1 WHERE user_id = 'u1'"))
    engine.dispose()
    found: list[str] = []
    with pytest.raises(TamperedError):
        found.extend(entry["user_id"] for entry in store.list_tokens(page_size=page_size))
    assert found == ["u0", "u2"]
