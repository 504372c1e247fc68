"""An attacker who can read and write the tables, and has no key."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import MetaData, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from support.database import Place, app_engine
from tokenstore_sql.schema import token_table, values_table

__all__ = ["TableWriter", "table_writer"]


class TableWriter:
    """Reads and writes the rows of users, and values by their names. Sealed values are bytes to it."""

    def __init__(self, engine: AsyncEngine, name: str) -> None:
        metadata = MetaData()
        self._engine = engine
        self._tokens, self._values = token_table(metadata, name), values_table(metadata, name)

    async def row(self, user: str) -> dict[str, Any]:
        """Every column of a user's row."""
        async with self._engine.connect() as connection:
            rows = await connection.execute(select(self._tokens).where(self._tokens.c.user_id == user))
            return dict(rows.mappings().one())

    async def change(self, user: str, **columns: Any) -> None:
        """Change columns of a user's row."""
        async with self._engine.begin() as connection:
            statement = update(self._tokens).where(self._tokens.c.user_id == user).values(**columns)
            assert (await connection.execute(statement)).rowcount == 1

    async def put_back(self, row: dict[str, Any]) -> None:
        """Put a row back as it once was, also if it was deleted."""
        async with self._engine.begin() as connection:
            await connection.execute(delete(self._tokens).where(self._tokens.c.user_id == row["user_id"]))
            await connection.execute(insert(self._tokens).values(**row))

    async def value(self, name: str) -> dict[str, Any]:
        """Every column of a value."""
        async with self._engine.connect() as connection:
            rows = await connection.execute(select(self._values).where(self._values.c.name == name))
            return dict(rows.mappings().one())

    async def put_value_back(self, row: dict[str, Any]) -> None:
        """Put a value back as it once was, or under another name."""
        async with self._engine.begin() as connection:
            await connection.execute(delete(self._values).where(self._values.c.name == row["name"]))
            await connection.execute(insert(self._values).values(**row))


@asynccontextmanager
async def table_writer(place: Place) -> AsyncIterator[TableWriter]:
    """Connect to the tables of a place without a key."""
    async with app_engine(place) as engine:
        yield TableWriter(engine, place.table)
