"""Floors: the drivers alone, with the same SQL on the same table, without sealing and without building a record.

No store can be faster than its driver doing the same work. A floor shows how much slower the store is.
"""

from __future__ import annotations

import asyncio
import sqlite3
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Final

from benchmarks.contenders import Contender, Kind, Operations, TableTarget
from benchmarks.databases import Database
from benchmarks.measure import Operation
from benchmarks.sql import SQL
from benchmarks.tokens import EXTENT, Place, SealedRow, key, sealed_row, sealed_rows

__all__ = ["FLOORS", "Asyncpg", "Floor", "Link", "connect", "fill", "floor_of"]

_CHUNK: Final = 5000
Row = Sequence[Any]


class Link:
    """One connection of a driver, with the operations that floors need.

    Args:
        connection: The driver's connection; None: only the statements are needed.
        sql: The statements.
    """

    def __init__(self, connection: Any, sql: SQL) -> None:
        self.connection = connection
        self.sql = sql

    @classmethod
    @abstractmethod
    async def connect(cls, database: Database) -> Any:
        """Connect in autocommit mode."""

    @classmethod
    def pool(cls, database: Database, size: int) -> Any:
        """Return an awaitable that makes the driver's own pool, with all its connections open."""
        raise NotImplementedError

    def key(self, provider: str, user_id: str) -> tuple[Any, ...]:
        """Convert a row's key to what the driver accepts."""
        return (provider, user_id, "")

    def part(self, text: str) -> Any:
        """Convert one part of a key to what the driver accepts."""
        return text

    def row(self, row: SealedRow) -> tuple[Any, ...]:
        """Convert a row to what the driver accepts."""
        return tuple(row)

    @abstractmethod
    async def fetch(self, statement: str, parameters: Sequence[Any]) -> Sequence[Row]:
        """Execute a statement and return all rows."""

    @abstractmethod
    async def load(self, key: Sequence[Any]) -> Row | None:
        """Read a row."""

    @abstractmethod
    async def store(self, values: Sequence[Any]) -> None:
        """Upsert a row."""

    @abstractmethod
    async def lock(self, key: Sequence[Any], values: Sequence[Any]) -> None:
        """In one transaction, lock and read a row, then upsert it."""

    @abstractmethod
    async def fill(self, rows: Iterable[SealedRow]) -> None:
        """Write many rows as fast as the driver can."""

    async def close(self) -> None:
        """Close the connection."""
        await self.connection.close()


class Asyncpg(Link):
    """asyncpg prepares and caches statements by itself."""

    @classmethod
    async def connect(cls, database: Database) -> Any:
        import asyncpg

        return await asyncpg.connect(**database.arguments())

    @classmethod
    def pool(cls, database: Database, size: int, **options: Any) -> Any:
        import asyncpg

        return asyncpg.create_pool(**database.arguments(), min_size=size, max_size=size, **options)

    async def fetch(self, statement: str, parameters: Sequence[Any]) -> Sequence[Row]:
        return list(await self.connection.fetch(statement, *parameters))

    async def load(self, key: Sequence[Any]) -> Row | None:
        row: Row | None = await self.connection.fetchrow(self.sql.load, *key)
        return row

    async def store(self, values: Sequence[Any]) -> None:
        await self.connection.execute(self.sql.upsert, *values)

    async def lock(self, key: Sequence[Any], values: Sequence[Any]) -> None:
        async with self.connection.transaction():
            await self.connection.fetchrow(self.sql.lock, *key)
            await self.connection.execute(self.sql.upsert, *values)

    async def fill(self, rows: Iterable[SealedRow]) -> None:
        schema, _, table = self.sql.table.rpartition(".")
        for chunk in _chunks(rows):
            await self.connection.copy_records_to_table(
                table, records=chunk, columns=SealedRow._fields, schema_name=schema or None
            )
        await self.connection.execute(f"VACUUM ANALYZE {self.sql.table}")


class _Psycopg(Link):
    @classmethod
    async def connect(cls, database: Database) -> Any:
        import psycopg

        return await psycopg.AsyncConnection.connect(**database.arguments(), autocommit=True)

    async def fetch(self, statement: str, parameters: Sequence[Any]) -> Sequence[Row]:
        cursor = await self.connection.execute(statement, parameters)
        return list(await cursor.fetchall())

    async def load(self, key: Sequence[Any]) -> Row | None:
        cursor = await self.connection.execute(self.sql.load, key)
        row: Row | None = await cursor.fetchone()
        return row

    async def store(self, values: Sequence[Any]) -> None:
        await self.connection.execute(self.sql.upsert, values)

    async def lock(self, key: Sequence[Any], values: Sequence[Any]) -> None:
        async with self.connection.transaction():
            await (await self.connection.execute(self.sql.lock, key)).fetchone()
            await self.connection.execute(self.sql.upsert, values)

    async def fill(self, rows: Iterable[SealedRow]) -> None:
        columns = ", ".join(SealedRow._fields)
        async with self.connection.cursor() as cursor:
            async with cursor.copy(f"COPY {self.sql.table} ({columns}) FROM STDIN") as copy:
                for row in rows:
                    await copy.write_row(row)
            await cursor.execute(f"VACUUM ANALYZE {self.sql.table}")


