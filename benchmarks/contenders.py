"""What is measured: ours, floors below it, peers beside it, and references."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from benchmarks.databases import Database
from benchmarks.measure import Operation
from benchmarks.tokens import ACCESS, EXPIRES, KEYRING, REFRESH
from tokenstore import open_store
from tokenstore.registry import backend_for_url

if TYPE_CHECKING:
    from tokenstore.store import AuthTokenStore

__all__ = ["OURS", "Arena", "Contender", "Kind", "MissingError", "Operations", "Tokenstore", "contenders", "missing"]

Kind = Literal["ours", "floor", "reference", "peer"]
OURS: Final = "tokenstore"


@dataclass(frozen=True)
class Arena:
    """One database, and the table in it that ours and the floors share; the peers' have names that begin like it."""

    database: Database
    table: str
    pool_size: int


@dataclass(frozen=True)
class Operations:
    """What one caller can do; None where the contender cannot."""

    load: Operation
    store: Operation | None = None
    lock: Operation | None = None


class MissingError(Exception):
    """A contender's package is not installed; the message says which, and what to do."""


def missing(package: str) -> MissingError:
    """The error for a package that is not there."""
    return MissingError(f'pip install "{package}" (or tokenstore[bench])')


@dataclass
class Contender(ABC):
    """One way to keep tokens in a database."""

    arena: Arena
    name: ClassVar[str]
    """In files and on the command line."""
    kind: ClassVar[Kind]
    most_callers: ClassVar[int] = 1 << 30
    """How many callers make sense."""

    label: ClassVar[str]
    """In tables and plots; ``{driver}`` stands for the driver's name."""

    @property
    def title(self) -> str:
        """The label, with the driver's name."""
        return self.label.format(driver=self.arena.database.driver)

    async def open(self) -> None:
        """Make what is needed to call; MissingError where that is not installed."""

    async def prepare(self, callers: int) -> None:
        """Be ready for that many callers at once."""

    async def fill(self, count: int) -> None:
        """Put the first rows into tables of its own, if it has any."""

    @abstractmethod
    def operations(self, caller: int) -> Operations:
        """What this caller calls."""

    async def close(self) -> None:
        """Close every connection."""


class Tokenstore(Contender):
    """Ours, as ``open_store`` makes it."""

    name: ClassVar[str] = OURS
    label: ClassVar[str] = OURS
    kind: ClassVar[Kind] = "ours"

    async def open(self) -> None:
        """Open the store; its table is made by ``setup``."""
        database = self.arena.database
        if database.dialect:
            url = database.without("table", "pool_size")
            self.backend = backend_for_url(url, {"table": self.arena.table, "pool_size": self.arena.pool_size})
        else:
            self.backend = backend_for_url(database.url, {})
        self.store: AuthTokenStore = open_store(self.backend, keyring=KEYRING)

    def operations(self, caller: int) -> Operations:
        """The same for everybody: one store."""
        store = self.store

        async def put(provider: str, user_id: str) -> None:
            await store.store_tokens(provider, user_id, ACCESS, REFRESH, EXPIRES)

        async def lock(provider: str, user_id: str) -> None:
            async with store.transaction() as transaction:
                record = await transaction.load_tokens(provider, user_id, for_update=True)
                assert record is not None
                await transaction.store_tokens(provider, user_id, ACCESS, REFRESH, EXPIRES)

        return Operations(store.load_tokens, put, lock)

    async def close(self) -> None:
        """Close the store."""
        await self.store.aclose()


def contenders(arena: Arena, *, peers: bool) -> list[Contender]:
    """Everybody who can be measured on this database, ours first."""
    from benchmarks.floors import FLOORS
    from benchmarks.peers import PEERS, REFERENCES

    database = arena.database
    found: list[Contender] = [Tokenstore(arena)]
    found += [floor(arena) for floor in FLOORS.get(database.driver, [])]
    if database.dialect:
        found += [reference(arena) for reference in REFERENCES]
        found += [peer(arena) for drivers, peer in PEERS if peers and (not drivers or database.driver in drivers)]
    return found
