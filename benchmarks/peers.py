"""Peers and references: other libraries, and code that an application might write with SQLAlchemy.

Each peer is used as its documentation shows, in its own tables, with a pool of the same size. None of them coordinates
refreshes between processes or binds a ciphertext to its row; only loading and storing are compared.
"""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping
from datetime import datetime
from importlib import import_module
from itertools import islice
from typing import Any, ClassVar, Final
from warnings import catch_warnings, simplefilter

from cryptography.fernet import Fernet
from sqlalchemy import Dialect, LargeBinary, MetaData, String, Table, TypeDecorator, bindparam, insert, select
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.contenders import Contender, Kind, Operations, missing
from benchmarks.floors import Asyncpg, Floor
from benchmarks.sql import IDLE, WRITTEN
from benchmarks.tokens import ACCESS, EXPIRES, REFRESH, key
from tokenstore_sql import token_table

__all__ = ["PEERS", "REFERENCES"]

_CHUNK: Final = 1000
_ATTEMPTS: Final = 5
# The key is the same in every process.
_FERNET: Final = Fernet(urlsafe_b64encode(bytes(range(32))))


class Core(Floor):
    """SQLAlchemy Core in autocommit, with the statements of the floors and an engine with default options."""

    name: ClassVar[str] = "core"
    kind: ClassVar[Kind] = "reference"
    label: ClassVar[str] = "SQLAlchemy Core, autocommit"

    async def open(self) -> None:
        """Make the engine and the statements."""
        self._engine = self.target.database.engine(self.target.pool_size, isolation_level="AUTOCOMMIT")
        table = token_table(MetaData(), self.target.table)
        names = {"p": "provider", "u": "user_id", "a": "account"}
        this_row = (table.c[column] == bindparam(name) for name, column in names.items())
        self._query: Any = select(*table.columns).where(*this_row)
        self._upsert = _upsert(table, self.target.database.dialect)

    def operations(self, caller: int) -> Operations:
        """Return load and store; in autocommit there is no row lock to measure."""
        engine, values, query, upsert = self._engine, self.values, self._query, self._upsert

        async def load(provider: str, user_id: str) -> object:
            async with engine.connect() as connection:
                return (await connection.execute(query, {"p": provider, "u": user_id, "a": ""})).first()

        async def store(provider: str, user_id: str) -> None:
            _, _, _, access, refresh, expires, known, due_at, _, generation = values(provider, user_id)
            parameters = {
                "p": provider,
                "u": user_id,
                "a": "",
                "access": access,
                "refresh": refresh,
                "expires": expires,
                "known": known,
                "due_at": due_at,
                "key_id": "bench",
                "g": generation,
                "now": expires,
            }
            async with engine.connect() as connection:
                await connection.execute(upsert, parameters)

        return Operations(load, store)

    async def close(self) -> None:
        """Dispose of the engine."""
        await self._engine.dispose()


def _upsert(table: Table, dialect: str) -> Any:
    values: dict[str, Any] = {
        "provider": bindparam("p"),
        "user_id": bindparam("u"),
        "account": bindparam("a"),
        "access_token": bindparam("access"),
        "refresh_token": bindparam("refresh"),
        "access_token_expires_at": bindparam("expires"),
        "access_token_expiry_known": bindparam("known"),
        "due_at": bindparam("due_at"),
        "key_id": bindparam("key_id"),
        "generation": bindparam("g"),
        "created_at": bindparam("now"),
        "updated_at": bindparam("now"),
    }
    replaced = (*WRITTEN, "updated_at")
    more: dict[str, Any] = {**dict.fromkeys(IDLE), "generation": table.c.generation + 1}
    if dialect == "mysql":
        ours = mysql.insert(table).values(**values)
        return ours.on_duplicate_key_update({**{name: ours.inserted[name] for name in replaced}, **more})
    build = sqlite.insert if dialect == "sqlite" else postgresql.insert
    theirs = build(table).values(**values)
    changes = {**{name: theirs.excluded[name] for name in replaced}, **more}
    return theirs.on_conflict_do_update(index_elements=["provider", "user_id", "account"], set_=changes)


