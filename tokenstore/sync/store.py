"""The synchronous store: the methods of the async one, without ``await``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Generator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from datetime import timedelta
from functools import partial
from inspect import isawaitable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, cast, overload

from tokenstore.errors import StoreClosedError, TokenStoreError
from tokenstore.event_loops import forks
from tokenstore.health import Status, TokenEntry, TokenEntryWithMetadata
from tokenstore.keyring import Keyring
from tokenstore.native_threads import in_thread, is_coroutine_function
from tokenstore.operations import Clock
from tokenstore.operations import TokenOperations as AsyncTokenOperations
from tokenstore.options import StoreOptions
from tokenstore.protocol import Backend
from tokenstore.records import MigrationResult, TokenRecord
from tokenstore.results import RefreshResult
from tokenstore.store import AuthTokenStore as AsyncAuthTokenStore
from tokenstore.store import open_store as open_async_store
from tokenstore.sync.loop_thread import LoopThread, is_in_use, loop_thread
from tokenstore.sync.operations import TokenOperations
from tokenstore.sync.transaction import OpenTransaction, Transaction
from tokenstore.sync.values import ValueOperations
from tokenstore.tracebacks import clear_locals, clears_locals
from tokenstore.transaction import Transaction as AsyncTransaction

if TYPE_CHECKING:
    # For annotations only, as in the async store.
    from sqlalchemy.ext.asyncio import AsyncEngine

    from tokenstore.refresh.attempt import Refresh
    from tokenstore.refresh.engine import OnError, OnReauthorizationRequired, OnRefreshed
    from tokenstore.refresh.revoke import SupportsRevocation

__all__ = ["AuthTokenStore", "open_store"]

T = TypeVar("T")
A = TypeVar("A")


class AuthTokenStore(TokenOperations, ValueOperations):
    """The store without ``await``: every method does what the method of :class:`tokenstore.AuthTokenStore` does.

    The logic is that of the async store, which runs in a thread of its own. The rules:

    - One daemon thread with an event loop serves all synchronous stores of a process. It starts at the first call, so a
      store may be opened when a module is imported, and before a fork: a forked process gets a thread, and a store,
      of its own at its first call. Any number of threads may call one store.
    - A call from a running event loop is an :class:`UnsupportedOperationError`, as it would block the event loop.
    - If a call is interrupted, by Ctrl-C, a timeout of gevent or a time limit of Celery, its caller stops to wait. A
      refresh goes on, and its tokens are stored.
    - A transaction that was interrupted is rolled back.
    - When the process ends, ``atexit`` closes the stores, which waits for refreshes in progress. A process that ends
      without ``atexit``, as the children of Celery do, has to call :meth:`close`:
      :func:`tokenstore.integrations.celery.install` sees to that.
    - Refreshers and callbacks that are plain functions run in a thread of their own; ``async def`` ones run in the
      event loop, where they may use :attr:`aio`.
    - After gevent's ``monkey.patch_all()`` the thread is still a real one, and other greenlets run while one waits.

    :func:`open_store` opens a store.

    Args:
        opener: Opens the async store. It is called now, and once more in each forked process that uses the store.
    """

    def __init__(self, opener: Callable[[], AsyncAuthTokenStore]) -> None:
        self._opener = opener
        # A forked process adds its own store. It keeps its parent's, and touches nothing of it.
        self._opened = {forks(): opener()}
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<tokenstore.sync store: {self.aio!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def aio(self) -> AsyncAuthTokenStore:
        """The async store of this process. Once a synchronous call was made, only the loop thread may use it."""
        process = forks()
        opened = self._opened.get(process)
        # If two threads are here at once, both get the same one. The other one was not used, and has nothing to close.
        return self._opened.setdefault(process, self._opener()) if opened is None else opened

    @clears_locals
    def close(self) -> None:
        """Wait for refreshes to end, then close what the store opened. Idempotent.

        See :meth:`tokenstore.AuthTokenStore.aclose`.
        """
        self._is_closed = True
        aio = self._opened.get(forks())
        if aio is not None and is_in_use(aio):
            thread = loop_thread()
            thread.call(aio.aclose)
            thread.stores.discard(aio)

    @clears_locals
    def setup(self) -> None:
        """Create the tables if they are missing: see :meth:`tokenstore.AuthTokenStore.setup`."""
        self._call(lambda aio: aio.setup())

    @clears_locals
    def migrate(self, *, dry_run: bool = False) -> MigrationResult:
        """Bring the tables to this version: see :meth:`tokenstore.AuthTokenStore.migrate`."""
        return self._call(lambda aio: aio.migrate(dry_run=dry_run))

    @clears_locals
    def run(self, work: Callable[[AsyncAuthTokenStore], Awaitable[T]]) -> T:
        """Run a coroutine of your own, with the async store, in the loop thread: ``store.run(lambda aio: find(aio))``.

        For several calls as one, and for integrations. It must not block the loop thread, which serves all stores.

        Args:
            work: Gets :attr:`aio`, and returns what is awaited.

        Raises:
            UnsupportedOperationError: An event loop is running in this thread.
            StoreClosedError: The store is closed.
        """
        return self._call(work)

    def transaction(self) -> AbstractContextManager[Transaction]:
        """One connection and one transaction: see :meth:`tokenstore.AuthTokenStore.transaction`."""
        return OpenTransaction(self._begin_transaction)

    @overload
    def load_fresh_tokens(
        self,
        provider: str,
        user_id: str,
        *,
        account: str = "",
        refresh: Refresh | None = None,
        force: bool = False,
        generation: int | None = None,
        force_min_age: float | None = None,
        min_ttl: float = 0.0,
        scopes: Collection[str] = (),
        missing: Literal["none"] = "none",
    ) -> TokenRecord | None: ...
    @overload
    def load_fresh_tokens(
        self,
        provider: str,
        user_id: str,
        *,
        account: str = "",
        refresh: Refresh | None = None,
        force: bool = False,
        generation: int | None = None,
        force_min_age: float | None = None,
        min_ttl: float = 0.0,
        scopes: Collection[str] = (),
        missing: Literal["raise"],
    ) -> TokenRecord: ...
    @clears_locals
    def load_fresh_tokens(
        self,
        provider: str,
        user_id: str,
        *,
        account: str = "",
        refresh: Refresh | None = None,
        force: bool = False,
        generation: int | None = None,
        force_min_age: float | None = None,
        min_ttl: float = 0.0,
        scopes: Collection[str] = (),
        missing: Literal["none", "raise"] = "none",
    ) -> TokenRecord | None:
        """Read tokens that are valid now, and refresh them first if they have expired.

        See :meth:`tokenstore.AuthTokenStore.load_fresh_tokens`.
        """
        return self._call(
            lambda aio: aio.load_fresh_tokens(
                provider,
                user_id,
                account=account,
                refresh=refresh,
                force=force,
                generation=generation,
                force_min_age=force_min_age,
                min_ttl=min_ttl,
                scopes=scopes,
                missing=missing,
            )
        )

    @clears_locals
    def refresh_due(
        self,
        *,
        within: float | timedelta,
        provider: str | None = None,
        refresh: Refresh | None = None,
        concurrency: int = 8,
        page_size: int = 500,
    ) -> Generator[RefreshResult, None, None]:
        """Refresh tokens that expire soon, and iterate over the results as the refreshes end.

        See :meth:`tokenstore.AuthTokenStore.refresh_due`.
        """
        return self._pages(
            lambda aio: aio.refresh_due(
                within=within, provider=provider, refresh=refresh, concurrency=concurrency, page_size=page_size
            ),
            1,
        )

    @clears_locals
    def revoke_tokens(
        self, provider: str, user_id: str, *, account: str = "", refresher: SupportsRevocation | None = None
    ) -> bool:
        """Revoke a user's tokens, then delete them: see :meth:`tokenstore.AuthTokenStore.revoke_tokens`."""
        return self._call(lambda aio: aio.revoke_tokens(provider, user_id, account=account, refresher=refresher))

    @overload
    def list_tokens(
        self,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        user_prefix: str | None = None,
        status: Status | None = None,
        expiring_within: float | timedelta | None = None,
        page_size: int = 500,
        with_metadata: Literal[False] = False,
    ) -> Iterator[TokenEntry]: ...
    @overload
    def list_tokens(
        self,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        user_prefix: str | None = None,
        status: Status | None = None,
        expiring_within: float | timedelta | None = None,
        page_size: int = 500,
        with_metadata: Literal[True],
    ) -> Iterator[TokenEntryWithMetadata]: ...
    @clears_locals
    def list_tokens(
        self,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        user_prefix: str | None = None,
        status: Status | None = None,
        expiring_within: float | timedelta | None = None,
        page_size: int = 500,
        with_metadata: bool = False,
    ) -> Iterator[TokenEntry]:
        """Iterate over rows, without tokens: see :meth:`tokenstore.AuthTokenStore.list_tokens`."""
        return self._pages(
            # For a type checker, the overloads take no `bool`.
            lambda aio: cast("Any", aio).list_tokens(
                provider=provider,
                user_id=user_id,
                user_prefix=user_prefix,
                status=status,
                expiring_within=expiring_within,
                page_size=page_size,
                with_metadata=with_metadata,
            ),
            page_size,
        )

    @clears_locals
    def clear_failure(self, provider: str, user_id: str, *, account: str = "") -> bool:
        """Clear the failure of a row's last refresh: see :meth:`tokenstore.AuthTokenStore.clear_failure`."""
        return self._call(lambda aio: aio.clear_failure(provider, user_id, account=account))

    @clears_locals
    def reseal_tokens(self, provider: str, user_id: str, *, account: str = "") -> bool:
        """Seal a row's values with the primary key: see :meth:`tokenstore.AuthTokenStore.reseal_tokens`."""
        return self._call(lambda aio: aio.reseal_tokens(provider, user_id, account=account))

    @property
    def _tokens(self) -> AsyncTokenOperations:
        return self.aio

    def _run(self, work: Callable[[AsyncTokenOperations], Awaitable[T]]) -> T:
        return self._call(work)

    def _call(self, work: Callable[[AsyncAuthTokenStore], Awaitable[T]]) -> T:
        thread, aio = self._begin()
        return thread.call(lambda: work(aio))

    def _begin(self) -> tuple[LoopThread, AsyncAuthTokenStore]:
        """The loop thread, and the store that it will close if nothing else does."""
        thread = loop_thread()
        if self._is_closed:
            raise StoreClosedError("this store is closed")
        aio = self.aio
        thread.serve(aio)
        return thread, aio

    def _begin_transaction(self) -> tuple[LoopThread, AbstractAsyncContextManager[AsyncTransaction]]:
        thread, aio = self._begin()
        return thread, aio.transaction()

    def _pages(
        self, begin: Callable[[AsyncAuthTokenStore], AsyncIterator[T]], page_size: int
    ) -> Generator[T, None, None]:
        thread, aio = self._begin()
        # An async generator, whatever its annotation says. It checks the page size.
        items = cast("AsyncGenerator[T, None]", begin(aio))
        size = max(page_size, 1) if isinstance(page_size, int) else 1
        try:
            while True:
                page, error = thread.call(partial(_next_items, items, size))
                yield from page
                if error is not None:
                    raise error
                if len(page) < size:
                    return
        except BaseException as error:
            clear_locals(error)
            raise
        finally:
            # Garbage collection may end the iteration, in any thread, also after a fork. So nothing waits here.
            with suppress(TokenStoreError):
                thread.submit(lambda: thread.start(items.aclose()))


