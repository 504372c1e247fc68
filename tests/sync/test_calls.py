"""Every method of the store without ``await`` works, on each database, from any number of threads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from support.frame_walk import Walk
from support.matrix import Row, each_database, params, sqlite_row
from support.refreshers import NEW, NEW_PAIR, OLD, Gone, Revoker, pair
from support.sync_stores import Open
from tokenstore import (
    Keyring,
    ProviderUnavailableError,
    StoreClosedError,
    TokensMissingError,
    TokenStoreError,
    TransactionRequiredError,
)
from tokenstore.sync import AuthTokenStore, open_store

_THREADS, _ROUNDS = 64, 100
_memory_and_sqlite = pytest.mark.parametrize("row", params(names=["memory", "sqlite"]))
_memory = pytest.mark.parametrize("row", params(names=["memory"]))


def _expire(store: AuthTokenStore, user: str = "u1") -> None:
    past = datetime.now(UTC) - timedelta(hours=1)
    store.store_tokens("github", user, *OLD, past, extra={"expires_in": 3600})


@each_database
def test_each_method_does_what_the_async_one_does(row: Row, open_sync: Open) -> None:
    revoker = Revoker()
    with open_sync(refreshers={"github": revoker}) as store:
        _expire(store)
        record = store.load_tokens("github", "u1")
        assert record is not None
        assert pair(record) == OLD
        assert not store.is_access_token_valid(record)
        assert store.is_refresh_token_valid(record)
        assert not store.needs_reseal(record)
        assert not store.reseal_tokens("github", "u1")
        assert store.store_tokens("github", "u1", "other", None, None, if_absent=True) is False
        assert [(entry["user_id"], entry["status"]) for entry in store.list_tokens()] == [("u1", "expired")]
        assert pair(store.load_fresh_tokens("github", "u1", missing="raise")) == NEW_PAIR
        with pytest.raises(TokensMissingError):
            store.load_fresh_tokens("github", "nobody", missing="raise")
        assert store.load_fresh_tokens("github", "nobody") is None
        assert not store.clear_failure("github", "u1")
        assert [result.outcome for result in store.refresh_due(within=timedelta(hours=2))] == ["refreshed"]
        assert pair(store.store_token_response("github", "u2", {"access_token": "a", "refresh_token": "r"})) == (
            "a",
            "r",
        )
        assert store.delete_tokens("github", "u2")
        assert store.revoke_tokens("github", "u1")
        assert revoker.revoked == [NEW_PAIR]
        assert not list(store.list_tokens())
        store.put_value("login", "state", {"verifier": "v"}, ttl=60)
        assert store.get_value("login", "state") == {"verifier": "v"}
        assert [entry["name"] for entry in store.list_values(namespace="login")] == ["state"]
        assert not store.reseal_value("login", "state")
        assert store.pop_value("login", "state") == {"verifier": "v"}
        assert store.pop_value("login", "state", "gone") == "gone"
        assert (store.delete_values("login"), store.purge_values()) == (0, 0)
        with pytest.raises(TransactionRequiredError):
            store.load_tokens("github", "u1", for_update=True)
    with pytest.raises(StoreClosedError):
        store.load_tokens("github", "u1")
    store.close()


@pytest.mark.parametrize("row", params(names=["memory", "sqlite", "postgresql+asyncpg", "mariadb+asyncmy"]))
def test_64_threads_make_100_operations_each(row: Row, open_sync: Open) -> None:
    """Each thread reads what it has written, and all threads count one row up, under its lock."""
    store = open_sync(lock_timeout=60)
    store.store_tokens("github", "shared", "0", None, None)
    began = threading.Barrier(_THREADS)

    def work(number: int) -> None:
        began.wait(60)
        user = f"user {number}"
        for turn in range(_ROUNDS // 2 - 1):
            store.store_tokens("github", user, f"{number}/{turn}", None, None)
            record = store.load_tokens("github", user)
            assert record is not None
            assert record["access_token"] == f"{number}/{turn}"
        with store.transaction() as tx:
            record = tx.load_tokens("github", "shared", for_update=True)
            assert record is not None
            tx.store_tokens("github", "shared", str(int(record["access_token"]) + 1), None, None)

    with ThreadPoolExecutor(_THREADS) as pool:
        for future in [pool.submit(work, number) for number in range(_THREADS)]:
            future.result()
    record = store.load_tokens("github", "shared")
    assert record is not None
    assert record["access_token"] == str(_THREADS)
    assert len(list(store.list_tokens(page_size=10))) == _THREADS + 1


@_memory_and_sqlite
def test_threads_that_find_an_expired_token_make_one_call_of_the_provider(row: Row, open_sync: Open) -> None:
    calls: Counter[str] = Counter()

    def refresh(record: Mapping[str, Any]) -> Mapping[str, Any]:
        calls[record["user_id"]] += 1
        return NEW

    store = open_sync(refreshers={"github": refresh})
    _expire(store)
    with ThreadPoolExecutor(_THREADS) as pool:
        records = list(pool.map(lambda _: store.load_fresh_tokens("github", "u1", missing="raise"), range(_THREADS)))
    assert {pair(record) for record in records} == {NEW_PAIR}
    assert calls == {"u1": 1}


@_memory
def test_plain_refreshers_and_callbacks_never_run_in_the_loop_thread(row: Row, open_sync: Open) -> None:
    """They may block, and call the store, which is an error in an event loop."""
    loaded: dict[str, object] = {}

    def note(name: str) -> None:
        record = store.load_tokens("github", "u1")
        assert record is not None
        loaded[name] = pair(record)

    def refresh(record: Mapping[str, Any]) -> Mapping[str, Any]:
        note("refresher")
        if record["user_id"] == "fails":
            raise Gone
        return NEW

    told = threading.Semaphore(0)

    def callback(name: str) -> Any:
        def call(_: object) -> None:
            note(name)
            told.release()

        return call

    names = ["on_refreshed", "on_recovered", "on_reauthorization_required", "on_error"]
    store = open_sync(refreshers={"github": refresh}, **{name: callback(name) for name in names})
    _expire(store)
    _expire(store, "fails")
    with pytest.raises(ProviderUnavailableError):
        store.load_fresh_tokens("github", "fails")
    assert told.acquire(timeout=30)
    assert pair(store.load_fresh_tokens("github", "u1", missing="raise")) == NEW_PAIR
    assert told.acquire(timeout=30)
    assert loaded == {"refresher": OLD, "on_error": OLD, "on_refreshed": NEW_PAIR}


@_memory
def test_an_async_refresher_uses_the_async_store(row: Row, open_sync: Open) -> None:
    """It runs in the event loop, where ``aio`` can be awaited."""
    seen: list[object] = []

    async def refresh(record: Mapping[str, Any]) -> Mapping[str, Any]:
        seen.append(await store.aio.get_value("provider", "certificate"))
        return NEW

    store = open_sync(refreshers={"github": refresh})
    store.put_value("provider", "certificate", "sealed")
    _expire(store)
    assert pair(store.load_fresh_tokens("github", "u1", missing="raise")) == NEW_PAIR
    assert seen == ["sealed"]


@sqlite_row
def test_an_error_keeps_no_token_in_the_frames_of_the_library(row: Row, url: str, keyring: Keyring) -> None:
    """As with the async store, error trackers that print local variables show none. Here the table is missing."""
    secrets = "AT-5f0c-planted", "RT-91be-planted"
    walk = Walk(secrets)
    store = open_store(url, keyring=keyring)

    def in_a_transaction() -> None:
        with store.transaction() as tx:
            tx.store_tokens("github", "u1", *secrets, None)

    response = {"access_token": secrets[0], "refresh_token": secrets[1]}
    calls: dict[str, Callable[[], object]] = {
        "store_tokens": lambda: store.store_tokens("github", "u1", *secrets, None),
        "store_token_response": lambda: store.store_token_response("github", "u1", response),
        "put_value": lambda: store.put_value("login", "state", secrets[0]),
        "transaction": in_a_transaction,
        "a wrong argument": lambda: store.store_tokens("github", "", *secrets, None),
    }
    for name, call in calls.items():
        with pytest.raises(TokenStoreError) as caught:
            call()
        walk.through(caught.value, name)
    store.close()
