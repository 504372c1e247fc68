"""Creating the tables."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection, Table, inspect
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import CreateSchema

from tokenstore.errors import ConfigurationError
from tokenstore_sql.dialect import Dialect

__all__ = ["create_tables"]


async def create_tables(connection: AsyncConnection, tables: Mapping[str, Table], dialect: Dialect) -> None:
    """Create the tables that are missing. Safe to run from many processes at once.

    Args:
        connection: The connection, in a transaction.
        tables: The tables, all of one ``MetaData``, by what an error calls a table of that kind.
        dialect: How the database is set up.

    Raises:
        ConfigurationError: The schema does not exist, or there is a table of such a name that lacks some of the
            columns.
        UnsupportedOperationError: The database cannot serve as a store.
    """
    await dialect.check(connection)
    for table in tables.values():
        await connection.run_sync(_check_schema, table.schema)
    async with dialect.exclusive_setup(connection):
        for kind, table in tables.items():
            await connection.run_sync(table.create, checkfirst=True)
            if missing := await connection.run_sync(_missing_columns, table):
                raise ConfigurationError(
                    f"the table {table.fullname} exists but is no {kind}: it lacks {', '.join(missing)}; "
                    "choose another name with the option `table`"
                )


def _missing_columns(connection: Connection, table: Table) -> list[str]:
    found = {column["name"] for column in inspect(connection).get_columns(table.name, table.schema)}
    return sorted(set(table.columns.keys()) - found)


def _check_schema(connection: Connection, schema: str | None) -> None:
    if schema is not None and not inspect(connection).has_schema(schema):
        statement = CreateSchema(schema).compile(dialect=connection.dialect)
        raise ConfigurationError(
            f"there is no schema {schema}: create it with {statement}; or choose another one with the option `schema`"
        )