async def _next_items(items: AsyncIterator[T], count: int) -> tuple[list[T], BaseException | None]:
    """The next items, fewer at the end, and the exception that ends the iteration behind them."""
    page: list[T] = []
    try:
        while len(page) < count:
            page.append(await anext(items))
    except StopAsyncIteration:
        return page, None
    except Exception as error:  # noqa: BLE001 - raised in the other thread
        return page, error
    return page, None


@clears_locals
def open_store(
    target: str | AsyncEngine | Backend,
    *,
    keyring: Keyring | None = None,
    namespace: str = "",
    clock: Clock = time.time,
    refreshers: Mapping[str, Refresh] | None = None,
    refresh_margin: float = 300.0,
    refresh_timeout: float = 20.0,
    provider_concurrency: int = 32,
    force_min_age: float = 10.0,
    on_refreshed: OnRefreshed | None = None,
    on_reauthorization_required: OnReauthorizationRequired | None = None,
    on_recovered: OnRefreshed | None = None,
    on_error: OnError | None = None,
    **options: Unpack[StoreOptions],
) -> AuthTokenStore:
    """Open a store without ``await``. Nothing is connected, and no thread started, before the first call.

    Args:
        target: As for :func:`tokenstore.open_store`, and so are all other arguments. Of a SQLAlchemy ``AsyncEngine``
            nothing else may use the connections. In a forked process ``memory://`` is empty.
        keyring: Default: :meth:`Keyring.from_env`, which is called now.
        namespace: Default: the empty name.
        clock: Default: :func:`time.time`.
        refreshers: Plain functions, each call of which runs in a thread of its own, or ``async def`` functions.
        refresh_margin: In seconds; default: 300.
        refresh_timeout: In seconds; default: 20.
        provider_concurrency: Default: 32.
        force_min_age: In seconds; default: 10.
        on_refreshed: Also runs in a thread of its own if it is a plain function, like the other callbacks.
        on_reauthorization_required: Default: no callback.
        on_recovered: Default: no callback.
        on_error: Default: no callback.
        options: See ``docs/options.md``.

    Returns:
        A store; ``atexit`` closes it, unless ``close()`` or ``with`` does.

    Raises:
        ConfigurationError: The URL, an option or the keys are not acceptable, or a driver is missing.
        InvalidInputError: The namespace or a refresh setting is not acceptable.
    """
    return AuthTokenStore(
        partial(
            open_async_store,
            target,
            keyring=Keyring.from_env() if keyring is None else keyring,
            namespace=namespace,
            clock=clock,
            refreshers=refreshers,
            refresh_margin=refresh_margin,
            refresh_timeout=refresh_timeout,
            provider_concurrency=provider_concurrency,
            force_min_age=force_min_age,
            on_refreshed=_off_the_loop(on_refreshed),
            on_reauthorization_required=_off_the_loop(on_reauthorization_required),
            on_recovered=_off_the_loop(on_recovered),
            on_error=_off_the_loop(on_error),
            **options,
        )
    )


def _off_the_loop(
    callback: Callable[[A], Awaitable[None] | None] | None,
) -> Callable[[A], Awaitable[None] | None] | None:
    """A callback that may block: it does not run in the event loop, unless it is an ``async def`` function."""
    if callback is None or is_coroutine_function(callback):
        return callback
    plain = callback

    async def call(argument: A) -> None:
        answer = await in_thread(plain, argument)
        if isawaitable(answer):
            await answer

    return call
