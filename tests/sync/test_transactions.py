"""Transactions of the store without ``await``."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from support.matrix import Row, each_database, params, sqlite_row
from support.sync_stores import Open, interrupted
from tokenstore import InvalidInputError, Keyring, StoreClosedError
from tokenstore.sync import AuthTokenStore, Transaction, open_store

_sqlite_and_postgres = pytest.mark.parametrize("row", params(names=["sqlite", "postgresql+asyncpg"]))


class Left(Exception):
    pass


def _access_token(store: AuthTokenStore | Transaction, *, for_update: bool = False) -> str:
    record = store.load_tokens("github", "u1", for_update)
    assert record is not None
    return record["access_token"]


@each_database
def test_a_block_is_committed_at_its_end_and_rolled_back_by_an_exception(row: Row, open_sync: Open) -> None:
    store = open_sync()
    store.store_tokens("github", "u1", "first", None, None)
    with store.transaction() as tx:
        assert _access_token(tx, for_update=True) == "first"
        tx.store_tokens("github", "u1", "second", None, None)
        assert _access_token(store) == "first"
        assert _access_token(tx) == "second"
    assert _access_token(store) == "second"
    left = Left()
    with pytest.raises(Left) as caught:
        _delete_and_raise(store, left)
    assert caught.value is left
    assert (left.__cause__, left.__context__) == (None, None)
    assert _access_token(store) == "second"
    with pytest.raises(StoreClosedError, match="has ended"):
        tx.load_tokens("github", "u1")


def _delete_and_raise(store: AuthTokenStore, error: Exception) -> None:
    with store.transaction() as tx:
        assert tx.delete_tokens("github", "u1")
        raise error


@each_database
def test_all_calls_of_a_block_are_made_by_one_task(row: Row, open_sync: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if threads share it; the begin and the commit are that task's, too."""
    store = open_sync()
    tasks: list[object] = []
    backend = store.aio._lockable
    assert backend is not None
    begin = backend.transaction

    def noted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            tasks.append(asyncio.current_task())
            return function(*args, **kwargs)

        return call

    class Noted:
        def __init__(self) -> None:
            self._inner = begin()

        async def __aenter__(self) -> object:
            tasks.append(asyncio.current_task())
            rows = await self._inner.__aenter__()
            for name in ("get", "put", "lock", "delete"):
                monkeypatch.setattr(rows, name, noted(getattr(rows, name)))
            return rows

        async def __aexit__(self, *error: object) -> object:
            tasks.append(asyncio.current_task())
            return await self._inner.__aexit__(*error)  # type: ignore[arg-type]

    monkeypatch.setattr(backend, "transaction", Noted)
    with store.transaction() as tx:
        tx.load_tokens("github", "u1", for_update=True)
        thread = threading.Thread(target=tx.store_tokens, args=("github", "u1", "access", None, None))
        thread.start()
        thread.join(30)
        assert tx.delete_tokens("github", "u1")
    assert len(tasks) >= 5
    assert len(set(tasks)) == 1


@_sqlite_and_postgres
def test_a_transaction_that_was_interrupted_is_rolled_back(row: Row, open_sync: Open) -> None:
    """The call that is waiting for a lock ends with its wait. Leaving the block is an error: nothing was committed."""
    store = open_sync(lock_timeout=60)
    store.store_tokens("github", "u1", "first", None, None)
    with store.transaction() as holder:
        holder.load_tokens("github", "u1", for_update=True)
        with pytest.raises(StoreClosedError, match="interrupted"):
            _interrupt_and_go_on(store, writes_before=row.mark != "sqlite")  # SQLite has one lock for all rows
        with pytest.raises(KeyboardInterrupt), store.transaction() as tx:
            interrupted(lambda: tx.load_tokens("github", "u1", for_update=True))
        holder.store_tokens("github", "u1", "second", None, None)
    assert _access_token(store) == "second"
    assert store.load_tokens("github", "u2") is None


def _interrupt_and_go_on(store: AuthTokenStore, *, writes_before: bool) -> None:
    with store.transaction() as tx:
        if writes_before:
            tx.store_tokens("github", "u2", "lost", None, None)
        with pytest.raises(KeyboardInterrupt):
            interrupted(lambda: tx.load_tokens("github", "u1", for_update=True))
        with pytest.raises(StoreClosedError, match="was interrupted, so it is rolled back"):
            tx.load_tokens("github", "u1")


@sqlite_row
def test_a_transaction_that_cannot_begin_raises_its_error(row: Row, url: str, keyring: Keyring) -> None:
    with open_store(url, keyring=keyring) as store:
        store.close()
        with pytest.raises(StoreClosedError), store.transaction():
            raise AssertionError


@pytest.mark.parametrize("row", params(names=["sqlite"]))
def test_an_error_of_an_argument_leaves_the_transaction_usable(row: Row, open_sync: Open) -> None:
    """As in an async block: only the database's errors end it."""
    store = open_sync()
    with store.transaction() as tx:
        with pytest.raises(InvalidInputError):
            tx.store_tokens("github", "", "access", None, None)
        tx.store_tokens("github", "u1", "access", None, None)
    assert _access_token(store) == "access"