class _PyMySQL(Link):
    """The code that aiomysql and asyncmy have in common."""

    def key(self, provider: str, user_id: str) -> tuple[Any, ...]:
        return (provider.encode(), user_id.encode(), b"")  # the columns are binary

    def part(self, text: str) -> Any:
        return text.encode()

    def row(self, row: SealedRow) -> tuple[Any, ...]:
        return tuple(value.encode() if isinstance(value, str) else value for value in row)

    async def fetch(self, statement: str, parameters: Sequence[Any]) -> Sequence[Row]:
        async with self.connection.cursor() as cursor:
            await cursor.execute(statement, parameters)
            return list(await cursor.fetchall())

    async def load(self, key: Sequence[Any]) -> Row | None:
        async with self.connection.cursor() as cursor:
            await cursor.execute(self.sql.load, key)
            row: Row | None = await cursor.fetchone()
            return row

    async def store(self, values: Sequence[Any]) -> None:
        async with self.connection.cursor() as cursor:
            await cursor.execute(self.sql.upsert, values)

    async def lock(self, key: Sequence[Any], values: Sequence[Any]) -> None:
        await self.connection.begin()
        try:
            async with self.connection.cursor() as cursor:
                await cursor.execute(self.sql.lock, key)
                await cursor.fetchone()
                await cursor.execute(self.sql.upsert, values)
        except BaseException:
            await self.connection.rollback()
            raise
        await self.connection.commit()

    async def fill(self, rows: Iterable[SealedRow]) -> None:
        statement = self.sql.fill
        await self.connection.begin()
        async with self.connection.cursor() as cursor:
            for chunk in _chunks(map(self.row, rows)):
                await cursor.executemany(statement, chunk)
        await self.connection.commit()
        await self.fetch(f"ANALYZE TABLE {self.sql.table}", ())

    async def close(self) -> None:
        await self.connection.ensure_closed()


class _Aiomysql(_PyMySQL):
    @classmethod
    async def connect(cls, database: Database) -> Any:
        import aiomysql

        return await aiomysql.connect(**database.arguments(), charset="utf8mb4", autocommit=True)

    @classmethod
    def pool(cls, database: Database, size: int) -> Any:
        import aiomysql

        arguments = database.arguments()
        return aiomysql.create_pool(minsize=size, maxsize=size, **arguments, charset="utf8mb4", autocommit=True)


class _Asyncmy(_PyMySQL):
    @classmethod
    async def connect(cls, database: Database) -> Any:
        import asyncmy

        return await asyncmy.connect(**database.arguments(), charset="utf8mb4", autocommit=True)

    @classmethod
    def pool(cls, database: Database, size: int) -> Any:
        import asyncmy

        arguments = database.arguments()
        return asyncmy.create_pool(minsize=size, maxsize=size, **arguments, charset="utf8mb4", autocommit=True)


class _Aiosqlite(Link):
    """Each operation awaits three calls in the connection's thread."""

    @classmethod
    async def connect(cls, database: Database) -> Any:
        import aiosqlite

        connection = await aiosqlite.connect(database.path(), timeout=30, isolation_level=None)
        for pragma in _PRAGMAS:
            await (await connection.execute(pragma)).close()
        return connection

    async def fetch(self, statement: str, parameters: Sequence[Any]) -> Sequence[Row]:
        cursor = await self.connection.execute(statement, parameters)
        rows = list(await cursor.fetchall())
        await cursor.close()
        return rows

    async def load(self, key: Sequence[Any]) -> Row | None:
        cursor = await self.connection.execute(self.sql.load, key)
        row: Row | None = await cursor.fetchone()
        await cursor.close()
        return row

    async def store(self, values: Sequence[Any]) -> None:
        await (await self.connection.execute(self.sql.upsert, values)).close()

    async def lock(self, key: Sequence[Any], values: Sequence[Any]) -> None:
        for statement, parameters in (
            ("BEGIN IMMEDIATE", ()),
            (self.sql.lock, key),
            (self.sql.upsert, values),
            ("COMMIT", ()),
        ):
            cursor = await self.connection.execute(statement, parameters)
            await cursor.fetchone()
            await cursor.close()

    async def fill(self, rows: Iterable[SealedRow]) -> None:
        statement = self.sql.fill
        for chunk in _chunks(rows):
            await self.connection.execute("BEGIN IMMEDIATE")
            await self.connection.executemany(statement, chunk)
            await self.connection.execute("COMMIT")


