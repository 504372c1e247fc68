"""Where connections come from: a pool of the store's own, or somebody's engine."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from time import monotonic
from typing import Any, Final, TypeVar, cast

from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tokenstore.cancellation import finish
from tokenstore.errors import StoreClosedError
from tokenstore_sql.connection import AlchemyConnection, Connection, ConnectionLostError, DriverConnection
from tokenstore_sql.dialect import Dialect

__all__ = ["EngineSource", "Pool", "Source"]

T = TypeVar("T")

# After so much idleness a write asks first whether the server is still there, in seconds: what has just been used is
# alive, and one that the server closed is known to be closed.
_TRUSTED: Final = 1.0
# In seconds: too short for looking whether a connection is still there to be worth its while.
_JUST_NOW: Final = 0.005
# The drivers have timeouts of their own; these are the last resort.
_OPEN_TIMEOUT: Final = 30.0
# BEGIN, ROLLBACK and a ping wait for nobody.
_PING_TIMEOUT: Final = 5.0
_CLOSE_TIMEOUT: Final = 5.0


class Source(ABC):
    """Where a backend's connections come from."""

    @abstractmethod
    async def acquire(self, *, transactional: bool, write: bool) -> Connection:
        """A connection: for statements on their own, or for a transaction that takes locks, which has begun.

        Raises:
            sqlalchemy.exc.TimeoutError: None became free in time.
        """

    @abstractmethod
    async def release(self, connection: Connection) -> None:
        """Give it back, without what was not committed."""

    def discard_idle(self) -> None:
        """Close those that nobody uses: where one is dead, the server has most likely gone away and come back."""

    def take(self) -> DriverConnection | None:
        """A connection that nobody uses and that seems alive, at once; None where there is none."""
        return None

    def put_back(self, connection: DriverConnection) -> asyncio.Task[None] | None:
        """Give back what :meth:`take` gave, where no transaction was begun. Returns the closing of one that is lost."""

    @abstractmethod
    async def aclose(self) -> None:
        """Close what belongs to the store."""

    @abstractmethod
    def forget(self) -> None:
        """Drop all connections without touching them: they are another process's, or their event loop is gone."""

    @property
    @abstractmethod
    def open(self) -> int:
        """How many connections there are."""

    @property
    @abstractmethod
    def in_use(self) -> int:
        """How many of them are not in the pool just now."""


