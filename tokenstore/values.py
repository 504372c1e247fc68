"""The values that a store keeps beside tokens: sealed JSON under a namespace and a name, with an expiry."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import timedelta
from functools import cached_property
from typing import Any, Final

from tokenstore.errors import TamperedError, UnsupportedOperationError
from tokenstore.listing import checked_rows
from tokenstore.options import positive_int
from tokenstore.protocol import Backend, SupportsValues
from tokenstore.records import from_epoch_us, optional_datetime
from tokenstore.sealing import Sealer
from tokenstore.tracebacks import clears_locals
from tokenstore.validation import (
    requested_value,
    scanned_value_problem,
    seconds,
    value_group,
    value_json,
    value_key,
    value_key_problem,
)
from tokenstore.value_records import ScannedValue, ValueEntry, ValueKey

__all__ = ["BATCH", "StoredValues", "ValueOperations"]

BATCH: Final = 1000


class ValueOperations(ABC):
    """The methods of a store for values."""

    _sealer: Sealer
    _backend: Backend

    @abstractmethod
    def _rows(self) -> Backend:
        """The backend. Raises StoreClosedError if the store is closed."""

    @clears_locals
    async def put_value(
        self,
        namespace: str,
        name: str,
        value: Any,
        *,
        ttl: float | timedelta | None = None,
        if_absent: bool = False,
    ) -> bool:
        """Insert or replace one value, atomically. It is encrypted first.

        The namespace and the name are stored in clear, and error messages show them.

        Args:
            namespace: What the value is for, such as ``"login"``: 1 to 255 UTF-8 bytes, no NUL. Compared byte for byte.
                It has nothing to do with the ``namespace`` of ``open_store``, which is the store's own.
            name: The value's name there: 1 to 512 UTF-8 bytes, no NUL. Compared byte for byte.
            value: Any JSON value: a dict with ``str`` keys, list, str, number, bool or None. At most 256 KiB as JSON,
                with at most 32 levels of objects and arrays. A tuple is stored as a list.
            ttl: After how many seconds, or after which timedelta, the value expires, by the database's clock; more than
                zero. Default: it does not expire.
            if_absent: Store only where there is no value, or one that has expired. Of many callers at once, in any
                processes, one stores its value.

        Returns:
            Whether the value was stored; False only with ``if_absent``.

        Raises:
            InvalidInputError: An argument is not acceptable; nothing was written.
            UnsupportedOperationError: The backend keeps no values.
            LockTimeoutError: Another transaction held the row's lock for too long; nothing was written.
            BackendError: The database refused or failed.
        """
        key, text = value_key(namespace, name), value_json(value)
        if ttl is not None:
            ttl = seconds("ttl", ttl.total_seconds() if isinstance(ttl, timedelta) else ttl, positive=True)
        values, sealed = self._values(), self._sealer.seal_value(key, text)
        if if_absent:
            return await values.insert_value(key, sealed, ttl=ttl)
        await values.put_value(key, sealed, ttl=ttl)
        return True

    @clears_locals
    async def get_value(self, namespace: str, name: str, default: Any = None) -> Any:
        """Read one value.

        Args:
            namespace: The value's namespace.
            name: The value's name.
            default: What to return if there is no such value, or if it has expired. A stored None is returned as None,
                so pass another default to tell the two apart.

        Raises:
            InvalidInputError: An argument is not acceptable.
            UnsupportedOperationError: The backend keeps no values.
            UnknownKeyError: The value was sealed with a key that is not in the keyring.
            TamperedError: The row was altered outside the store, was sealed in another namespace of a store, or is not
                the requested one.
            BackendError: The database refused or failed.
        """
        key = value_key(namespace, name)
        row = requested_value(key, await self._values().get_value(key))
        return default if row is None else _opened(key, self._sealer.open_value(key, row))

    @clears_locals
    async def pop_value(self, namespace: str, name: str, default: Any = None) -> Any:
        """Delete one value and return it. Of many callers at once, in any processes, exactly one gets it.

        For values that may be used once, such as the ``state`` of a login or a PKCE code verifier. If this raises a
        :class:`SealingError`, or a :class:`BackendUnavailableError` after the database has carried out the statement,
        the value is gone.

        Args:
            namespace: The value's namespace.
            name: The value's name.
            default: As for :meth:`get_value`.

        Raises:
            InvalidInputError: An argument is not acceptable.
            UnsupportedOperationError: The backend keeps no values.
            LockTimeoutError: Another transaction held the row's lock for too long.
            UnknownKeyError: The value was sealed with a key that is not in the keyring.
            TamperedError: As for :meth:`get_value`.
            BackendError: The database refused or failed.
        """
        key = value_key(namespace, name)
        row = requested_value(key, await self._values().pop_value(key))
        return default if row is None else _opened(key, self._sealer.open_value(key, row))

    @clears_locals
    async def delete_values(self, namespace: str) -> int:
        """Delete all values of a namespace, in one statement.

        Args:
            namespace: The values' namespace.

        Returns:
            How many there were, with those that had expired and were not purged yet.

        Raises:
            InvalidInputError: The namespace is not acceptable.
            UnsupportedOperationError: The backend keeps no values.
            BackendError: The database refused or failed.
        """
        group = value_group(namespace)
        return await self._values().delete_values(group)

    @clears_locals
    async def purge_values(self, *, batch_size: int = BATCH) -> int:
        """Delete the values of all namespaces that have expired. No other call does it: call this now and then.

        An expired value is never returned, but its row stays in the table until this call. Several processes may call
        this at once. With a store's own connections, or an engine's, each batch is committed by itself.

        Args:
            batch_size: About how many values one statement deletes.

        Returns:
            How many values were deleted.

        Raises:
            InvalidInputError: The batch size is not acceptable.
            UnsupportedOperationError: The backend keeps no values.
            BackendError: The database refused or failed; earlier batches stay deleted.
        """
        limit, total = positive_int("batch_size", batch_size), 0
        while True:
            deleted = await self._values().purge_values(limit=limit)
            total += deleted
            if deleted < limit:
                return total

    @clears_locals
    async def list_values(self, *, namespace: str | None = None, page_size: int = 500) -> AsyncIterator[ValueEntry]:
        """Iterate over all values that have not expired, or those of one namespace, without opening them.

        The order is that of namespace and name, each compared as UTF-8 bytes. As with
        :meth:`AuthTokenStore.list_tokens`, no connection or snapshot is held between two pages.

        Args:
            namespace: Only the values of this namespace.
            page_size: Rows in each query.

        Raises:
            InvalidInputError: An argument is not acceptable.
            UnsupportedOperationError: The backend keeps no values.
            TamperedError: Some rows have columns that no store has written: raised at the end, after all other rows. Or
                the database answered with a row that was not requested: raised at once.
            BackendError: The database refused or failed.
        """
        group = None if namespace is None else value_group(namespace)
        page_size = positive_int("page_size", page_size)

        async def scan(after: ValueKey | None, limit: int) -> list[ScannedValue]:
            return await self._values().scan_values(group=group, after=after, limit=limit)

        rows = checked_rows(
            scan,
            position=lambda row: row.key,
            position_problem=lambda row: value_key_problem(row.key),
            is_requested=lambda row: group in (None, row.key.group),
            row_problem=scanned_value_problem,
            page_size=page_size,
        )
        first_problem: str | None = None
        refused = 0
        async with aclosing(rows):
            async for row, problem in rows:
                if problem is not None:
                    first_problem = first_problem or problem
                    refused += 1
                    continue
                yield ValueEntry(
                    namespace=row.key.group,
                    name=row.key.name,
                    expires_at=optional_datetime(row.expires_at),
                    key_id=row.key_id,
                    created_at=from_epoch_us(row.created_at),
                    updated_at=from_epoch_us(row.updated_at),
                )
        if first_problem is not None:
            others = f" ({refused - 1} more values were altered)" if refused > 1 else ""
            raise TamperedError(first_problem + others)

    @clears_locals
    async def reseal_value(self, namespace: str, name: str) -> bool:
        """Seal a value with the keyring's primary key, if it is not sealed with it.

        The value, its expiry and its times do not change. This does not affect a newer write.

        Args:
            namespace: The value's namespace.
            name: The value's name.

        Returns:
            Whether the value was resealed. False: there is none, it has expired, it has the primary key, or a newer
            write came first.

        Raises:
            InvalidInputError: An argument is not acceptable.
            UnsupportedOperationError: The backend keeps no values.
            SealingError: The value does not open with the keyring.
            BackendError: The database refused or failed.
        """
        key = value_key(namespace, name)
        row = requested_value(key, await self._values().get_value(key))
        if row is None:
            return False
        text = self._sealer.open_value(key, row)
        if row.value.key_id == self._sealer.keyring.primary:
            return False
        return await self._values().rewrap_value(key, self._sealer.seal_value(key, text), version=row.version)

    def _values(self) -> SupportsValues:
        backend = self._rows()
        if self._keeps_values is None:
            raise UnsupportedOperationError(
                f"{backend!r} keeps no values: it has none of the methods of tokenstore.protocol.SupportsValues"
            )
        return self._keeps_values

    @cached_property
    def _keeps_values(self) -> SupportsValues | None:
        """The backend, if it keeps values. Cached: an isinstance check with a protocol takes as long as opening one."""
        return self._backend if isinstance(self._backend, SupportsValues) else None


class StoredValues(ValueOperations):
    """The values for a refresh, which may end while its store is being closed.

    Args:
        backend: The rows.
        sealer: The keys.
    """

    def __init__(self, backend: Backend, sealer: Sealer) -> None:
        self._backend = backend
        self._sealer = sealer

    def _rows(self) -> Backend:
        return self._backend


def _opened(key: ValueKey, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass  # the error is raised below: otherwise its context, json's error, would show the text
    raise TamperedError(f"the value of {key} is not JSON: another program sealed it")
