"""The road of a call: local lock, connection, deadline, operation, commit, release, mapped errors, retry.

Every operation on rows takes this road, over a store's own connections, an application's engine, an open transaction
or a borrowed session. :class:`Calls` is the road. Its subclasses say where the connection comes from and what happens
to it afterwards: :class:`StoreCalls` here, others in :mod:`tokenstore_sql.transaction` and
:mod:`tokenstore_sql.session`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from typing import Final, TypeVar

from tokenstore.cancellation import finish
from tokenstore.errors import (
    BackendError,
    BackendUnavailableError,
    ConflictError,
    LockTimeoutError,
    StoreClosedError,
)
from tokenstore.locks import KeyedLocks
from tokenstore_sql.connections.source import Source
from tokenstore_sql.deadlines import Deadline
from tokenstore_sql.dialect import Dialect
from tokenstore_sql.errors import cause_of, mapped
from tokenstore_sql.options import STATEMENT_TIMEOUT
from tokenstore_sql.rows import Rows
from tokenstore_sql.statements.statements import Statements

__all__ = ["Calls", "Checkout", "LocalLock", "MigrationCalls", "Operation", "SetupCalls", "StoreCalls"]

T = TypeVar("T")
Operation = Callable[[Rows], Awaitable[T]]

_log: Final = logging.getLogger("tokenstore.sql.calls")

# A server should end a wait for a lock after lock_timeout; the client gives up this much later, in seconds.
_SERVER_GRACE: Final = 1.0
# How long the write of a cancelled caller may go on, in seconds: longer than a write takes that waits for no lock.
_WRITE_GRACE: Final = 0.1
# How often a statement on its own is sent, if concurrent transactions undo it.
_ATTEMPTS: Final = 10
# The local lock of a database that has no locks on rows.
_WHOLE_DATABASE: Final = None
_NO_LOCK: Final = nullcontext()


class Calls(ABC):
    """The road of a call.

    Args:
        statements: The table's statements.
        dialect: How the database locks and waits.
        statement_timeout: How long the database may take to answer a statement that waits for no lock, in seconds.
    """

    def __init__(self, statements: Statements, dialect: Dialect, statement_timeout: float = STATEMENT_TIMEOUT) -> None:
        self.statements = statements
        self.dialect = dialect
        self.statement_timeout = statement_timeout
        self.read_deadline = Deadline(statement_timeout)
        self._write_deadline = Deadline(dialect.lock_timeout + _SERVER_GRACE)

    async def once(
        self,
        keys: Sequence[Hashable],
        operation: Operation[T],
        *,
        write: bool,
        lock: AbstractAsyncContextManager[None] = _NO_LOCK,
    ) -> T:
        """Carry out an operation, without a retry.

        Args:
            keys: The rows that errors name, or a description of several rows; none: errors name the table. The keys of
                a batch may be added during the operation.
            operation: What to do on the connection.
            write: Whether it locks or writes rows.
            lock: Held in this process from before there is a connection until it is given back.

        Raises:
            BackendError: The database refused or failed.
        """

        async def call() -> T:
            async with lock, self._connected(keys, write=write) as rows:
                with self._limited(keys, write=write):
                    return await self._carried_out(rows, operation, write=write)

        return await mapped(self.dialect.errors, lambda: self.about(keys), call)

    @abstractmethod
    def _connected(self, keys: Sequence[Hashable], *, write: bool) -> AbstractAsyncContextManager[Rows]:
        """The rows on a connection, which is given back at the end."""

    async def _carried_out(self, rows: Rows, operation: Operation[T], *, write: bool) -> T:
        """Carry out the operation, and commit it if that is this road's part."""
        return await operation(rows)

    def _limited(self, keys: Sequence[Hashable], *, write: bool) -> AbstractContextManager[None]:
        """The last resort where a server or a network does not end a wait by itself."""
        deadline = self._write_deadline if write else self.read_deadline
        return deadline.limited(lambda: self._no_answer(keys, deadline.limit, write=write))

    def _no_answer(self, keys: Sequence[Hashable], limit: float, *, write: bool) -> BackendError:
        """The error of a statement that had no answer in time."""
        if write:
            return LockTimeoutError(
                f"{self.about(keys)}: the statement had no answer within {limit:g} s; a lock is held, or the server is "
                "stuck. Whether the statement was carried out is unknown"
            )
        return BackendUnavailableError(
            f"{self.about(keys)}: no answer of the database within {limit:g} s (statement_timeout)"
        )

    def about(self, keys: Sequence[Hashable]) -> str:
        """The subject of an error: one row, the description of several rows, or the table."""
        return str(keys[0]) if len(keys) == 1 else f"the table {self.statements.table.fullname}"


