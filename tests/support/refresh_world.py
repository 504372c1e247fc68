"""One table, one provider and stores that use them, for the tests of the refresh engine.

The tests do not wait for a time: a test delays the provider's responses, stops a call of the backend, or advances the
database's clock.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Self, cast

import pytest

from support.interceptor import Interceptor
from support.matrix import Row, every_row, params
from support.polling import until
from support.refreshers import OLD, Refresher, pair
from tokenstore import AuthTokenStore, Keyring, TokenRecord, open_store
from tokenstore.protocol import Backend
from tokenstore.records import SealedRecord, TokenKey
from tokenstore.registry import backend_for_url
from tokenstore.testing.provider import StrictRotatingProvider
from tokenstore_memory import MemoryBackend

_TIMEOUT = 20.0
Test = Callable[..., Awaitable[None]]

# -- the world -----------------------------------------------------------------------------------------


class _Memory(MemoryBackend):
    """A memory backend whose rows remain when a store closes it, as in a database."""

    async def aclose(self) -> None:
        pass


class World:
    """One table of one backend, a provider, and the stores that a test opens.

    At the end all stores are closed, and the provider must not have got a refresh token twice.
    """

    def __init__(self, row: Row, url: str, keyring: Keyring) -> None:
        self.row = row
        self.url = url
        self.keyring = keyring
        self.ahead = 0.0
        """By how many seconds the database's clock is ahead; only for the memory backend."""
        self.stores: list[AuthTokenStore] = []
        self._memory = _Memory(clock=self.now) if row.mark == "memory" else None
        self._stack = ExitStack()
        self._refresher: Refresher | None = None

    @property
    def refresher(self) -> Refresher:
        """The refresh callable of all stores that were opened without ``refreshers``."""
        if self._refresher is None:
            self._refresher = Refresher(self._stack.enter_context(StrictRotatingProvider()))
        return self._refresher

    @property
    def provider(self) -> StrictRotatingProvider:
        return self.refresher.provider

    def now(self) -> float:
        """Return the time of the database's clock."""
        return time.time() + self.ahead

    def at(self, seconds: float) -> datetime:
        """Return the time in so many seconds, by the database's clock."""
        return datetime.fromtimestamp(self.now() + seconds, UTC)

    def backend(self) -> Backend:
        """Make another backend object for the table, with its own connections."""
        return self._memory or backend_for_url(self.url, {})

    async def store(self, backend: Backend | None = None, **options: Any) -> AuthTokenStore:
        """Open another store on the table, as another process does."""
        options.setdefault("keyring", self.keyring)
        options.setdefault("force_min_age", 0)  # a test forces a refresh just after it has stored a row
        if "refreshers" not in options:
            options["refreshers"] = {"github": self.refresher}
        store = open_store(backend or self.backend(), **options)
        await store.setup()
        self.stores.append(store)
        return store

    async def intercepted(self, refresh: Any = None, **options: Any) -> tuple[AuthTokenStore, Interceptor]:
        """Open a store whose calls of the backend go through a :class:`Interceptor`."""
        interceptor = Interceptor(self.backend())
        refreshers = {} if refresh is None else {"refreshers": {"github": refresh}}
        return await self.store(interceptor, **refreshers, **options), interceptor

    async def log_in(self, store: AuthTokenStore, user: str = "u1", *, expires_in: float = -1.0) -> TokenRecord:
        """Store a new grant with an access token, issued for an hour, that expires in so many seconds."""
        grant = self.provider.new_grant(user)
        tokens, hour = (grant["access_token"], grant["refresh_token"]), {"expires_in": 3600}
        await store.store_tokens("github", user, *tokens, self.at(expires_in), extra=hour)
        return await self.stored(user)

    async def expired(self, store: AuthTokenStore, user: str = "u1", *, expires_in: float = -1.0) -> TokenRecord:
        """Store tokens unknown to the provider. The access token, one of an hour, expires in this many seconds."""
        await store.store_tokens("github", user, *OLD, self.at(expires_in), extra={"scope": "read", "expires_in": 3600})
        return await self.stored(user)

    async def stored(self, user: str = "u1") -> TokenRecord:
        """Return the record that a new store reads."""
        async with self._visit() as backend:
            record = await AuthTokenStore(backend=backend, keyring=self.keyring).load_tokens("github", user)
        assert record is not None
        return record

    async def sealed(self, user: str = "u1") -> SealedRecord | None:
        """Return the row that the backend reads."""
        async with self._visit() as backend:
            return await backend.get(TokenKey("github", user))

    async def until_saved(self, store: AuthTokenStore, user: str = "u1") -> TokenRecord:
        """Wait until the store's refreshes have ended, and return the stored record."""
        await settled(store)
        return await self.stored(user)

    async def requests(self, count: int) -> None:
        """Wait until so many token requests have taken effect."""
        await asyncio.to_thread(self.provider.wait_for_requests, count)

    async def close(self) -> None:
        for store in self.stores:
            await store.aclose()
        if self._refresher is not None:
            assert self.provider.stats().reuses == 0, "a used refresh token was presented"

    @asynccontextmanager
    async def _visit(self) -> AsyncIterator[Backend]:
        backend = self.backend()
        try:
            yield backend
        finally:
            await backend.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _on(rows: pytest.MarkDecorator) -> Callable[[Test], Callable[..., None]]:
    def decorate(test: Test) -> Callable[..., None]:
        def run(row: Row, url: str, keyring: Keyring, **arguments: Any) -> None:
            problems: list[str] = []

            async def main() -> None:
                asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(str(context)))
                with World(row, url, keyring) as world:
                    async with asyncio.timeout(_TIMEOUT):
                        await test(world, **arguments)
                        await world.close()

            asyncio.run(main())
            assert not problems, problems

        # The parameters that pytest has to provide: the row, its URL, and the test's own without its world.
        mine = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("row", "url", "keyring")]
        others = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in list(inspect.signature(test).parameters.values())[1:]
        ]
        decorated: Any = run
        decorated.__signature__ = inspect.Signature([*mine, *others])
        for name in ("__name__", "__qualname__", "__doc__", "__module__"):
            setattr(decorated, name, getattr(test, name))
        decorated.pytestmark = list(getattr(test, "pytestmark", []))
        return cast(Callable[..., None], rows(decorated))

    return decorate