class Pool(Source):
    """Driver connections, the most recently used first, so that what is no longer needed goes idle.

    Args:
        connect: Opens one.
        size: The most connections.
        timeout: The longest wait for one, in seconds.
        recycle: The age at which one is replaced, in seconds.
    """

    def __init__(
        self, connect: Callable[[], Awaitable[DriverConnection]], *, size: int, timeout: float, recycle: float
    ) -> None:
        self._connect = connect
        self._size = size
        self._timeout = timeout
        self._recycle = recycle
        self._closed = False
        self.forget()

    def forget(self) -> None:
        for connection in getattr(self, "_all", ()):
            connection.forget()
        self._all: set[DriverConnection] = set()
        self._idle: list[DriverConnection] = []
        # Those who wait get a connection, or None: the right to open one.
        self._waiting: deque[asyncio.Future[DriverConnection | None]] = deque()
        self._opening = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def open(self) -> int:
        return len(self._all)

    @property
    def in_use(self) -> int:
        return len(self._all) - len(self._idle)

    async def acquire(self, *, transactional: bool, write: bool) -> DriverConnection:
        while True:
            if (connection := self.take() or await self._wait()) is None:
                is_new, connection = True, await self._opened()
            else:
                is_new = False
            asks = connection.begin if transactional else connection.ping
            if not transactional and not (write and monotonic() - connection.used_at > _TRUSTED):
                return connection
            try:
                async with asyncio.timeout(_PING_TIMEOUT):
                    await asks()
            except Exception as error:
                await self.release(connection)
                # Nothing has happened yet: one that was dead is no reason to fail.
                if is_new or not isinstance(error, ConnectionLostError | OSError):
                    raise
            except BaseException:
                await self.release(connection)
                raise
            else:
                return connection

    async def release(self, connection: Connection) -> None:
        connection = cast(DriverConnection, connection)
        try:
            if connection.in_transaction and not connection.lost and not connection.is_foreign:
                # If this fails, the connection is lost, and the server rolls back.
                with suppress(Exception):
                    async with asyncio.timeout(_PING_TIMEOUT):
                        await finish(connection.rollback())
        finally:
            closing = self.put_back(connection)
            if closing is not None:
                # What it was doing should have come to its end, one way or the other, before anybody is told of it.
                await finish(_done(closing))

    def put_back(self, connection: DriverConnection) -> asyncio.Task[None] | None:
        # A fork, or another event loop, may have made it somebody else's.
        if connection not in self._all or connection.is_foreign:
            return None
        now = monotonic()
        if connection.lost or connection.in_transaction or self._closed or now - connection.opened_at >= self._recycle:
            return self._discard(connection)
        connection.used_at = now
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return None
        self._idle.append(connection)
        return None

    def discard_idle(self) -> None:
        for connection in self._idle[:]:
            _ = self._discard(connection)

    async def aclose(self) -> None:
        self._closed = True
        self.discard_idle()
        while self._waiting:
            if not (waiter := self._waiting.popleft()).done():
                waiter.set_exception(_closed())
        while self._tasks:
            await asyncio.wait(self._tasks)

    def take(self) -> DriverConnection | None:
        while self._idle:
            connection = self._idle.pop()
            now = monotonic()
            # Whoever was used a moment ago is asked no more than the driver knows.
            alive = not connection.lost if now - connection.used_at < _JUST_NOW else connection.is_alive()
            if alive and now - connection.opened_at < self._recycle:
                return connection
            _ = self._discard(connection)
        return None

    async def _wait(self) -> DriverConnection | None:
        """Wait in line for a connection; None is the right to open one, which counts as open from here on."""
        if self._closed:
            raise _closed()
        if len(self._all) + self._opening < self._size:
            self._opening += 1
            return None
        waiter: asyncio.Future[DriverConnection | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(self._timeout):
                return await waiter
        except GeneratorExit:  # the event loop is gone, and this pool has forgotten it
            raise
        except BaseException as error:
            # What came in the same moment goes to the next in line.
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                if (connection := waiter.result()) is None:
                    self._opening -= 1
                    self._let_open()
                else:
                    _ = self.put_back(connection)
            waiter.cancel()
            if not isinstance(error, TimeoutError):
                raise
        raise PoolTimeoutError

    async def _opened(self) -> DriverConnection:
        """Open a connection; if the caller is cancelled meanwhile, it is there for the next one."""
        opening = self._in_background(self._open())
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(self._keep)
            raise

    def _keep(self, opening: asyncio.Task[DriverConnection]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            _ = self.put_back(opening.result())

    async def _open(self) -> DriverConnection:
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT):
                connection = await self._connect()
        except GeneratorExit:  # the event loop is gone, and this pool has forgotten it
            raise
        except BaseException:
            self._opening -= 1
            self._let_open()
            raise
        self._opening -= 1
        self._all.add(connection)
        return connection

    def _let_open(self) -> None:
        """Where one connection fewer is open, the next in line may open one."""
        while self._waiting and not self._closed and len(self._all) + self._opening < self._size:
            waiter = self._waiting.popleft()
            if not waiter.done():
                self._opening += 1
                waiter.set_result(None)

    def _discard(self, connection: DriverConnection) -> asyncio.Task[None]:
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        closing = self._in_background(_close(connection))
        self._let_open()
        return closing

    def _in_background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _closed() -> StoreClosedError:
    return StoreClosedError("this store is closed")


async def _done(task: asyncio.Task[None]) -> None:
    _ = await asyncio.wait([task])


async def _close(connection: DriverConnection) -> None:
    with suppress(Exception):
        async with asyncio.timeout(_CLOSE_TIMEOUT):
            await connection.close()


class EngineSource(Source):
    """Somebody's engine, with a pool of its owner's choice.

    Args:
        engine: The engine.
        dialect: The database's ways.
    """

    def __init__(self, engine: AsyncEngine, dialect: Dialect) -> None:
        self._engine = engine
        self._dialect = dialect
        self._pool: Any = engine.sync_engine.pool

    @property
    def open(self) -> int:
        return int(self._pool.checkedin()) + self.in_use if hasattr(self._pool, "checkedin") else 1

    @property
    def in_use(self) -> int:
        return int(self._pool.checkedout()) if hasattr(self._pool, "checkedout") else 0

    async def acquire(self, *, transactional: bool, write: bool) -> Connection:
        alchemy = self._engine.connect()
        # A lone statement needs no transaction, so it gets none: one round trip, and nothing to leave open.
        level = self._dialect.isolation_level if transactional else "AUTOCOMMIT"

        async def prepare() -> Connection:
            _ = await alchemy.start()
            _ = await alchemy.execution_options(isolation_level=level)
            return await AlchemyConnection.of(alchemy, self._dialect, pooled=True)

        try:
            # One that is cancelled half-way would never return to the pool.
            return await finish(prepare())
        except BaseException:
            await self._close(alchemy)
            raise

    async def release(self, connection: Connection) -> None:
        await self._close(cast(AlchemyConnection, connection).alchemy)

    async def _close(self, alchemy: AsyncConnection) -> None:
        if alchemy.sync_connection is not None:
            await finish(alchemy.close())

    async def aclose(self) -> None:
        """Nothing: the engine is its owner's."""

    def forget(self) -> None:
        """Nothing: the engine is its owner's."""
