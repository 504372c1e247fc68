"""The stores that the setting ``TOKENSTORE`` names: one without ``await``, and one for each event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from django.core.signals import setting_changed

from tokenstore import sync
from tokenstore.integrations._loop_stores import LoopStores
from tokenstore.integrations.django.settings import store_settings
from tokenstore.store import AuthTokenStore

__all__ = ["close_stores", "get_async_store", "get_store"]

_sync_stores: dict[str, sync.AuthTokenStore] = {}
_async_stores = LoopStores(lambda: store_settings().open())


def get_store() -> sync.AuthTokenStore:
    """The store for ``def`` views, commands and tasks: see :mod:`tokenstore.sync`.

    The first call opens the store, and the store connects at its first use. A server may fork its workers after the
    first call: each worker gets connections of its own. ``atexit`` closes the store.

    Returns:
        The same store in all threads. Do not close it.

    Raises:
        ConfigurationError: The setting ``TOKENSTORE`` is missing or not acceptable.
        InvalidInputError: The namespace or a refresh setting is not acceptable.
    """
    store = _sync_stores.get("store")
    if store is not None and not store._is_closed:
        return store
    opened = store_settings().open_sync()
    if store is not None:
        _ = _sync_stores.pop("store", None)
    # If two threads are here at once, both get the same one. The other was not used, and has nothing to close.
    return _sync_stores.setdefault("store", opened)


def get_async_store() -> AuthTokenStore:
    """The store for ``async def`` views: see :class:`tokenstore.AuthTokenStore`.

    It is opened at the first call in an event loop, and connects at its first use. The end of the event loop closes it,
    and waits for refreshes in progress. Under ASGI there is one event loop. Under WSGI each request to an ``async def``
    view has an event loop of its own, so it connects anew: use :func:`get_store` and ``def`` views there.

    Returns:
        The same store in all tasks of an event loop. Do not close it.

    Raises:
        UnsupportedOperationError: No event loop is running in this thread.
        ConfigurationError: The setting ``TOKENSTORE`` is missing or not acceptable.
        InvalidInputError: The namespace or a refresh setting is not acceptable.
    """
    return _async_stores.get()


async def close_stores() -> None:
    """Close the running event loop's store, and the one of ``def`` views. Waits for refreshes in progress.

    Raises:
        TokensNotStoredError: A provider has issued new tokens that cannot be written; the error carries them.
    """
    try:
        await _async_stores.aclose()
    finally:
        store = _sync_stores.pop("store", None)
        if store is not None:
            await asyncio.to_thread(store.close)


def _close_after_a_change(*, setting: str, **_more: object) -> None:
    """Close the store of ``def`` views if a test overrides the setting. Event loops close the others when they end."""
    if setting != "TOKENSTORE":
        return
    _async_stores.forget()
    store = _sync_stores.pop("store", None)
    if store is not None:
        with ThreadPoolExecutor(1) as thread:  # an async test may not call the store in its own thread
            thread.submit(store.close).result()


setting_changed.connect(_close_after_a_change, dispatch_uid="tokenstore")
