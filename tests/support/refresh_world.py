"""One table, one provider and the stores on them: the place in which the refresh engine is tested.

Nothing here waits by time: a test holds the provider's answers, stops a call of the backend, or moves the database's
clock.
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

from support.matrix import Row, every_row, params
from support.meddler import Meddler
from support.polling import until
from support.refreshers import OLD, Refresher, pair
from tokenstore import AuthTokenStore, Keyring, TokenRecord, open_store
from tokenstore.protocol import Backend
from tokenstore.records import SealedRecord, TokenKey
from tokenstore.registry import backend_for_url
from tokenstore.testing.provider import StrictRotatingProvider
from tokenstore_memory import MemoryBackend

_PATIENCE = 20.0
Test = Callable[..., Awaitable[None]]

# -- the place -----------------------------------------------------------------------------------------


class _Memory(MemoryBackend):
    """Rows that outlive the stores on them, as in a database."""

    async def aclose(self) -> None:
        pass


class World:
    """One table of one backend, a provider, and the stores that a test opens on them.

    At the end every store is closed, and the provider has seen no refresh token twice.
    """

    def __init__(self, row: Row, url: str, keyring: Keyring) -> None:
        self.row = row
        self.url = url
        self.keyring = keyring
        self.ahead = 0.0
        """How far the clock of the database is ahead: of the memory backend's alone."""
        self.stores: list[AuthTokenStore] = []
        self._memory = _Memory(clock=self.now) if row.mark == "memory" else None
        self._stack = ExitStack()
        self._refresher: Refresher | None = None

    @property
    def refresher(self) -> Refresher:
        """Who refreshes at the provider, in every store that was not told otherwise."""
        if self._refresher is None:
            self._refresher = Refresher(self._stack.enter_context(StrictRotatingProvider()))
        return self._refresher

    @property
    def provider(self) -> StrictRotatingProvider:
        return self.refresher.provider

    def now(self) -> float:
        """The database's clock."""
        return time.time() + self.ahead

    def at(self, seconds: float) -> datetime:
        """So many seconds from now."""
        return datetime.fromtimestamp(self.now() + seconds, UTC)

    def backend(self) -> Backend:
        """Another backend on the table, with connections of its own."""
        return self._memory or backend_for_url(self.url, {})

    async def store(self, backend: Backend | None = None, **options: Any) -> AuthTokenStore:
        """Another store on the table, as another process would open it."""
        options.setdefault("keyring", self.keyring)
        if "refreshers" not in options:
            options["refreshers"] = {"github": self.refresher}
        store = open_store(backend or self.backend(), **options)
        await store.setup()
        self.stores.append(store)
        return store

    async def meddled(self, refresh: Any = None, **options: Any) -> tuple[AuthTokenStore, Meddler]:
        """A store with a meddler between it and the table."""
        meddler = Meddler(self.backend())
        refreshers = {} if refresh is None else {"refreshers": {"github": refresh}}
        return await self.store(meddler, **refreshers, **options), meddler

    async def log_in(self, store: AuthTokenStore, user: str = "u1", *, expires_in: float = -1.0) -> TokenRecord:
        """A grant of the provider, in the store with an access token that lasts so long."""
        grant = self.provider.new_grant(user)
        await store.store_tokens("github", user, grant["access_token"], grant["refresh_token"], self.at(expires_in))
        return await self.stored(user)

    async def expired(self, store: AuthTokenStore, user: str = "u1", *, expires_in: float = -1.0) -> TokenRecord:
        """Tokens that no provider knows."""
        await store.store_tokens("github", user, *OLD, self.at(expires_in), extra={"scope": "read"})
        return await self.stored(user)

    async def stored(self, user: str = "u1") -> TokenRecord:
        """What the table holds, seen through a new store; no lease may be left on it."""
        async with self._visit() as backend:
            record = await AuthTokenStore(backend=backend, keyring=self.keyring).load_tokens("github", user)
        assert record is not None
        return record

    async def sealed(self, user: str = "u1") -> SealedRecord | None:
        """The row as the backend shows it."""
        async with self._visit() as backend:
            return await backend.get(TokenKey("github", user))

    async def until_saved(self, store: AuthTokenStore, user: str = "u1") -> TokenRecord:
        """What the table holds once the store's refreshes have ended."""
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
                    async with asyncio.timeout(_PATIENCE):
                        await test(world, **arguments)
                        await world.close()

            asyncio.run(main())
            assert not problems, problems

        # What pytest has to provide: the row, its URL, and what the test asks for beside its world.
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
"""Run it on memory alone: what it tests is the engine's own affair."""

# -- looking into the engine ---------------------------------------------------------------------------


async def until_joined(store: AuthTokenStore, callers: int) -> None:
    """Wait until so many callers beside the first wait for its refresh."""
    key = TokenKey("github", "u1")
    await until(lambda: key in store._engine._attempts and store._engine._attempts[key].report.joined == callers)


async def until_waiting(store: AuthTokenStore) -> None:
    """Wait until the store's refresh waits for somebody else's."""
    key = TokenKey("github", "u1")
    await until(lambda: key in store._engine._attempts and store._engine._attempts[key].report.waited > 0)


async def settled(store: AuthTokenStore) -> None:
    """Wait until nothing is under way."""
    while tasks := list(store._engine._tasks):
        await asyncio.wait(tasks)


async def assert_idle(world: World, tokens: tuple[str, str], code: str | None = None) -> None:
    """The row has these tokens, no lease, and this failure."""
    row = await world.sealed()
    assert row is not None
    assert row.lease_holder is None
    assert (row.failure.code if row.failure else None) == code
    assert pair(await world.stored()) == tokens


async def assert_untouched(world: World, code: str | None) -> None:
    """The row has its old tokens, no lease, and this failure."""
    await assert_idle(world, OLD, code)
