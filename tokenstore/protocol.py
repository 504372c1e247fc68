"""What a storage backend must do: signatures and docstrings only.

A backend receives sealed bytes; keys and plaintext stay in the core. Each method is one short operation, and holds no
connection after it has returned; only :meth:`SupportsRowLocks.transaction` spans several operations. The core checks
all arguments with :mod:`tokenstore.validation` before it passes them on. A backend raises errors of
:mod:`tokenstore.errors` and no exceptions of its driver. Durations in seconds are rounded to whole microseconds.

The protocols are structural: a backend has one if it has its methods, and need not inherit from it.

:mod:`tokenstore.testing.conformance` has the conformance tests: a subclass of five lines runs them on any backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol, runtime_checkable

from tokenstore.health import RowFilter, SearchPage
from tokenstore.records import (
    DueKey,
    DueRow,
    Failure,
    MigrationResult,
    ScannedRow,
    SealedMetadata,
    SealedRecord,
    SealedTokens,
    TokenKey,
)
from tokenstore.value_records import ScannedValue, SealedValue, ValueKey, ValueRow

__all__ = [
    "Backend",
    "BackendFactory",
    "BackendTransaction",
    "BorrowedSession",
    "RowOperations",
    "SupportsClock",
    "SupportsMigrations",
    "SupportsRowLocks",
    "SupportsValues",
    "SupportsWatching",
]


@runtime_checkable
class Backend(Protocol):
    """Storage with compare-and-set on each row's generation.

    A row's *generation* is the number of one version of its tokens. It changes with every write of tokens and with no
    other statement, and no number comes back after the row was deleted: :func:`tokenstore.records.new_generation` gives
    a new row its first one.

    An *empty* row has no tokens yet: :func:`tokenstore.records.empty_tokens`. :meth:`get`, the leases and
    :meth:`delete` treat it like any other row. For :meth:`insert` it counts as missing. Of the lists, only
    :meth:`scan_due` has it.

    A row's *lease* is a claim on the row by one refresh, the lease holder. It is granted and expires by the database's
    clock, which a statement reads after it has waited for locks. No two claims have the same holder's name.

    A row's *failure* is the shared outcome of its last refresh. It is *in force*, and forbids another refresh, until
    its retry time. Without a retry time it is in force until new tokens are written, and the row is *dead*.
    """

    async def setup(self) -> None:
        """Create what is missing. Idempotent, also when many processes call it at once."""
        ...

    async def aclose(self) -> None:
        """Close what this backend opened, but nothing that was passed to it. Idempotent."""
        ...

    async def get(self, key: TokenKey) -> SealedRecord | None:
        """Read one complete row, never a mixture of two writes, without waiting for a lock.

        Returns:
            The row, or None if there is none.
        """
        ...

    async def put(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> None:
        """Insert or replace one row, atomically.

        A row that exists gets the next generation (plus one) and loses its lease and failure; its ``created_at`` stays.
        The row is due (:meth:`scan_due`) when its tokens say so.

        Args:
            key: The row.
            tokens: Its tokens.
            metadata: Replaces the row's metadata, too. None: it stays as it is; a new row has none.
        """
        ...

    async def insert(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> bool:
        """Insert a row if there is none, atomically: of several inserts at the same time, one succeeds.

        Tokens replace those of an empty row, which gets the next generation and loses its lease and failure; its
        ``created_at`` stays. The tokens of an empty row replace nothing.

        Args:
            key: The row.
            tokens: Its tokens.
            metadata: Its metadata. None: it has none afterwards, also if it replaces an empty row that had some.

        Returns:
            Whether the tokens were written. Otherwise nothing has changed.
        """
        ...

    async def delete(self, key: TokenKey) -> bool:
        """Delete a row, with its lease if it has one. Returns whether there was a row."""
        ...

    async def clock(self) -> int:
        """Read the database's clock: microseconds since the epoch, as in :attr:`SealedRecord.as_of`."""
        ...

    async def scan(
        self,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        after: TokenKey | None = None,
        limit: int,
        with_metadata: bool = False,
    ) -> list[ScannedRow]:
        """Read one page of rows in ascending order of (provider, user_id, account), compared as UTF-8 bytes.

        Empty rows are left out. With a provider or a user id, the cost should grow with the rows of the page.

        Args:
            provider: Only this provider's rows.
            user_id: Only this user's rows.
            after: Only rows after this key; it need not exist.
            limit: The most rows to return. Fewer rows mean that there are no more.
            with_metadata: Whether to read the sealed metadata, too: :attr:`ScannedRow.metadata`.
        """
        ...

    async def search(
        self,
        where: RowFilter,
        *,
        provider: str | None = None,
        user_id: str | None = None,
        after: TokenKey | None = None,
        limit: int,
        with_metadata: bool = False,
    ) -> SearchPage:
        """Read rows in the order of :meth:`scan`, and return those that a filter finds.

        Args:
            where: The filter. :meth:`tokenstore.health.RowFilter.matches` is its meaning as code.
            provider: Only this provider's rows.
            user_id: Only this user's rows.
            after: Only rows after this key; it need not exist.
            limit: About how many rows to read, whether they are found or not, so that no query takes long. Empty rows
                may count.
            with_metadata: As for :meth:`scan`.
        """
        ...

    async def scan_due(
        self, *, provider: str, within: float, as_of: int | None = None, after: DueKey | None = None, limit: int
    ) -> list[DueRow]:
        """Read one page of a provider's rows that are due, in ascending order of (due_at, user_id, account).

        A row's ``due_at`` is that of the tokens that were written last; see
        :attr:`tokenstore.records.SealedTokens.due_at`. A row without one is in no page. Neither is a dead row, until
        new tokens are written or its failure is cleared. An empty row is due when it may be deleted, and its
        ``is_empty`` is true. User ids and accounts are compared as UTF-8 bytes. The cost should grow with the rows of
        the page, and not with those of the table.

        Args:
            provider: Whose rows.
            within: Only rows that are due at most this many seconds after ``as_of``.
            as_of: Microseconds since the epoch. None, for the first page: the database's clock, read once, which is the
                :attr:`tokenstore.records.DueRow.as_of` of all its rows. Later pages pass that time, so that a sweep has
                one end; their rows still have the time of the read.
            after: Only rows after this position; no row need be there.
            limit: The most rows to return. Fewer rows mean that there are no more.
        """
        ...

    async def claim_lease(self, key: TokenKey, *, generation: int, holder: str, duration: float) -> bool:
        """Claim the lease of a row for ``duration`` seconds.

        Granted if and only if the row has this generation, no lease that has not expired, and no failure in force. This
        is one statement: of several claims at the same time, one is granted.

        Returns:
            Whether it was granted.
        """
        ...

    async def complete_lease(
        self,
        key: TokenKey,
        tokens: SealedTokens,
        *,
        generation: int,
        holder: str,
        metadata: SealedMetadata | None = None,
    ) -> bool:
        """Write the tokens that a refresh of this generation got, unless another holder has a live lease.

        Written if and only if the row still has this generation, and its lease is this holder's, has expired, or has
        ended. An expired lease is no reason to refuse: if no later refresh has succeeded, these tokens may be the only
        copy of what the provider issued last. The row gets the next generation, and loses its lease and failure.
        :func:`tokenstore.leases.completed` is this rule as code.

        Args:
            key: The row.
            tokens: The new tokens.
            generation: The generation that was refreshed.
            holder: The name under which the lease was claimed.
            metadata: Replaces the row's metadata, too. None, as from every refresh: it stays as it is.

        Returns:
            Whether the tokens were written.
        """
        ...

    async def release_lease(
        self, key: TokenKey, *, generation: int, holder: str, failure: Failure | None = None
    ) -> bool:
        """End the lease without new tokens, if the row still has this generation and holder.

        With a failure without a retry time, the row is dead: it loses its ``due_at``.

        Args:
            key: The row.
            generation: Its generation when the lease was claimed.
            holder: The name under which it was claimed.
            failure: The failure that later callers of this generation get, in place of an earlier one; None: no
                failure.

        Returns:
            Whether the lease was this holder's, and has ended.
        """
        ...

    async def clear_failure(self, key: TokenKey, *, min_age: float = 0.0, as_of: int | None = None) -> bool:
        """Clear a row's failure, so that a refresh may be tried at once.

        Changes no generation, lease or token. A dead row gets back the ``due_at`` that its columns tell: the expiry of
        its access token, if it has a refresh token; otherwise none. So an empty row, or one whose tokens were issued
        without a refresh token, would not be due again; the core stores no failure without a retry time in these.

        Args:
            key: The row.
            min_age: Only if the refresh failed at least so many seconds before ``as_of``.
            as_of: A time of the database's clock, in microseconds since the epoch. None: now.

        Returns:
            Whether a failure was cleared.
        """
        ...

    async def rewrap(self, key: TokenKey, tokens: SealedTokens, *, generation: int) -> bool:
        """Replace the sealed values with the same plaintext under another key, if the row still has this generation.

        Changes only the sealed fields and ``key_id``: no generation, lease, failure or time. A dead row stays dead.

        Returns:
            Whether the row was rewrapped.
        """
        ...

    async def set_metadata(self, key: TokenKey, metadata: SealedMetadata, *, replacing: bytes | None) -> bool:
        """Replace a row's metadata, if its sealed value is still ``replacing``, byte for byte. None: there is none.

        Changes only the metadata: no sealed token, generation, lease, failure or time. It is one statement, and does
        not wait for a lease.

        Returns:
            Whether there was such a row, and its metadata was replaced.
        """
        ...


