"""Creating the token table."""

from __future__ import annotations

from sqlalchemy import Connection, Table, inspect
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import CreateSchema

from tokenstore.errors import ConfigurationError
from tokenstore_sql.dialect import Dialect

__all__ = ["create_table"]


async def create_table(connection: AsyncConnection, table: Table, dialect: Dialect) -> None:
    """Create the table if it is missing. Safe to run from many processes at once.

    Raises:
        ConfigurationError: The schema does not exist, or there is a table of this name that lacks some of the columns.
        UnsupportedOperationError: The database cannot serve as a store.
    """
    await dialect.check(connection)
    await connection.run_sync(_check_schema, table.schema)
    async with dialect.exclusive_setup(connection):
        await connection.run_sync(table.metadata.create_all)
        found = await connection.run_sync(
            lambda sync: {column["name"] for column in inspect(sync).get_columns(table.name, table.schema)}
        )
        if missing := sorted(set(table.columns.keys()) - found):
            raise ConfigurationError(
                f"the table {table.fullname} exists but is no token table: it lacks {', '.join(missing)}; "
                "choose another name with the option `table`"
            )


def _check_schema(connection: Connection, schema: str | None) -> None:
    if schema is not None and not inspect(connection).has_schema(schema):
        statement = CreateSchema(schema).compile(dialect=connection.dialect)
        raise ConfigurationError(
            f"there is no schema {schema}: create it with {statement}; or choose another one with the option `schema`"
        )
