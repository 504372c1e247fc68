"""Async stores for applications that have several event loops, each with an end that they do not see."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from tokenstore.errors import UnsupportedOperationError
from tokenstore.store import AuthTokenStore

__all__ = ["LoopStores"]


class LoopStores:
    """One async store for each event loop. The end of the event loop closes it, and waits for its refreshes.

    A server of ASGI has one event loop. Under WSGI each request to an ``async def`` view has an event loop of its own.
    Neither Django nor Flask tells when an event loop ends. But ``asyncio.run`` closes the asynchronous generators of
    the event loop then, so each store has one, which closes the store.

    Args:
        opener: Opens a store.
    """

    def __init__(self, opener: Callable[[], AuthTokenStore]) -> None:
        self._opener = opener
        self._stores: dict[asyncio.AbstractEventLoop, AuthTokenStore] = {}
        # Nothing else refers to them: if they were collected earlier, they would close their stores too early.
        self._ends: dict[AuthTokenStore, tuple[asyncio.AbstractEventLoop, AsyncGenerator[None, None]]] = {}

    def get(self) -> AuthTokenStore:
        """The store of the running event loop. The first call opens it; nothing is connected before its first use.

        Raises:
            UnsupportedOperationError: No event loop is running in this thread.
            ConfigurationError: A setting is missing or not acceptable.
            InvalidInputError: The namespace or a refresh setting is not acceptable.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if loop is None:  # outside the handler: no context
            raise UnsupportedOperationError(
                "no event loop is running in this thread: use the store without await in `def` views"
            )
        found = self._stores.get(loop)
        if found is not None and not found._closed:
            return found
        self._drop_closed_loops()
        store = self._opener()
        end = self._end_of(store)
        # Runs it to its `yield`. The event loop notes it at this call.
        with suppress(StopIteration):
            end.asend(None).send(None)
        self._ends[store] = loop, end
        self._stores[loop] = store
        return store

    def forget(self) -> None:
        """Open other stores from now on, as the settings have changed. Those in use are closed with their loops."""
        self._stores.clear()

    async def aclose(self) -> None:
        """Close the stores of the running event loop. Waits for refreshes in progress.

        Raises:
            TokensNotStoredError: A provider has issued new tokens that cannot be written; the error carries them.
        """
        here = asyncio.get_running_loop()
        for loop, end in list(self._ends.values()):
            if loop is here:
                await end.aclose()

    async def _end_of(self, store: AuthTokenStore) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            loop, _ = self._ends.pop(store)
            if self._stores.get(loop) is store:  # the settings may have changed since
                del self._stores[loop]
            await store.aclose()

    def _drop_closed_loops(self) -> None:
        """Drop what belongs to event loops that were closed without an end, whose connections are gone with them."""
        for store, (loop, _) in list(self._ends.items()):
            if loop.is_closed():
                self._ends.pop(store, None)
                self._stores.pop(loop, None)