class Encrypted(TypeDecorator[str]):
    """A text column that is encrypted with Fernet."""

    impl = LargeBinary
    cache_ok = True
    fernet: ClassVar[Fernet] = _FERNET

    def process_bind_param(self, value: str | None, dialect: Dialect) -> bytes | None:
        """Encrypt."""
        return None if value is None else self.fernet.encrypt(value.encode())

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        """Decrypt."""
        return None if value is None else self.fernet.decrypt(bytes(value)).decode()


class ORM(Contender):
    """SQLAlchemy's ORM with two columns under Fernet, which is what most applications write by hand."""

    name: ClassVar[str] = "orm-fernet"
    kind: ClassVar[Kind] = "peer"
    label: ClassVar[str] = "SQLAlchemy ORM + Fernet"

    async def open(self) -> None:
        """Map a table."""

        class Base(DeclarativeBase):
            pass

        class Token(Base):
            __tablename__ = f"{self.target.table}_orm"
            provider: Mapped[str] = mapped_column(String(64), primary_key=True)
            user_id: Mapped[str] = mapped_column(String(128), primary_key=True)
            access_token: Mapped[str] = mapped_column(Encrypted())
            refresh_token: Mapped[str | None] = mapped_column(Encrypted())
            expires_at: Mapped[datetime | None]

        self._model: Any = Token
        self._metadata = Base.metadata
        self._engine = self.target.database.engine(self.target.pool_size)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)

    async def fill(self, count: int) -> None:
        """Create the table, and insert the rows."""
        rows = (self._values(*key(number)) for number in range(count))
        await _create_and_fill(self._engine, self._metadata, self._model.__table__, rows)

    @staticmethod
    def _values(provider: str, user_id: str) -> dict[str, Any]:
        tokens = {"access_token": ACCESS, "refresh_token": REFRESH, "expires_at": EXPIRES.replace(tzinfo=None)}
        return {"provider": provider, "user_id": user_id, **tokens}

    def operations(self, caller: int) -> Operations:
        """Return operations that use a new session each time."""
        sessions, model, values = self._sessions, self._model, self._values

        async def load(provider: str, user_id: str) -> object:
            async with sessions() as session:
                return await session.get(model, (provider, user_id))

        async def merge(provider: str, user_id: str) -> None:
            async with sessions.begin() as session:
                await session.merge(model(**values(provider, user_id)))

        async def store(provider: str, user_id: str) -> None:
            # Two callers that store the same row at once can collide; an application has to retry.
            for _ in range(_ATTEMPTS - 1):
                try:
                    return await merge(provider, user_id)
                except DBAPIError:
                    continue
            return await merge(provider, user_id)

        async def lock(provider: str, user_id: str) -> None:
            async with sessions.begin() as session:
                row = await session.get(model, (provider, user_id), with_for_update=True)
                for name, value in values(provider, user_id).items():
                    setattr(row, name, value)

        # SQLite has no FOR UPDATE, so that this read would not lock.
        return Operations(load, store, None if self.target.database.dialect == "sqlite" else lock)

    async def close(self) -> None:
        """Dispose of the engine."""
        await self._engine.dispose()


async def _create_and_fill(
    engine: AsyncEngine, metadata: MetaData, table: Table, rows: Iterable[Mapping[str, Any]]
) -> None:
    rows = iter(rows)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
        while chunk := list(islice(rows, _CHUNK)):
            await connection.execute(insert(table), chunk)


