"""Where a store's connections come from."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod

from tokenstore_sql.connections.connection import Connection
from tokenstore_sql.connections.driver import DriverConnection

__all__ = ["Source"]


class Source(ABC):
    """A pool of the store's own, or an application's engine."""

    @abstractmethod
    async def acquire(self, *, transactional: bool, write: bool) -> Connection:
        """Get a connection.

        Args:
            transactional: Whether it is for a transaction that takes locks, which has then begun; else each statement
                stands on its own.
            write: Whether it is for a write, which must not be sent over a connection that may be dead.

        Raises:
            sqlalchemy.exc.TimeoutError: No connection became free in time.
        """

    @abstractmethod
    async def release(self, connection: Connection) -> None:
        """Give a connection back. What was not committed is rolled back."""

    def discard_idle(self) -> None:
        """Close all idle connections. If one of them was dead, the server has probably been restarted."""

    def take(self) -> DriverConnection | None:
        """An idle connection that seems alive, without waiting; None if there is none."""
        return None

    def put_back(self, connection: DriverConnection) -> asyncio.Task[None] | None:
        """Give back what :meth:`take` returned, if no transaction was begun.

        Returns:
            The task that closes the connection, if it is lost.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close the connections that belong to the store."""

    @abstractmethod
    def forget(self) -> None:
        """Drop all connections without using them: they belong to another process, or their event loop is gone."""

    @property
    @abstractmethod
    def open(self) -> int:
        """How many connections there are."""

    @property
    @abstractmethod
    def in_use(self) -> int:
        """How many of them are not idle."""