def on_rows(*names: str) -> Callable[[Test], Callable[..., None]]:
    """Run a coroutine function, which gets a `World`, on these rows."""
    return _on(pytest.mark.parametrize("row", params(names=names)))


on_every_row = _on(every_row)
"""Run a coroutine function, which gets a `World`, on every row."""
on_memory = on_rows("memory")
"""Run it only on the memory backend: the test does not depend on the database."""

# -- looking into the engine ---------------------------------------------------------------------------


async def until_joined(store: AuthTokenStore, callers: int) -> None:
    """Wait until so many callers have joined the first caller's refresh."""
    key = TokenKey("github", "u1")
    await until(lambda: key in store._engine._attempts and store._engine._attempts[key].report.joined == callers)


async def until_waiting(store: AuthTokenStore) -> None:
    """Wait until the store's refresh waits for another store's refresh."""
    key = TokenKey("github", "u1")
    await until(lambda: key in store._engine._attempts and store._engine._attempts[key].report.waited > 0)


async def settled(store: AuthTokenStore) -> None:
    """Wait until all refreshes of the store have ended."""
    while tasks := list(store._engine._tasks):
        await asyncio.wait(tasks)


async def assert_idle(world: World, tokens: tuple[str, str], code: str | None = None) -> None:
    """Assert that the row has these tokens, no lease, and a failure with this code (None: no failure)."""
    row = await world.sealed()
    assert row is not None
    assert row.lease_holder is None
    assert (row.failure.code if row.failure else None) == code
    assert pair(await world.stored()) == tokens


async def assert_untouched(world: World, code: str | None) -> None:
    """Assert that the row has its old tokens, no lease, and a failure with this code (None: no failure)."""
    await assert_idle(world, OLD, code)