class KeyValue(Contender):
    """py-key-value's PostgreSQL store in its encryption wrapper."""

    name: ClassVar[str] = "py-key-value"
    kind: ClassVar[Kind] = "peer"
    label: ClassVar[str] = "py-key-value + Fernet"

    async def open(self) -> None:
        """Make the store on a pool of asyncpg."""
        try:
            stores: Any = import_module("key_value.aio.stores.postgresql")
            wrappers: Any = import_module("key_value.aio.wrappers.encryption")
        except ImportError:
            raise missing("py-key-value-aio[postgresql]") from None
        self._pool: Any = await Asyncpg.pool(self.target.database, self.target.pool_size)
        table = f"{self.target.table}_kv"
        with catch_warnings():
            simplefilter("ignore")  # py-key-value warns that this store may change
            store = stores.PostgreSQLStore(pool=self._pool, table_name=table, auto_create=True)
        self._store: Any = wrappers.FernetEncryptionWrapper(key_value=store, fernet=_FERNET)

    async def fill(self, count: int) -> None:
        """Put the rows, many with each call."""
        for start in range(0, count, _CHUNK):
            keys = [":".join(key(number)) for number in range(start, min(start + _CHUNK, count))]
            await self._store.put_many(keys, [self._value()] * len(keys), collection="tokens")

    @staticmethod
    def _value() -> dict[str, Any]:
        return {"access_token": ACCESS, "refresh_token": REFRESH, "expires_at": EXPIRES.timestamp()}

    def operations(self, caller: int) -> Operations:
        """Return load and store; py-key-value has no locks."""
        store, value = self._store, self._value

        async def load(provider: str, user_id: str) -> object:
            return await store.get(f"{provider}:{user_id}", collection="tokens")

        async def put(provider: str, user_id: str) -> None:
            await store.put(f"{provider}:{user_id}", value(), collection="tokens")

        return Operations(load, put)

    async def close(self) -> None:
        """Close the pool."""
        await self._pool.close()


class Slack(Contender):
    """slack_sdk's installation store, which does not encrypt tokens."""

    name: ClassVar[str] = "slack-sdk"
    kind: ClassVar[Kind] = "peer"
    label: ClassVar[str] = "slack_sdk, unencrypted"

    async def open(self) -> None:
        """Make an engine, and the store on it."""
        try:
            slack: Any = import_module("slack_sdk.oauth.installation_store")
            stores: Any = import_module("slack_sdk.oauth.installation_store.sqlalchemy")
        except ImportError:
            raise missing("slack_sdk") from None
        self._installation: Any = slack.Installation
        self._engine = self.target.database.engine(self.target.pool_size)
        names = [f"{self.target.table}_bots", f"{self.target.table}_slack"]
        self._store: Any = stores.AsyncSQLAlchemyInstallationStore("client", self._engine, *names)

    async def fill(self, count: int) -> None:
        """Create the store's tables, and insert the rows that its ``async_save`` would insert."""
        installations = [self._make(*key(number)) for number in range(count)]
        store = self._store
        client = {"client_id": store.client_id}
        rows = ({**one.to_dict(), **client, "installed_at": _INSTALLED} for one in installations)
        bots = ({**one.to_bot().to_dict(), **client, "installed_at": _INSTALLED} for one in installations)
        await _create_and_fill(self._engine, store.metadata, store.installations, rows)
        await _create_and_fill(self._engine, store.metadata, store.bots, bots)

    def _make(self, provider: str, user_id: str) -> Any:
        """Make an installation. All have the same time, so that ``async_save`` replaces a row."""
        team = f"{provider}:{user_id}"
        bot = {"bot_id": "B1", "bot_user_id": "U2", "bot_token": ACCESS, "bot_refresh_token": REFRESH}
        place = {"app_id": "A1", "enterprise_id": "E1", "team_id": team, "user_id": "U1"}
        return self._installation(**place, **bot, installed_at=_INSTALLED.timestamp())

    def operations(self, caller: int) -> Operations:
        """Return load and store; slack_sdk has no locks."""
        store, make = self._store, self._make

        async def load(provider: str, user_id: str) -> object:
            return await store.async_find_installation(enterprise_id="E1", team_id=f"{provider}:{user_id}")

        async def save(provider: str, user_id: str) -> None:
            await store.async_save(make(provider, user_id))

        return Operations(load, save)

    async def close(self) -> None:
        """Dispose of the engine."""
        await self._engine.dispose()


_INSTALLED: Final = datetime(2025, 1, 1)  # noqa: DTZ001 - slack_sdk's columns have no time zone

REFERENCES: Final[list[type[Contender]]] = [Core]
PEERS: Final[list[tuple[tuple[str, ...], type[Contender]]]] = [((), ORM), (("asyncpg",), KeyValue), ((), Slack)]
"""Each peer with the drivers that it supports; empty: all."""