_PRAGMAS: Final = ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL")
_LINKS: Final[dict[str, type[Link]]] = {
    "asyncpg": Asyncpg,
    "psycopg": _Psycopg,
    "aiomysql": _Aiomysql,
    "asyncmy": _Asyncmy,
    "aiosqlite": _Aiosqlite,
}


def _chunks(rows: Iterable[Any]) -> Iterator[list[Any]]:
    rows = iter(rows)
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk


def _sql(target: TableTarget) -> SQL:
    return SQL(target.database.dialect, target.database.driver, target.table)


async def connect(target: TableTarget) -> Link:
    """Open one connection of the driver."""
    link = _LINKS[target.database.driver]
    return link(await link.connect(target.database), _sql(target))


async def fill(target: TableTarget, count: int) -> None:
    """Write the first rows of the shared table."""
    link = await connect(target)
    try:
        await link.fill(sealed_rows(count))
    finally:
        await link.close()


@dataclass
class Floor(Contender):
    """A floor. It prepares the sealed values that it writes, so that tokenstore can still open the rows."""

    kind: ClassVar[Kind] = "floor"

    def __post_init__(self) -> None:
        link = self.link = _LINKS[self.target.database.driver]
        # This object has no connection; it only converts values and makes statements.
        self.statements = link(None, _sql(self.target))
        self._ready: dict[Place, tuple[Any, ...]] = {}
        self._any = sealed_row(key(0))

    async def fill(self, count: int) -> None:
        """Seal the values to write; the shared table is filled already."""
        places = map(key, range(min(count, EXTENT)))
        self._ready = {place: self._values(sealed_row(place)) for place in places}

    def _values(self, row: SealedRow) -> tuple[Any, ...]:
        return self.statements.row(row)[:10]

    def values(self, provider: str, user_id: str) -> tuple[Any, ...]:
        """Return the parameters of the upsert."""
        ready = self._ready.get((provider, user_id))
        # A new row gets another row's sealed values: it is never opened.
        return ready or self._values(self._any._replace(provider=provider, user_id=user_id))

    def on(self, link: Link) -> Operations:
        """Return operations that use this connection."""
        key, values = link.key, self.values

        async def load(provider: str, user_id: str) -> object:
            return await link.load(key(provider, user_id))

        async def store(provider: str, user_id: str) -> None:
            await link.store(values(provider, user_id))

        async def lock(provider: str, user_id: str) -> None:
            await link.lock(key(provider, user_id), values(provider, user_id))

        return Operations(load, store, lock)


class Held(Floor):
    """A connection for each caller."""

    name: ClassVar[str] = "held"
    most_callers: ClassVar[int] = 32
    label: ClassVar[str] = "{driver}, held connection"

    async def open(self) -> None:
        """Open no connection yet; :meth:`prepare` opens one for each caller."""
        self._links: list[Link] = []

    async def prepare(self, callers: int) -> None:
        """Open a connection for each caller that has none."""
        while len(self._links) < callers:
            self._links.append(await connect(self.target))

    def operations(self, caller: int) -> Operations:
        """Return operations on this caller's connection."""
        return self.on(self._links[caller])

    async def close(self) -> None:
        """Close all connections."""
        for link in self._links:
            await link.close()


class HeldFour(Held):
    """A connection that reads four columns of a row: the difference to :class:`Held` is what the others cost."""

    name: ClassVar[str] = "held-four"
    most_callers: ClassVar[int] = 1
    label: ClassVar[str] = "{driver}, held connection, 4 columns"

    def on(self, link: Link) -> Operations:
        """Return a load alone."""
        key, statement = link.key, link.sql.load_four

        async def load(provider: str, user_id: str) -> object:
            rows = await link.fetch(statement, key(provider, user_id))
            return rows[0] if rows else None

        return Operations(load)


class Pool(Floor):
    """The driver's own pool, with its default options."""

    name: ClassVar[str] = "pool"
    label: ClassVar[str] = "{driver}, its pool"

    async def open(self) -> None:
        """Make the pool."""
        self._pool = await self.make_pool()

    def make_pool(self) -> Any:
        """Return an awaitable that makes the driver's pool."""
        return self.link.pool(self.target.database, self.target.pool_size)

    def operations(self, caller: int) -> Operations:
        """Return operations that take a connection from the pool."""
        pool, link, sql, key, values = self._pool, self.link, self.statements.sql, self.statements.key, self.values

        async def load(provider: str, user_id: str) -> object:
            async with pool.acquire() as connection:
                return await link(connection, sql).load(key(provider, user_id))

        async def store(provider: str, user_id: str) -> None:
            async with pool.acquire() as connection:
                await link(connection, sql).store(values(provider, user_id))

        async def lock(provider: str, user_id: str) -> None:
            async with pool.acquire() as connection:
                await link(connection, sql).lock(key(provider, user_id), values(provider, user_id))

        return Operations(load, store, lock)

    async def close(self) -> None:
        """Close the pool."""
        closing = self._pool.close()  # a coroutine with asyncpg; the other drivers have wait_closed
        if closing is not None:
            await closing
        else:
            await self._pool.wait_closed()


