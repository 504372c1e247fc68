"""What the tests of the refresh engine share: a place to refresh in, those who call the provider, and a meddler.

Nothing here waits by time: a test holds the provider's answers, stops a call of the backend, or moves the database's
clock.
"""

from __future__ import annotations

import asyncio
import inspect
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Self, cast

import httpx
import pytest

from support.database import until
from support.matrix import Row, every_row, params
from tokenstore import (
    AuthTokenStore,
    BackendUnavailableError,
    Keyring,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    TokenRecord,
    open_store,
)
from tokenstore.protocol import Backend
from tokenstore.records import Failure, ScannedRow, SealedRecord, SealedTokens, TokenKey
from tokenstore.registry import backend_for_url
from tokenstore.testing.provider import ProviderError, StrictRotatingProvider, refresh_over_http
from tokenstore_memory import MemoryBackend

__all__ = [
    "NEW",
    "OLD",
    "Meddler",
    "Refresher",
    "Script",
    "Stop",
    "World",
    "failing",
    "on_every_row",
    "on_memory",
    "on_rows",
    "settled",
    "told",
    "until_joined",
    "until_waiting",
]

OLD = ("old-access-secret", "old-refresh-secret")
"""The tokens of `World.expired`."""

NEW: Mapping[str, Any] = {
    "access_token": "new-access-secret",
    "refresh_token": "new-refresh-secret",
    "expires_in": 3600,
    "scope": "read write",
}
"""A token response."""

_PATIENCE = 20.0

Action = Callable[[], Awaitable[None]]
Test = Callable[..., Awaitable[None]]


# -- those who call the provider ---------------------------------------------------------------------


class Refresher:
    """Calls a provider over HTTP, and says what its errors mean."""

    def __init__(self, provider: StrictRotatingProvider) -> None:
        self.provider = provider
        self.calls = 0

    async def __call__(self, record: TokenRecord) -> Mapping[str, Any]:
        self.calls += 1
        provider = self.provider
        try:
            return await refresh_over_http(
                provider.token_url,
                record["refresh_token"],
                client_id=provider.client_id,
                client_secret=provider.client_secret,
            )
        except ProviderError as error:
            if error.error == "invalid_grant":
                raise ReauthorizationRequiredError(str(error)) from error
            if error.status < 500:
                raise ProviderRefusedError(str(error), code=error.error) from error
            raise ProviderUnavailableError(str(error), code=error.error) from error

    async def revoke(self, record: TokenRecord) -> None:
        provider = self.provider
        async with httpx.AsyncClient(verify=False, trust_env=False) as client:
            answer = await client.post(
                f"{provider.base_url}/revoke",
                data={"token": record["refresh_token"]},
                auth=(provider.client_id, provider.client_secret),
            )
        if answer.status_code != 200:
            raise ProviderUnavailableError(f"the revocation endpoint answered {answer.status_code}")


class Script:
    """A refresh callable without a provider: it returns or raises what it is given, in turn, the last one for ever."""

    def __init__(self, *answers: Mapping[str, Any] | BaseException) -> None:
        self._answers = list(answers or (NEW,))
        self.calls = 0
        self.called = asyncio.Event()
        self.answer = asyncio.Event()
        self.answer.set()

    def hold(self) -> None:
        """Keep back what it would say, until ``answer`` is set."""
        self.answer.clear()

    async def __call__(self, record: TokenRecord) -> Mapping[str, Any]:
        self.calls += 1
        said = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        self.called.set()
        await self.answer.wait()
        if isinstance(said, BaseException):
            raise said
        return said


# -- a meddler between the engine and a backend ------------------------------------------------------


class Meddler:
    """A backend, of the protocol's least kind: without row locks and without watching. Counts calls, lets tests in.

    ``before`` and ``after`` hold an action for a method; what an action raises is what the engine gets.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.calls: Counter[str] = Counter()
        self.before: dict[str, Action] = {}
        self.after: dict[str, Action] = {}

    async def _pass(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        self.calls[name] += 1
        if action := self.before.get(name):
            await action()
        answer = await call()
        if action := self.after.get(name):
            await action()
        return answer

    async def setup(self) -> None:
        await self.backend.setup()

    async def aclose(self) -> None:
        await self.backend.aclose()

    async def get(self, keys: Sequence[TokenKey]) -> list[SealedRecord | None]:
        return cast(list[SealedRecord | None], await self._pass("get", lambda: self.backend.get(keys)))

    async def put(self, entries: Mapping[TokenKey, SealedTokens]) -> None:
        await self._pass("put", lambda: self.backend.put(entries))

    async def delete(self, key: TokenKey) -> bool:
        return bool(await self._pass("delete", lambda: self.backend.delete(key)))

    async def scan(
        self,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        after: TokenKey | None = None,
        limit: int,
    ) -> list[ScannedRow]:
        return await self.backend.scan(provider=provider, user_id=user_id, after=after, limit=limit)

    async def claim_lease(self, key: TokenKey, *, generation: int, holder: str, duration: float) -> bool:
        claim = self.backend.claim_lease
        return bool(
            await self._pass("claim_lease", lambda: claim(key, generation=generation, holder=holder, duration=duration))
        )

    async def complete_lease(self, key: TokenKey, tokens: SealedTokens, *, generation: int, holder: str) -> bool:
        complete = self.backend.complete_lease
        return bool(
            await self._pass("complete_lease", lambda: complete(key, tokens, generation=generation, holder=holder))
        )

    async def release_lease(
        self, key: TokenKey, *, generation: int, holder: str, failure: Failure | None = None
    ) -> bool:
        release = self.backend.release_lease
        return bool(
            await self._pass(
                "release_lease", lambda: release(key, generation=generation, holder=holder, failure=failure)
            )
        )

    async def rewrap(self, key: TokenKey, tokens: SealedTokens, *, generation: int) -> bool:
        return await self.backend.rewrap(key, tokens, generation=generation)


class Stop:
    """An action: whoever comes first stops here until told to go on; later ones pass."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()

    async def __call__(self) -> None:
        if not self.reached.is_set():
            self.reached.set()
            await self.go_on.wait()


def failing(times: float = float("inf"), error: Exception | None = None) -> Action:
    """An action that raises so many times: that the database is gone, if nothing else is said."""
    left = times

    async def fail() -> None:
        nonlocal left
        if left > 0:
            left -= 1
            raise error or BackendUnavailableError("the database is gone")

    return fail


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
            (row,) = await backend.get([TokenKey("github", user)])
        return row

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


def told(error: BaseException) -> str:
    """Everything that an error says to whoever looks closely: also what it hides from tracebacks."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and all(one is not other for other in found):
            found.append(one)
            waiting += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
    parts = [[*traceback.format_exception(one), repr(one), repr(one.args), repr(vars(one))] for one in found]
    return "\n".join(text for part in parts for text in part)
