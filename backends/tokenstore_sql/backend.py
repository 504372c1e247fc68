"""The SQL backend over an engine: one that it made from a URL, or an application's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar, Self, TypeVar, cast

from sqlalchemy import URL, MetaData, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine

from tokenstore.cancellation import finish
from tokenstore.errors import ConfigurationError, MissingDependencyError, UnknownBackendError
from tokenstore.event_loops import HomeLoop
from tokenstore.options import OptionParser, read_options
from tokenstore.records import MigrationResult, SealedMetadata, SealedRecord, SealedTokens, TokenKey
from tokenstore_sql.batched import Loads, Stores
from tokenstore_sql.calls import MigrationCalls, Operation, SetupCalls, StoreCalls
from tokenstore_sql.connections.alchemy import AlchemyConnection
from tokenstore_sql.connections.driver import Connector
from tokenstore_sql.connections.engine import EngineSource
from tokenstore_sql.connections.hosts import split_url
from tokenstore_sql.connections.pool import Pool
from tokenstore_sql.connections.source import Source
from tokenstore_sql.dialect import Dialect, unencoded_at
from tokenstore_sql.migrations import migrate_tables
from tokenstore_sql.operations import SQLOperations
from tokenstore_sql.options import LOCK_TIMEOUT, POOL_DEFAULTS, POOL_OPTIONS, STATEMENT_TIMEOUT, TABLE_OPTIONS
from tokenstore_sql.rows import Rows
from tokenstore_sql.schema import DEFAULT_TABLE
from tokenstore_sql.setup import create_tables
from tokenstore_sql.transaction import SQLTransaction

__all__ = ["SQLBackend"]

T = TypeVar("T")


class SQLBackend(SQLOperations):
    """A store's rows in one table of a database.

    Args:
        engine: The engine, which creates the table.
        connect: Makes the pool of a store with connections of its own; default: the engine's own pool is used.
        table: The table's name.
        schema: The table's schema.
        lock_timeout: The longest wait for a lock, in seconds.
        statement_timeout: How long the database may take to answer a statement that waits for no lock, in seconds.
    """

    dialect_class: ClassVar[type[Dialect]]
    drivers: ClassVar[Mapping[str, str]]
    """From a URL's scheme to SQLAlchemy's name of dialect and driver."""
    sync_drivers: ClassVar[frozenset[str]]
    """SQLAlchemy's drivers without asyncio. A URL that names one gets the driver of the plain scheme."""
    extras: ClassVar[Mapping[str, str]]
    """From SQLAlchemy's name to the extra that installs the driver."""
    driver_options: ClassVar[Mapping[str, OptionParser]]
    """Options of the driver alone."""
    foreign_options: ClassVar[Mapping[str, str]]
    """From an option of another library, as providers of databases print it in a URL, to what to write in its place."""

    def __init__(
        self,
        engine: AsyncEngine,
        connect: Callable[[Dialect], Pool] | None = None,
        *,
        table: str = DEFAULT_TABLE,
        schema: str | None = None,
        lock_timeout: float = LOCK_TIMEOUT,
        statement_timeout: float = STATEMENT_TIMEOUT,
    ) -> None:
        super().__init__(self.dialect_class(lock_timeout), engine.url, table, schema)
        dialect = self.dialect
        dialect.check_url(engine.url)
        self._engine = engine
        self._engine_source = EngineSource(engine, dialect.alchemy_class, dialect.errors, dialect.isolation_level)
        self._source: Source = self._engine_source if connect is None else connect(dialect)
        self._owns_connections = connect is not None
        self._statement_timeout = statement_timeout
        self._home = HomeLoop()
        self._begin()

    def _begin(self) -> None:
        """Begin in this process and event loop, in which nothing waits or is under way yet."""
        self._calls = StoreCalls(self._source, self.statements, self.dialect, self._statement_timeout)
        self._loads, self._stores = Loads(self._calls), Stores(self._calls)

    def _check(self) -> None:
        """Check that the store is open, and notice a fork or a new event loop.

        Raises:
            StoreClosedError: The store is closed.
            UnsupportedOperationError: The store serves another event loop, which still runs.
        """
        self._calls.check_open()
        if self._home.moved(exclusive=self._owns_connections):
            # The connections belong to the parent process, or ended with their event loop: they cannot be closed here.
            self._source.forget()
            self._begin()

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, object]) -> Self:
        """Make a backend with connections of its own; see :class:`tokenstore.protocol.BackendFactory`."""
        parsed, (one_host, hosts) = None, split_url(url)
        with suppress(ArgumentError, ValueError):
            parsed = make_url(one_host)
        if parsed is None:
            # Raised outside of the handler, so that it has no context: SQLAlchemy's message may contain a password.
            raise ConfigurationError(
                "the database URL cannot be read; expected scheme://user:password@host:port/database"
            )
        scheme = parsed.drivername.lower()
        plain, _, named = scheme.partition("+")
        if (driver := cls.drivers.get(plain if named in cls.sync_drivers else scheme)) is None:
            raise UnknownBackendError(f"no driver for {scheme}://; known schemes: {', '.join(sorted(cls.drivers))}")
        if parsed.host and any("@" in part for part in (parsed.host, parsed.database or "", *parsed.query)):
            raise unencoded_at()
        parsers = {**TABLE_OPTIONS, **POOL_OPTIONS, **cls.driver_options}
        query = dict(parsed.query)
        if hosts is not None and "host" in cls.driver_options:
            if "host" in query or "host" in options:
                raise ConfigurationError("host: the URL names several hosts already; pass the hosts once")
            query["host"] = hosts
        elif hosts is not None:
            raise ConfigurationError(f"{scheme}:// takes no list of hosts")
        if foreign := sorted((query.keys() | options.keys()) & cls.foreign_options.keys()):
            raise ConfigurationError(f"{foreign[0]} is no option of {scheme}://; {cls.foreign_options[foreign[0]]}")
        values: dict[str, Any] = {**POOL_DEFAULTS, **read_options(f"{scheme}://", parsers, query, options)}
        try:
            engine = cls._create_engine(parsed.set(drivername=driver, query={}), values)
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f'{scheme}:// needs the package {error.name}: pip install "tokenstore[{cls.extras[driver]}]"'
            ) from None

        def pool(dialect: Dialect) -> Pool:
            return Pool(
                cls._connector(engine, dialect, values),
                size=values["pool_size"],
                timeout=values["pool_timeout"],
                recycle=values["pool_recycle"],
            )

        arguments = [*TABLE_OPTIONS, "statement_timeout"]
        return cls(engine, pool, **{name: values[name] for name in arguments if name in values})

    @classmethod
    @abstractmethod
    def _create_engine(cls, url: URL, options: Mapping[str, Any]) -> AsyncEngine:
        """An engine without a pool, for a URL without its query, with checked options."""

    @classmethod
    @abstractmethod
    def _connector(cls, engine: AsyncEngine, dialect: Dialect, options: Mapping[str, Any]) -> Connector:
        """What opens the driver connections of a store that owns its connections."""

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.table.fullname} at {self._engine.url.render_as_string(hide_password=True)}>"
        )

    @property
    def lock_timeout(self) -> float:
        return self.dialect.lock_timeout

    async def setup(self) -> None:
        async def create(rows: Rows) -> None:
            await create_tables(cast(AlchemyConnection, rows.connection).alchemy, self.tables, self.dialect)

        await self._run_setup(create)

    async def drop(self) -> None:
        """Drop the tables, with every token and value in them."""

        async def drop(rows: Rows) -> None:
            for table in self.tables.values():
                await cast(AlchemyConnection, rows.connection).alchemy.run_sync(table.drop, checkfirst=True)

        await self._run_setup(drop)

    async def migrate(self, *, dry_run: bool) -> MigrationResult:
        """See :class:`tokenstore.protocol.SupportsMigrations`."""
        # Copies, because a migration changes options of the indexes.
        tables = {kind: table.to_metadata(MetaData()) for kind, table in self.tables.items()}

        async def migrate(rows: Rows) -> MigrationResult:
            connection = cast(AlchemyConnection, rows.connection).alchemy
            return await migrate_tables(connection, tables, self.dialect, dry_run=dry_run)

        self._check()
        calls = MigrationCalls(self._engine_source, self.statements, self.dialect)
        return await calls.write([], migrate, locked=True)

    async def _run_setup(self, operation: Operation[None]) -> None:
        self._check()
        await SetupCalls(self._engine_source, self.statements, self.dialect).write([], operation, locked=True)

    async def aclose(self) -> None:
        if not self._calls.closed:
            self._check()
            self._calls.closed = True
            await finish(self._close())

    async def _close(self) -> None:
        await self._loads.aclose()
        await self._stores.aclose()
        await self._source.aclose()

    async def get(self, key: TokenKey) -> SealedRecord | None:
        self._check()
        return await self._loads.load(key)

    async def put(self, key: TokenKey, tokens: SealedTokens, *, metadata: SealedMetadata | None = None) -> None:
        if metadata is not None:  # rare: a login of an application that has fields of its own
            await super().put(key, tokens, metadata=metadata)
            return
        self._check()
        await self._stores.store(key, tokens)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[SQLTransaction]:
        self._check()
        transaction = SQLTransaction(self._calls)
        try:
            yield transaction
            await transaction.commit()
        finally:
            await finish(transaction.end())

    async def _run(self, keys: Sequence[Hashable], operation: Operation[T], *, write: bool) -> T:
        self._check()
        return await self._calls.run(keys, operation, write=write)

    def _own_clients(self) -> int:
        return self._source.open