class StoreCalls(Calls):
    """Calls that stand on their own, over connections of a pool. They belong to one event loop.

    Args:
        source: Where connections come from.
        statements: The table's statements.
        dialect: How the database locks and waits.
        statement_timeout: See :class:`Calls`.
    """

    def __init__(
        self,
        source: Source,
        statements: Statements,
        dialect: Dialect,
        statement_timeout: float = STATEMENT_TIMEOUT,
    ) -> None:
        super().__init__(statements, dialect, statement_timeout)
        self.source = source
        self.closed = False
        self._locks = KeyedLocks()

    def check_open(self) -> None:
        """Raise StoreClosedError if the store is closed."""
        if self.closed:
            raise StoreClosedError("this store is closed")

    async def run(self, keys: Sequence[Hashable], operation: Operation[T], *, write: bool) -> T:
        """Carry out an operation, and send it again if that is safe and likely to help."""
        return await (self.write(keys, operation) if write else self.read(keys, operation))

    async def read(self, keys: Sequence[Hashable], operation: Operation[T], *, again: bool = True) -> T:
        """Read rows. If the connection turns out to be dead, the read is sent once more, over a new connection.

        Args:
            keys: The rows that errors are about.
            operation: The read.
            again: Whether the read may be sent twice.
        """
        connected = False

        async def read(rows: Rows) -> T:
            nonlocal connected
            connected = True
            return await operation(rows)

        try:
            return await self.once(keys, read, write=False)
        except (BackendUnavailableError, ConflictError) as error:
            # A caller that got no connection has waited for one already.
            if not connected or not again:
                raise
            _log.info("sending a read again over a new connection after %s", error.code or type(error).__name__)
        # One dead connection of a pool is no outage.
        self.source.discard_idle()
        return await self.once(keys, operation, write=False)

    async def write(self, keys: Sequence[Hashable], operation: Operation[T], *, locked: bool = False) -> T:
        """Write rows.

        The write is sent again if a dead-lock or a serialization failure undid it as a whole, and once more, over a new
        connection, if its connection was closed before the write was carried out.

        Args:
            keys: The rows that errors are about.
            operation: The write.
            locked: Whether the caller has the local lock, or the write needs none.
        """
        lock = _NO_LOCK if locked else self.local_lock(keys)
        may_be_closed = True
        undone = False

        async def write(rows: Rows) -> T:
            nonlocal undone
            try:
                return await operation(rows)
            except Exception as error:
                undone = self.dialect.errors.not_carried_out(cause_of(error))
                raise

        for attempt in range(1, _ATTEMPTS):
            try:
                return await self.once(keys, write, write=True, lock=lock)
            except BackendUnavailableError as error:
                if not undone or not may_be_closed:
                    raise
                _log.info("sending a write again over a new connection after %s", error.code)
                may_be_closed = undone = False
                self.source.discard_idle()
            except ConflictError as error:
                _log.debug("sending a write again, attempt %d, after %s", attempt + 1, error.code)
                await asyncio.sleep(random.uniform(0, 0.005 * attempt))
        return await self.once(keys, write, write=True, lock=lock)

    def _no_answer(self, keys: Sequence[Hashable], limit: float, *, write: bool) -> BackendError:
        # The server's machine may be gone. Then every idle connection is as dead as this one.
        _log.warning("a statement had no answer within %g s", limit)
        self.source.discard_idle()
        return super()._no_answer(keys, limit, write=write)

    def local_lock(self, keys: Sequence[Hashable]) -> LocalLock:
        """This process's lock for a write of one row, or of any rows if the database has no row locks."""
        name = keys[0] if self.dialect.locks_rows else _WHOLE_DATABASE
        return LocalLock(self._locks, name, self.dialect.lock_timeout, lambda: self.about(keys))

    def _connected(self, keys: Sequence[Hashable], *, write: bool) -> Checkout:
        return Checkout(self, transactional=False, write=write)

    async def _carried_out(self, rows: Rows, operation: Operation[T], *, write: bool) -> T:
        if not write:
            return await operation(rows)

        async def written() -> T:
            result = await operation(rows)
            # A statement on its own leaves nothing to commit.
            if rows.connection.in_transaction:
                await rows.connection.commit()
            return result

        # If the caller is cancelled, the statement usually runs to its end. If it were cut off, it could still be on
        # its way to the server, and be carried out after a later write of the same row.
        return await finish(written(), _WRITE_GRACE)


class SetupCalls(StoreCalls):
    """Creating and dropping the table: in a transaction, and without a deadline, as other processes may do the same."""

    def _connected(self, keys: Sequence[Hashable], *, write: bool) -> Checkout:
        return Checkout(self, transactional=True, write=write)

    def _limited(self, keys: Sequence[Hashable], *, write: bool) -> AbstractContextManager[None]:
        return nullcontext()


class MigrationCalls(SetupCalls):
    """Changing the tables: without a transaction, in which some changes are not possible."""

    def _connected(self, keys: Sequence[Hashable], *, write: bool) -> Checkout:
        return Checkout(self, transactional=False, write=write)


class LocalLock:
    """A lock of this process, taken before there is a connection: tasks that wait for a row do not use up the pool.

    Args:
        locks: The process's locks.
        name: Which of them.
        timeout: The longest wait, in seconds.
        about: Returns what an error is about.
    """

    def __init__(self, locks: KeyedLocks, name: Hashable, timeout: float, about: Callable[[], str]) -> None:
        self._locks = locks
        self._name = name
        self._timeout = timeout
        self._about = about

    async def __aenter__(self) -> None:
        try:
            await self._locks.acquire(self._name, self._timeout)
        except TimeoutError:
            pass
        else:
            return
        raise LockTimeoutError(
            f"{self._about()}: the lock was not free within {self._timeout:g} s: a task of this process holds it"
        )

    async def __aexit__(self, *exc_info: object) -> None:
        self._locks.release(self._name)


class Checkout:
    """A connection, for the time of one call or one transaction.

    Args:
        calls: The calls whose source lends the connection.
        transactional: Whether the connection is for a transaction that takes locks.
        write: Whether the call locks or writes rows.
    """

    def __init__(self, calls: StoreCalls, *, transactional: bool, write: bool) -> None:
        self._calls = calls
        self._transactional = transactional
        self._write = write

    async def __aenter__(self) -> Rows:
        calls, transactional = self._calls, self._transactional
        self._connection = await calls.source.acquire(transactional=transactional, write=self._write)
        return Rows(self._connection, calls.statements, calls.dialect, transactional=transactional)

    async def __aexit__(self, *exc_info: object) -> None:
        await self._calls.source.release(self._connection)