class RowOperations(Protocol):
    """What a backend and a transaction have in common: the operations on one row that need no lock."""

    async def get(self, key: TokenKey) -> SealedRecord | None:
        """As :meth:`Backend.get`; includes a transaction's own writes."""
        ...

    async def put(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> None:
        """As :meth:`Backend.put`."""
        ...

    async def insert(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> bool:
        """As :meth:`Backend.insert`. Waits for another transaction that has written the row and is not committed."""
        ...

    async def delete(self, key: TokenKey) -> bool:
        """As :meth:`Backend.delete`."""
        ...

    async def clock(self) -> int:
        """As :meth:`Backend.clock`."""
        ...

    async def set_metadata(self, key: TokenKey, metadata: SealedMetadata, *, replacing: bytes | None) -> bool:
        """As :meth:`Backend.set_metadata`."""
        ...


@runtime_checkable
class BackendTransaction(RowOperations, Protocol):
    """The rows in one open transaction, at the isolation level READ COMMITTED.

    A read sees what other transactions have committed before it, and the transaction's own writes. A write locks its
    row, also a row that it inserts, until the transaction ends. After a :class:`tokenstore.errors.BackendError` the
    core only ends the transaction, with an exception.
    """

    async def lock(self, key: TokenKey) -> SealedRecord | None:
        """Take the row's lock until the transaction ends, then read the row.

        Waits for another transaction that has the lock, and then reads what that transaction stored. If there is no
        row, nothing has to be locked, but it may be.

        Raises:
            LockTimeoutError: The lock was not free within the backend's ``lock_timeout``.
        """
        ...

    async def rollback(self) -> None:
        """Undo all writes, and give up all locks and the connection.

        Afterwards the transaction continues as if it had just begun. The core calls this if a row that it has locked
        has a live lease, because the lease holder needs the row's lock to end the lease.
        """
        ...


class BorrowedSession(Backend, BackendTransaction, Protocol):
    """A backend in a session of the application's: every call takes part in the session's transaction."""

    async def get_latest(self, key: TokenKey) -> SealedRecord | None:
        """Read a row as it is now, although the session's transaction may read from a snapshot.

        In a transaction this takes the row's lock, where one can be held, and waits for no lease.
        """
        ...


@runtime_checkable
class SupportsClock(Protocol):
    """Rows in this process, which can be told the time, for tests. A database has a clock of its own."""

    def use_clock(self, clock: Callable[[], float]) -> None:
        """Take the argument ``clock`` of :func:`tokenstore.open_store`, in seconds since the epoch, as the clock.

        Called before any other method, and only for a backend that the store made from a URL.
        """
        ...


@runtime_checkable
class SupportsMigrations(Protocol):
    """Tables that change from one version of the backend to the next."""

    async def migrate(self, *, dry_run: bool) -> MigrationResult:
        """Bring the tables to the newest version, while programs of the version before use them.

        Idempotent, also when many processes call it at once. What was done before an error stays.

        Args:
            dry_run: Whether to change nothing, and only to tell what there is to do.
        """
        ...


@runtime_checkable
class SupportsRowLocks(Protocol):
    """Row locks, for ``for_update=True``. A backend without them supports everything else."""

    @property
    def lock_timeout(self) -> float:
        """The longest wait for a row's lock, in seconds, of a transaction and of a write outside one."""
        ...

    def transaction(self) -> AbstractAsyncContextManager[BackendTransaction]:
        """One transaction: committed when the block ends, rolled back when it raises or is cancelled.

        No connection is taken from a pool before the first call inside the block. After the block nothing is left open
        or locked, and after an exception nothing has changed.
        """
        ...


@runtime_checkable
class SupportsWatching(Protocol):
    """A better way to wait for a change of a row than reading it at fixed intervals.

    In a fleet of a few processes a commit should be noticed within 50 ms. 100 waiting processes should send fewer than
    500 statements a second in all.
    """

    async def watch(self, key: TokenKey) -> None:
        """Return when the row may have changed, or when enough time has passed for another read.

        Called between two reads while another refresh holds the row's lease. It returns within two seconds in any case,
        and holds no connection while it waits. It raises no error if the database cannot be watched.
        """
        ...


@runtime_checkable
class SupportsValues(Protocol):
    """Sealed values beside the tokens, each under a group and a name. A backend without them supports everything else.

    A value expires by the database's clock, which the statement itself reads, after it has waited for locks: it has
    expired when ``expires_at`` is not after that time. An expired value counts as missing in every method but
    :meth:`delete_values` and :meth:`purge_values`. :meth:`Backend.setup` creates what is needed.
    """

    async def put_value(self, key: ValueKey, value: SealedValue, *, ttl: float | None) -> None:
        """Insert or replace one value, atomically. It gets a new version, which no earlier write of the key had.

        The ``created_at`` of a value that is replaced stays; that of one that had expired does not.

        Args:
            key: The value's key.
            value: The sealed value.
            ttl: Seconds from now after which it expires; None: never.
        """
        ...

    async def insert_value(self, key: ValueKey, value: SealedValue, *, ttl: float | None) -> bool:
        """Insert one value if there is none: of several callers at the same time, in any processes, one inserts it.

        It replaces an expired value. The arguments are those of :meth:`put_value`.

        Returns:
            Whether the value was inserted.
        """
        ...

    async def get_value(self, key: ValueKey) -> ValueRow | None:
        """Read one complete value, without waiting for a lock. None: there is none, or it has expired."""
        ...

    async def pop_value(self, key: ValueKey) -> ValueRow | None:
        """Delete one value and return it: of several callers at the same time, in any processes, one gets it."""
        ...

    async def delete_values(self, group: str) -> int:
        """Delete all values of a group, expired ones too. Returns how many there were."""
        ...

    async def purge_values(self, *, limit: int) -> int:
        """Delete expired values, those first that expired first, by an index.

        Args:
            limit: About how many to delete; those that expire in the same microsecond are deleted together.

        Returns:
            How many were deleted. Fewer than ``limit`` mean that there are no more.
        """
        ...

    async def scan_values(
        self, *, group: str | None = None, after: ValueKey | None = None, limit: int
    ) -> list[ScannedValue]:
        """Read one page of values in ascending order of (group, name), compared as UTF-8 bytes.

        Args:
            group: Only this group's values.
            after: Only values after this key; it need not exist.
            limit: The most values to return. Fewer values mean that there are no more.
        """
        ...

    async def rewrap_value(self, key: ValueKey, value: SealedValue, *, version: int) -> bool:
        """Replace a sealed value with the same plaintext under another key, if the row still has this version.

        Changes no version, expiry or time.

        Returns:
            Whether the value was rewrapped.
        """
        ...


class BackendFactory(Protocol):
    """The target of an entry point of the group ``tokenstore.backends``: usually a backend's class."""

    def from_url(self, url: str, options: Mapping[str, object]) -> Backend:
        """Make a backend without connecting yet.

        Args:
            url: The complete URL as the user passed it, with its scheme and query.
            options: Keyword options; :func:`tokenstore.options.read_options` merges them with the URL's query.

        Raises:
            ConfigurationError: The URL or an option is not acceptable, or a driver is missing.
        """
        ...
