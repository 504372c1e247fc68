"""One thread with an event loop serves all synchronous stores of a process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from support.matrix import Row, params
from support.refreshers import NEW, OLD
from support.sync_stores import Open
from tokenstore import Keyring, StoreClosedError, UnsupportedOperationError
from tokenstore.sync import AuthTokenStore, open_store
from tokenstore.sync.loop_thread import _Process, loop_thread

_memory = pytest.mark.parametrize("row", params(names=["memory"]))
_memory_and_databases = pytest.mark.parametrize("row", params(names=["memory", "sqlite", "postgresql+asyncpg"]))


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "tokenstore-sync"]


def test_where_no_thread_can_be_started_the_first_call_is_an_error(
    keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is in Python 3.12 after the end of the main thread. A later call tries again."""

    def refused(*_: object) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    store = open_store("memory://", keyring=keyring)
    monkeypatch.setattr(_Process, "thread", None)
    with monkeypatch.context() as refusing:
        refusing.setattr("tokenstore.sync.executor.start_thread", refused)
        with pytest.raises(StoreClosedError, match="no thread can be started") as caught:
            store.setup()
    assert caught.value.__context__ is None
    store.setup()
    store.close()


def test_the_thread_starts_at_the_first_call_and_serves_all_stores(keyring: Keyring) -> None:
    """Opening stores, as a module does that is imported, and closing unused ones, starts none."""
    first, second, unused = (open_store("memory://", keyring=keyring) for _ in range(3))
    assert "memory" in repr(first).lower()
    unused.close()
    assert not _threads()
    for store in (first, second, first):
        store.setup()
        assert _threads() == ["tokenstore-sync"]
    first.close()
    second.close()
    with pytest.raises(StoreClosedError):
        unused.setup()


def test_threads_that_come_first_at_once_share_one_loop_thread(keyring: Keyring) -> None:
    store = open_store("memory://", keyring=keyring)
    met = threading.Barrier(16)

    def call() -> None:
        met.wait(30)
        store.store_tokens("github", "u1", "access", None, None)

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert _threads() == ["tokenstore-sync"]
    store.close()


def _every_kind_of_call(store: AuthTokenStore) -> dict[str, Callable[[], object]]:
    return {
        "call": lambda: store.load_tokens("github", "u1"),
        "iterator": lambda: list(store.list_tokens()),
        "transaction": lambda: store.transaction().__enter__(),
    }


@_memory
@pytest.mark.parametrize("kind", ["call", "iterator", "transaction"])
def test_a_call_from_a_running_event_loop_is_an_error_that_names_the_async_api(
    row: Row, open_sync: Open, kind: str
) -> None:
    """It would block the event loop."""
    store = open_sync()

    async def main() -> None:
        with pytest.raises(UnsupportedOperationError, match=r"`tokenstore\.open_store`, the async API"):
            _every_kind_of_call(store)[kind]()
        assert await asyncio.to_thread(store.load_tokens, "github", "u1") is None

    asyncio.run(main())


@_memory
@pytest.mark.parametrize("kind", ["call", "iterator", "transaction"])
def test_a_call_from_the_loop_thread_is_an_error_that_names_the_async_store(
    row: Row, open_sync: Open, kind: str
) -> None:
    """It would wait for itself."""
    errors: list[str] = []

    async def refresh(record: Mapping[str, Any]) -> Mapping[str, Any]:
        with pytest.raises(UnsupportedOperationError) as caught:
            _every_kind_of_call(store)[kind]()
        errors.append(str(caught.value))
        return NEW

    store = open_sync(refreshers={"github": refresh})
    store.store_tokens("github", "u1", *OLD, None)
    store.load_fresh_tokens("github", "u1", force=True, force_min_age=0)
    assert "await the methods of `store.aio`" in errors[0]


@_memory_and_databases
def test_the_async_store_serves_no_other_event_loop_once_it_was_used(row: Row, open_sync: Open) -> None:
    store = open_sync()

    async def main() -> None:
        with pytest.raises(UnsupportedOperationError, match="one store for each event loop"):
            await store.aio.load_tokens("github", "u1")

    asyncio.run(main())


@_memory
def test_an_exception_that_would_end_the_event_loop_does_not_end_the_thread(
    row: Row, open_sync: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Asyncio lets SystemExit of a callback through."""
    store = open_sync()

    def leave() -> None:
        raise SystemExit

    loop_thread().submit(leave)
    assert store.load_tokens("github", "u1") is None
    assert "goes on after an exception" in caplog.text


def test_an_opener_may_be_any_function_that_opens_an_async_store(keyring: Keyring) -> None:
    opened: list[object] = []

    def opener() -> Any:
        from tokenstore import open_store

        opened.append(open_store("memory://", keyring=keyring))
        return opened[-1]

    with AuthTokenStore(opener) as store:
        store.setup()
        assert [store.aio] == opened


def test_an_event_loop_that_cannot_be_made_is_the_error_of_the_first_call(
    keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the process has no descriptors left. The next call tries again."""

    def refuse() -> asyncio.AbstractEventLoop:
        raise OSError("too many open files")

    store = open_store("memory://", keyring=keyring)
    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "new_event_loop", refuse)
        with pytest.raises(OSError, match="too many open files"):
            store.setup()
    store.setup()
    store.close()
