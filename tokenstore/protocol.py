"""What a storage backend must do: signatures and docstrings alone.

A backend sees sealed bytes; keys and plaintext stay in the core. Every method is one short operation that holds no
connection after it returns; only :meth:`SupportsRowLocks.transaction` spans several. Arguments have been checked by
:mod:`tokenstore.validation` before they arrive. Errors are those of :mod:`tokenstore.errors`; a driver's own never
escape.

:mod:`tokenstore.testing` has the conformance tests: a subclass of five lines runs them on any backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol, runtime_checkable

from tokenstore.records import Failure, ScannedRow, SealedRecord, SealedTokens, TokenKey

__all__ = [
    "Backend",
    "BackendFactory",
    "BackendTransaction",
    "BorrowedSession",
    "SupportsRowLocks",
    "SupportsWatching",
]


@runtime_checkable
class Backend(Protocol):
    """Storage with compare-and-set on each row's generation.

    A row's *generation* names one version of its tokens. It changes with every write of tokens and with nothing else,
    and no number comes back after the row was deleted (:func:`tokenstore.records.new_generation` starts a new row).

    A row's *lease* says who is refreshing it. It is granted, and expires, on the database's own clock, read after any
    wait for a lock. The holder's name must be unique to each claim.
    """

    async def setup(self) -> None:
        """Create what is missing, in an idempotent way; safe to run from many processes at once."""
        ...

    async def aclose(self) -> None:
        """Close what this backend opened, and nothing that it was given. Idempotent."""
        ...

    async def get(self, key: TokenKey) -> SealedRecord | None:
        """Read one row, whole (never a mixture of two writes), without waiting for a lock.

        Returns:
            The row, or None if there is none.
        """
        ...

    async def put(self, key: TokenKey, tokens: SealedTokens) -> None:
        """Insert or replace one row, atomically.

        A row that exists gets the next generation (plus one) and loses its lease and failure; its ``created_at`` stays.
        """
        ...

    async def delete(self, key: TokenKey) -> bool:
        """Delete a row with whatever lease it has. Returns whether there was one."""
        ...

    async def scan(
        self,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        after: TokenKey | None = None,
        limit: int,
    ) -> list[ScannedRow]:
        """Read one page of rows in ascending order of (provider, user_id), compared as UTF-8 bytes.

        Args:
            provider: Only this provider's rows.
            user_id: Only this user's rows.
            after: Only rows after this key; it need not exist.
            limit: The most rows to return; fewer mean that the end was reached.
        """
        ...

    async def claim_lease(self, key: TokenKey, *, generation: int, holder: str, duration: float) -> bool:
        """Take the lease of a row for ``duration`` seconds.

        Granted if and only if the row has this generation, no lease that is still live, and no failure that still
        holds. One statement; of many claims at once, one is granted.

        Returns:
            Whether it was granted.
        """
        ...

    async def complete_lease(self, key: TokenKey, tokens: SealedTokens, *, generation: int, holder: str) -> bool:
        """Write the tokens that a refresh of this generation brought, unless somebody else holds a live lease.

        Written if and only if the row still has this generation, and its lease is this holder's, has expired, or is
        gone. A holder that was frozen while another took over, and gave up, may have the only copy of a live pair: what
        it refreshed from is still what the row holds. The row gets the next generation and loses lease and failure.
        :func:`tokenstore.leases.completed` is this rule as code.

        Returns:
            Whether the tokens were written.
        """
        ...

    async def release_lease(
        self, key: TokenKey, *, generation: int, holder: str, failure: Failure | None = None
    ) -> bool:
        """End the lease without new tokens, if the row still has this generation and holder.

        Args:
            key: The row.
            generation: Its generation when the lease was claimed.
            holder: Who claimed it.
            failure: What to tell later callers of this generation, in place of what was there; None: nothing.

        Returns:
            Whether the lease was this holder's and has been ended.
        """
        ...

    async def rewrap(self, key: TokenKey, tokens: SealedTokens, *, generation: int) -> bool:
        """Replace the sealed values by the same plaintext sealed anew, if the row still has this generation.

        Changes the sealed fields and ``key_id`` alone: no generation, lease, failure or time.

        Returns:
            Whether the row was rewrapped.
        """
        ...


@runtime_checkable
class BackendTransaction(Protocol):
    """The rows as one open transaction sees and changes them, at the isolation level READ COMMITTED."""

    async def get(self, key: TokenKey) -> SealedRecord | None:
        """As :meth:`Backend.get`; sees this transaction's own writes."""
        ...

    async def lock(self, key: TokenKey) -> SealedRecord | None:
        """Take the row's lock, held until the transaction ends, and read the row as it then is.

        Waits for another holder, and then sees what that one stored. Without a row nothing need be locked.

        Raises:
            LockTimeoutError: The lock was not free within the backend's ``lock_timeout``.
        """
        ...

    async def put(self, key: TokenKey, tokens: SealedTokens) -> None:
        """As :meth:`Backend.put`."""
        ...

    async def delete(self, key: TokenKey) -> bool:
        """As :meth:`Backend.delete`."""
        ...

    async def rollback(self) -> None:
        """Undo everything so far and give up all locks (and, where there is a pool, the connection).

        The transaction goes on as if it had just begun. The core uses it where a locked row turns out to have a live
        lease, whose holder needs the row's lock in order to end it.
        """
        ...


class BorrowedSession(Backend, BackendTransaction, Protocol):
    """A backend in a session of the application's: every call takes part in the session's transaction."""


@runtime_checkable
class SupportsRowLocks(Protocol):
    """The ability behind ``for_update=True``. A backend without it is whole otherwise."""

    @property
    def lock_timeout(self) -> float:
        """The longest wait for a row's lock, in seconds."""
        ...

    def transaction(self) -> AbstractAsyncContextManager[BackendTransaction]:
        """One transaction: committed when the block ends, rolled back when it raises or is cancelled.

        Nothing is taken from a pool before the first call inside, and nothing is left open, locked or altered after
        the block, however it ends.
        """
        ...


@runtime_checkable
class SupportsWatching(Protocol):
    """A better way to wait for a change of a row than reading it at a fixed pace.

    A commit should be seen within 50 ms in a fleet of a few processes, and 100 processes that wait should cost the
    database less than 500 statements a second in all.
    """

    async def watch(self, key: TokenKey) -> None:
        """Return when it is worth reading the row again: it may have changed, or enough time has gone by.

        Called between reads while somebody else holds the row's lease. Returns within two seconds, whatever happens,
        and holds no connection while it waits. That the database cannot be watched is no reason to fail.
        """
        ...


class BackendFactory(Protocol):
    """What the registry, or an entry point of the group ``tokenstore.backends``, names: usually a backend's class."""

    def from_url(self, url: str, options: Mapping[str, object]) -> Backend:
        """Make a backend without connecting yet.

        Args:
            url: The whole URL as the user gave it, scheme and query included.
            options: Keyword options; :func:`tokenstore.options.read_options` merges them with the URL's query.

        Raises:
            ConfigurationError: The URL or an option is not acceptable, or a driver is missing.
        """
        ...
