"""What is measured, the contenders: tokenstore, floors (the driver alone), references and peers (other libraries)."""

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

__all__ = [
    "OURS",
    "Contender",
    "Kind",
    "MissingError",
    "Operations",
    "TableTarget",
    "Tokenstore",
    "contenders",
    "missing",
]

Kind = Literal["ours", "floor", "reference", "peer"]
OURS: Final = "tokenstore"


@dataclass(frozen=True)
class TableTarget:
    """A table that tokenstore and the floors share; the names of the peers' tables begin with its name."""

    database: Database
    table: str
    pool_size: int


@dataclass(frozen=True)
class Operations:
    """The operations of one caller; None: the contender does not have it."""

    load: Operation
    store: Operation | None = None
    lock: Operation | None = None


class MissingError(Exception):
    """A contender's package is not installed; the message says how to install it."""


def missing(package: str) -> MissingError:
    """Make the error for a package that is not installed."""
    return MissingError(f'pip install "{package}" (or tokenstore[bench])')


@dataclass
class Contender(ABC):
    """One way to store tokens in a database."""

    target: TableTarget
    name: ClassVar[str]
    """The contender's name in result files."""
    kind: ClassVar[Kind]
    most_callers: ClassVar[int] = 1 << 30
    """The contender is not measured with more callers than this."""

    label: ClassVar[str]
    """The contender's name in tables and plots; ``{driver}`` is replaced by the driver's name."""

    @property
    def title(self) -> str:
        """The label, with the driver's name."""
        return self.label.format(driver=self.target.database.driver)

    async def open(self) -> None:
        """Connect, or make a pool.

        Raises:
            MissingError: A package that the contender needs is not installed.
        """

    async def prepare(self, callers: int) -> None:
        """Prepare for that many concurrent callers."""

    async def fill(self, count: int) -> None:
        """Write the first ``count`` rows to the contender's own tables, if it has any."""

    @abstractmethod
    def operations(self, caller: int) -> Operations:
        """Return the operations of the caller with this number."""

    async def close(self) -> None:
        """Close all connections."""


class Tokenstore(Contender):
    """tokenstore, as ``open_store`` makes it."""

    name: ClassVar[str] = OURS
    label: ClassVar[str] = OURS
    kind: ClassVar[Kind] = "ours"

    async def open(self) -> None:
        """Open the store. Its table is created by :meth:`benchmarks.bench.Bench.setup`."""
        database = self.target.database
        if database.dialect:
            url = database.without("table", "pool_size")
            self.backend = backend_for_url(url, {"table": self.target.table, "pool_size": self.target.pool_size})
        else:
            self.backend = backend_for_url(database.url, {})
        self.store: AuthTokenStore = open_store(self.backend, keyring=KEYRING)

    def operations(self, caller: int) -> Operations:
        """Return the same operations for all callers: they share one store."""
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


def contenders(target: TableTarget, *, peers: bool) -> list[Contender]:
    """Make all contenders for this database, tokenstore first."""
    from benchmarks.floors import FLOORS
    from benchmarks.peers import PEERS, REFERENCES

    database = target.database
    found: list[Contender] = [Tokenstore(target)]
    found += [floor(target) for floor in FLOORS.get(database.driver, [])]
    if database.dialect:
        found += [reference(target) for reference in REFERENCES]
        found += [peer(target) for drivers, peer in PEERS if peers and (not drivers or database.driver in drivers)]
    return found
