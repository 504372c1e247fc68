"""The version of the tables, and the changes from one version to the next.

The number is in the table of values, in a row that no caller can name: its namespace is empty. Tables that an
application's Alembic has created have no such row; its own migrations keep them up to date.

Alembic is not used here: it keeps versions in a table of its own, which applications have already. SQLAlchemy writes
all the SQL.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from sqlalchemy import Column, Connection, Table, insert, inspect, select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import ExecutableDDLElement

from tokenstore.errors import ConfigurationError, LockTimeoutError
from tokenstore.records import MigrationResult
from tokenstore_sql.dialect import Dialect
from tokenstore_sql.errors import cause_of
from tokenstore_sql.polling import jittered
from tokenstore_sql.schema import TOKEN_TABLE, VALUES_TABLE

__all__ = ["MIGRATIONS", "Migration", "migrate_tables", "newest_version", "read_version", "write_version"]


@dataclass(frozen=True)
class Migration:
    """The changes from one version of the tables to the next.

    A migration only adds columns and indexes, so programs of the previous version work during it and after it. New
    tables get the same columns and indexes from :mod:`tokenstore_sql.schema`. A later version removes what is unused,
    once no supported program needs it.

    Attributes:
        title: What it changes, for operators.
        columns: The kind of a table, and the name of its new column, which may be null or has a default of the server.
        indexes: The kind of a table, and what follows the table's name in the name of its new index.
    """

    title: str
    columns: Sequence[tuple[str, str]] = ()
    indexes: Sequence[tuple[str, str]] = ()


MIGRATIONS: Sequence[Migration] = ()
"""The first one leads from version 1 to version 2."""

# The row of the table of values that has the version.
_ROW: Final = {"namespace": "", "name": "schema"}
# Seconds for which a change is retried while other transactions use the table, and the seconds between two attempts.
_LOCK_RETRY_LIMIT: Final = 60.0
_LOCK_RETRY_INTERVAL: Final = 0.5


def newest_version() -> int:
    """The version that this program knows."""
    return 1 + len(MIGRATIONS)


async def read_version(connection: AsyncConnection, tables: Mapping[str, Table]) -> int | None:
    """Read the version of existing tables, or None if the row is missing, as in tables that Alembic has created.

    Raises:
        ConfigurationError: The version is so new that this program may not use the tables.
    """
    values = tables[VALUES_TABLE]
    query = select(values.c.version).filter_by(**_ROW)
    found: int | None = (await connection.execute(query)).scalar_one_or_none()
    if found is not None and found > newest_version() + 1:
        raise ConfigurationError(
            f"the table {tables[TOKEN_TABLE].fullname} is of version {found}, and this tokenstore works with tables up "
            f"to version {newest_version() + 1}: install a newer tokenstore"
        )
    return found


async def write_version(connection: AsyncConnection, values: Table, version: int) -> None:
    """Write the version of the tables. The caller keeps others from doing the same."""
    changed = await connection.execute(update(values).filter_by(**_ROW).values(version=version))
    if changed.rowcount == 0:
        row = {"value": b"", "key_id": "", "expires_at": None, "version": version, "created_at": 0, "updated_at": 0}
        await connection.execute(insert(values).values({**_ROW, **row}))


async def migrate_tables(
    connection: AsyncConnection, tables: Mapping[str, Table], dialect: Dialect, *, dry_run: bool
) -> MigrationResult:
    """Bring the tables to the newest version. Safe in many processes at once, and after one of them was killed.

    Args:
        connection: The connection, which is in no transaction.
        tables: The tables, by their kind. Their indexes may be changed.
        dialect: How the database is set up.
        dry_run: Whether only to tell what there is to do.

    Raises:
        ConfigurationError: The tables are too new for this program.
    """
    async with dialect.exclusive_migration(connection):
        found = await read_version(connection, tables)
        steps = []
        for version, migration in enumerate(MIGRATIONS, start=2):
            if version <= (found or 1):
                continue
            steps.append(migration.title)
            if not dry_run:
                await _carry_out(migration, connection, tables, dialect)
                await write_version(connection, tables[VALUES_TABLE], version)
        if found is None and not dry_run:
            await write_version(connection, tables[VALUES_TABLE], newest_version())
    return MigrationResult(found or 1, max(found or 1, newest_version()), tuple(steps))


async def _carry_out(
    migration: Migration, connection: AsyncConnection, tables: Mapping[str, Table], dialect: Dialect
) -> None:
    """Add what is missing of a migration: an earlier attempt may have ended half-way."""
    for kind, name in migration.columns:
        table = tables[kind]
        if name not in await connection.run_sync(_columns, table):
            column = _AddColumn(table, table.columns[name])
            await _until_free(dialect, partial(dialect.change_table, connection, column))
    for kind, suffix in migration.indexes:
        table = tables[kind]
        [index] = [index for index in table.indexes if index.name == f"{table.name}{suffix}"]
        await _until_free(dialect, partial(dialect.add_index, connection, index))


class _AddColumn(ExecutableDDLElement):
    inherit_cache = False

    def __init__(self, table: Table, column: Column[Any]) -> None:
        self.table = table
        self.column = column


@compiles(_AddColumn)
def _compile_add_column(element: _AddColumn, compiler: Any, **_: Any) -> str:
    table = compiler.preparer.format_table(element.table)
    return f"ALTER TABLE {table} ADD COLUMN {compiler.get_column_specification(element.column)}"


def _columns(connection: Connection, table: Table) -> set[str]:
    return {column["name"] for column in inspect(connection).get_columns(table.name, table.schema)}


async def _until_free(dialect: Dialect, change: Callable[[], Awaitable[None]]) -> None:
    """Try a change again while transactions of others use the table.

    Each attempt waits briefly for the table's lock: the statements of all others queue behind a waiting change.
    """
    deadline = time.monotonic() + _LOCK_RETRY_LIMIT
    while True:
        try:
            return await change()
        except Exception as error:
            kind, _ = dialect.errors.classify(cause_of(error))
            if kind is not LockTimeoutError or time.monotonic() > deadline:
                raise
        await asyncio.sleep(jittered(_LOCK_RETRY_INTERVAL))
