"""Creating the tables."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection, Table, inspect
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import CreateSchema

from tokenstore.errors import ConfigurationError
from tokenstore_sql.dialect import Dialect
from tokenstore_sql.migrations import newest_version, read_version, write_version
from tokenstore_sql.schema import TOKEN_TABLE, VALUES_TABLE

__all__ = ["create_tables"]


async def create_tables(connection: AsyncConnection, tables: Mapping[str, Table], dialect: Dialect) -> None:
    """Create the tables that are missing. Safe to run from many processes at once.

    Args:
        connection: The connection, in a transaction.
        tables: The tables, all of one ``MetaData``, by what an error calls a table of that kind.
        dialect: How the database is set up.

    Raises:
        ConfigurationError: The schema does not exist, the tables are of an older version or of one that is too new, or
            there is a table of such a name that lacks some of the columns.
        UnsupportedOperationError: The database cannot serve as a store.
    """
    await dialect.check(connection)
    for table in tables.values():
        await connection.run_sync(_check_schema, table.schema)
    async with dialect.exclusive_setup(connection):
        found = [kind for kind, table in tables.items() if await connection.run_sync(_has, table)]
        for kind, table in tables.items():
            if kind not in found:
                await connection.run_sync(table.create, checkfirst=False)
        missing = {kind: await connection.run_sync(_missing_columns, tables[kind]) for kind in found}
        if not missing.get(VALUES_TABLE):
            await _check_version(connection, tables, is_new=TOKEN_TABLE not in found)
        for kind, names in missing.items():
            if names:
                raise ConfigurationError(
                    f"the table {tables[kind].fullname} exists but is no {kind}: it lacks {', '.join(names)}; choose "
                    "another name with the option `table`, or run `tokenstore migrate` if an older tokenstore created "
                    "it"
                )


async def _check_version(connection: AsyncConnection, tables: Mapping[str, Table], *, is_new: bool) -> None:
    if is_new:
        await write_version(connection, tables[VALUES_TABLE], newest_version())
        return
    found = await read_version(connection, tables)
    if found is not None and found < newest_version():
        raise ConfigurationError(
            f"the table {tables[TOKEN_TABLE].fullname} is of version {found}, and this tokenstore needs version "
            f"{newest_version()}: run `tokenstore migrate`"
        )


def _has(connection: Connection, table: Table) -> bool:
    return inspect(connection).has_table(table.name, table.schema)


def _missing_columns(connection: Connection, table: Table) -> list[str]:
    found = {column["name"] for column in inspect(connection).get_columns(table.name, table.schema)}
    return sorted(set(table.columns.keys()) - found)


def _check_schema(connection: Connection, schema: str | None) -> None:
    if schema is not None and not inspect(connection).has_schema(schema):
        statement = CreateSchema(schema).compile(dialect=connection.dialect)
        raise ConfigurationError(
            f"there is no schema {schema}: create it with {statement}; or choose another one with the option `schema`"
        )
