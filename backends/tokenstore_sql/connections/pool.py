"""The pool of a store with connections of its own."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from time import monotonic
from typing import Any, Final, TypeVar, cast

from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from tokenstore.cancellation import finish
from tokenstore.errors import StoreClosedError
from tokenstore_sql.connections.connection import Connection
from tokenstore_sql.connections.driver import DriverConnection
from tokenstore_sql.connections.source import Source
from tokenstore_sql.errors import ConnectionLostError, NoFreeSlotError

__all__ = ["Pool"]

T = TypeVar("T")

_log: Final = logging.getLogger("tokenstore.sql.pool")

# A write pings a connection that was idle for longer than this, in seconds. One that was used a moment ago is alive,
# or is known to be closed.
_TRUSTED: Final = 1.0
# How often to try to connect to a server that has no free slot, in seconds.
_SLOT_RETRY: Final = 0.5
# The drivers have timeouts of their own; these are the last resort.
_OPEN_TIMEOUT: Final = 30.0
# BEGIN, ROLLBACK and a ping wait for no lock.
_PING_TIMEOUT: Final = 5.0
_CLOSE_TIMEOUT: Final = 5.0


class Pool(Source):
    """Driver connections. The most recently used is taken first, so that those that are not needed stay idle.

    Args:
        connect: Opens a connection.
        size: The largest number of connections.
        timeout: The longest wait for a connection, in seconds.
        recycle: The age at which a connection is replaced, in seconds.
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
        # Each waiting caller gets a connection, or None: the right to open one.
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
            connection, is_new = await self._idle_or_new()
            asks = connection.begin if transactional else connection.ping
            if not transactional and not (write and monotonic() - connection.used_at > _TRUSTED):
                return connection
            try:
                async with asyncio.timeout(_PING_TIMEOUT):
                    await asks()
            except TimeoutError:
                # The server's machine may be gone. Then every idle connection is as dead as this one, and would take
                # its time to close. No statement of the caller's is under way, so it need not wait for that.
                _log.warning("a ping had no answer within %g s", _PING_TIMEOUT)
                _ = self.put_back(connection)
                self.discard_idle()
                if is_new:
                    raise
            except Exception as error:
                await self.release(connection)
                # No statement of the caller's was sent yet, so a dead connection can be replaced by another.
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
                # The caller is told of the error when the statement has ended in the server, one way or the other.
                await finish(_done(closing))

    def put_back(self, connection: DriverConnection) -> asyncio.Task[None] | None:
        # After a fork, or in another event loop, the pool has forgotten the connection.
        if connection not in self._all or connection.is_foreign:
            return None
        now = monotonic()
        if self._closed:
            return self._discard(connection)
        if connection.lost or connection.in_transaction:
            _log.info("discarding a lost connection")
            return self._discard(connection)
        if now - connection.opened_at >= self._recycle:
            return self._discard_old(connection)
        connection.used_at = now
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return None
        self._idle.append(connection)
        return None

    def discard_idle(self) -> None:
        if self._idle and not self._closed:
            _log.info("discarding %d idle connections", len(self._idle))
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
            if not connection.is_alive(now - connection.used_at):
                _log.info("discarding an idle connection that has been closed")
                _ = self._discard(connection)
            elif now - connection.opened_at >= self._recycle:
                _ = self._discard_old(connection)
            else:
                return connection
        return None

    async def _idle_or_new(self) -> tuple[DriverConnection, bool]:
        """An idle connection, or a new one; and whether it is new."""
        deadline = monotonic() + self._timeout
        while True:
            if (connection := self.take() or await self._wait()) is not None:
                return connection, False
            try:
                return await self._opened(), True
            except NoFreeSlotError:
                if (left := deadline - monotonic()) <= 0:
                    raise
                _log.info("the server has no free slot for a connection; waiting for one")
            # Either another caller gives back one of the pool's connections, or another client's slot becomes free.
            with suppress(PoolTimeoutError):
                if (connection := await self._in_line(min(left, _SLOT_RETRY))) is not None:
                    return connection, False
                self._opening -= 1  # the right to open one, which the next round takes again

    async def _wait(self) -> DriverConnection | None:
        """Wait for a connection. None is the right to open one, which counts as open from here on."""
        if self._closed:
            raise _closed()
        if len(self._all) + self._opening < self._size:
            self._opening += 1
            return None
        return await self._in_line(self._timeout)

    async def _in_line(self, timeout: float) -> DriverConnection | None:
        """Wait until another caller gives back a connection, or passes on the right to open one.

        Raises:
            sqlalchemy.exc.TimeoutError: Neither happened within ``timeout`` seconds.
        """
        waiter: asyncio.Future[DriverConnection | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(timeout):
                return await waiter
        except GeneratorExit:  # the event loop is gone, and this pool has forgotten it
            raise
        except BaseException as error:
            # The caller may have been given a connection just as it was cancelled: pass it on.
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
        """Open a connection. If the caller is cancelled meanwhile, the next caller gets the connection."""
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
        _log.debug("opened connection %d of %d", len(self._all), self._size)
        return connection

    def _let_open(self) -> None:
        """Let waiting callers open connections, as long as fewer than the limit are open."""
        while self._waiting and not self._closed and len(self._all) + self._opening < self._size:
            waiter = self._waiting.popleft()
            if not waiter.done():
                self._opening += 1
                waiter.set_result(None)

    def _discard_old(self, connection: DriverConnection) -> asyncio.Task[None]:
        _log.debug("replacing a connection that is older than pool_recycle, %g s", self._recycle)
        return self._discard(connection)

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