class PoolWithoutReset(Pool):
    """asyncpg's pool without the reset statement that it sends whenever a connection is returned."""

    name: ClassVar[str] = "pool-no-reset"
    label: ClassVar[str] = "{driver}, its pool without reset"

    def make_pool(self) -> Any:
        """Make a pool whose connections are not reset."""
        import asyncpg

        class Connection(asyncpg.Connection):  # type: ignore[misc]
            async def reset(self, *, timeout: float | None = None) -> None:
                pass

        target = self.target
        return Asyncpg.pool(target.database, target.pool_size, connection_class=Connection)


class Aiosqlite(Floor):
    """One aiosqlite connection, shared by all callers; each operation awaits three calls."""

    name: ClassVar[str] = "aiosqlite"
    label: ClassVar[str] = "aiosqlite, three awaits"

    async def open(self) -> None:
        """Open the connection."""
        self._connection = await connect(self.target)
        # A connection can have only one transaction at a time.
        self._transaction_lock = asyncio.Lock()

    def operations(self, caller: int) -> Operations:
        """Return operations on the shared connection."""
        shared = self.on(self._connection)
        assert shared.lock is not None
        lock_alone = shared.lock

        async def lock(provider: str, user_id: str) -> None:
            async with self._transaction_lock:
                await lock_alone(provider, user_id)

        return Operations(shared.load, shared.store, lock)

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()


class CallingThread(Floor):
    """sqlite3 in the event loop's thread, which blocks the event loop."""

    name: ClassVar[str] = "calling-thread"
    label: ClassVar[str] = "sqlite3, calling thread"
    most_callers: ClassVar[int] = 1

    async def open(self) -> None:
        """Open the connection."""
        self._connection = self._connect()

    def _connect(self) -> sqlite3.Connection:
        path = self.target.database.path()
        connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        for pragma in _PRAGMAS:
            connection.execute(pragma).close()
        return connection

    def _load(self, provider: str, user_id: str) -> object:
        return self._connection.execute(self.statements.sql.load, (provider, user_id, "")).fetchone()

    def _store(self, provider: str, user_id: str) -> None:
        self._connection.execute(self.statements.sql.upsert, self.values(provider, user_id))

    def _lock(self, provider: str, user_id: str) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        self._load(provider, user_id)
        self._store(provider, user_id)
        self._connection.execute("COMMIT")

    def operations(self, caller: int) -> Operations:
        """Return operations that never suspend."""
        return Operations(*map(self._wrap, (self._load, self._store, self._lock)))

    def _wrap(self, action: Callable[[str, str], object]) -> Operation:
        async def call(provider: str, user_id: str) -> object:
            return action(provider, user_id)

        return call

    async def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class OneHop(CallingThread):
    """sqlite3 in another thread, which runs a whole operation in one call."""

    name: ClassVar[str] = "one-hop"
    label: ClassVar[str] = "sqlite3, one hop to its thread"
    most_callers: ClassVar[int] = 1 << 30

    async def open(self) -> None:
        """Open the connection, and start the thread."""
        await super().open()
        self._thread = ThreadPoolExecutor(1)

    def _wrap(self, action: Callable[[str, str], object]) -> Operation:
        run, thread = asyncio.get_running_loop().run_in_executor, self._thread

        async def call(provider: str, user_id: str) -> object:
            return await run(thread, action, provider, user_id)

        return call

    async def close(self) -> None:
        """End the thread, and close the connection."""
        self._thread.shutdown()
        await super().close()


FLOORS: Final[dict[str, list[type[Floor]]]] = {
    "asyncpg": [Held, HeldFour, Pool, PoolWithoutReset],
    "psycopg": [Held, HeldFour],
    "aiomysql": [Held, HeldFour, Pool],
    "asyncmy": [Held, HeldFour, Pool],
    "aiosqlite": [OneHop, CallingThread, Aiosqlite],
}
"""Floors by driver; one caller is compared with the first of them."""


def floor_of(driver: str, callers: int) -> str | None:
    """The name of the floor to compare with: a held connection for one caller, a pool for more."""
    names = [floor.name for floor in FLOORS.get(driver, ())]
    if not names:
        return None
    pools = [name for name in names if name.startswith("pool")]
    return names[0] if callers == 1 or not pools else pools[-1]
