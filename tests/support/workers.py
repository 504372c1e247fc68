"""Worker processes for tests, with stores that stay open between jobs. A job is a coroutine function."""

from __future__ import annotations

from multiprocessing.connection import Connection

from support.broken_backends import Fault
from support.generated_programs import Store, stores_over
from tokenstore.registry import backend_for_url
from tokenstore.testing.conformance import _workers
from tokenstore.testing.conformance._workers import Worker

__all__ = ["Link", "Team", "Worker"]


class Link(_workers.Link):
    """A worker's connection to the test, with the stores that stay open between jobs."""

    def __init__(self, commands: Connection, answers: Connection) -> None:
        super().__init__(commands, answers)
        self.opened: object = None
        self.stores: list[Store] = []

    async def open(self, url: str, fault: Fault | None = None, **options: object) -> list[Store]:
        """Return stores for a URL; they are opened anew unless the last job used the same arguments."""
        if (wanted := (url, fault, options)) != self.opened:
            await self.close()
            backend = backend_for_url(url, options) if fault is None else fault.backend(url)
            self.opened, self.stores = wanted, stores_over([backend])
        return self.stores

    async def close(self) -> None:
        for store in self.stores:
            await store.tokens.aclose()
        self.opened, self.stores = None, []


class Team(_workers.Team):
    """Workers, which start at first use and are reused by later tests."""

    def __init__(self) -> None:
        super().__init__(Link)
