"""Creating the token table."""

from __future__ import annotations

from sqlalchemy import Table, inspect
from sqlalchemy.ext.asyncio import AsyncConnection

from tokenstore.errors import ConfigurationError
from tokenstore_sql.dialect import Dialect

__all__ = ["create_table"]


async def create_table(connection: AsyncConnection, table: Table, dialect: Dialect) -> None:
    """Create the table if it is missing. Safe to run from many processes at once.

    Raises:
        ConfigurationError: There is a table of this name that lacks some of the columns.
        UnsupportedOperationError: The database cannot serve as a store.
    """
    await dialect.check(connection)
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
