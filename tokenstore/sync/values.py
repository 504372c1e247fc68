"""The methods of a synchronous store for values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from tokenstore.store import AuthTokenStore as AsyncAuthTokenStore
from tokenstore.tracebacks import clears_locals
from tokenstore.value_records import ValueEntry
from tokenstore.values import BATCH

__all__ = ["ValueOperations"]

T = TypeVar("T")


class ValueOperations(ABC):
    """The methods of a synchronous store for values."""

    @abstractmethod
    def _call(self, work: Callable[[AsyncAuthTokenStore], Awaitable[T]]) -> T:
        """Run a call of the async store in the loop thread, and wait for its result."""

    @abstractmethod
    def _pages(self, begin: Callable[[AsyncAuthTokenStore], AsyncIterator[T]], page_size: int) -> Iterator[T]:
        """Iterate over what an async iterator yields, so many items a call."""

    @clears_locals
    def put_value(
        self,
        namespace: str,
        name: str,
        value: Any,
        *,
        ttl: float | timedelta | None = None,
        if_absent: bool = False,
    ) -> bool:
        """Insert or replace one value: see :meth:`tokenstore.AuthTokenStore.put_value`."""
        return self._call(lambda values: values.put_value(namespace, name, value, ttl=ttl, if_absent=if_absent))

    @clears_locals
    def get_value(self, namespace: str, name: str, default: Any = None) -> Any:
        """Read one value: see :meth:`tokenstore.AuthTokenStore.get_value`."""
        return self._call(lambda values: values.get_value(namespace, name, default))

    @clears_locals
    def pop_value(self, namespace: str, name: str, default: Any = None) -> Any:
        """Delete one value and return it: see :meth:`tokenstore.AuthTokenStore.pop_value`."""
        return self._call(lambda values: values.pop_value(namespace, name, default))

    @clears_locals
    def delete_values(self, namespace: str) -> int:
        """Delete all values of a namespace: see :meth:`tokenstore.AuthTokenStore.delete_values`."""
        return self._call(lambda values: values.delete_values(namespace))

    @clears_locals
    def purge_values(self, *, batch_size: int = BATCH) -> int:
        """Delete the values that have expired: see :meth:`tokenstore.AuthTokenStore.purge_values`."""
        return self._call(lambda values: values.purge_values(batch_size=batch_size))

    @clears_locals
    def list_values(self, *, namespace: str | None = None, page_size: int = 500) -> Iterator[ValueEntry]:
        """Iterate over values without opening them: see :meth:`tokenstore.AuthTokenStore.list_values`."""
        return self._pages(lambda values: values.list_values(namespace=namespace, page_size=page_size), page_size)

    @clears_locals
    def reseal_value(self, namespace: str, name: str) -> bool:
        """Seal a value with the primary key: see :meth:`tokenstore.AuthTokenStore.reseal_value`."""
        return self._call(lambda values: values.reseal_value(namespace, name))
