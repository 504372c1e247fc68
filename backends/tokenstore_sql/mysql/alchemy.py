"""SQLAlchemy's connection to MySQL or MariaDB, of an application's engine or session."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Executable

from tokenstore_sql.connections.alchemy import AlchemyConnection
from tokenstore_sql.connections.compiler import CompiledStatement
from tokenstore_sql.connections.connection import NO_PARAMETERS, Parameters, StatementResult
from tokenstore_sql.mysql.sessions import SESSION, check_size, trusted_session

__all__ = ["MySQLAlchemyConnection"]

# More than the SQL of a statement without its values, in bytes: how large a statement is need not be known exactly if
# it is far from the limit.
_SQL_BYTES: Final = 32 * 1024


class MySQLAlchemyConnection(AlchemyConnection):
    """Refuses sessions in which values are not safe, and statements that are too large to be sent."""

    async def run(self, statement: Executable, parameters: Parameters = NO_PARAMETERS) -> StatementResult:
        if statement is not SESSION:
            driver = await self.driver_connection()
            # At each call: the application may have changed its session since the last one.
            session = await trusted_session(self, driver)
            # Escaping at most doubles a value.
            if _SQL_BYTES + 2 * sum(map(_length, parameters.values())) >= session.max_allowed_packet:
                check_size(self, driver, self._size(driver, statement, parameters))
        return await super().run(statement, parameters)

    def _size(self, driver: Any, statement: Executable, parameters: Parameters) -> int:
        """The bytes of a statement as the driver would write it."""
        compiled = CompiledStatement(statement, self.sql_dialect)
        literals = map(driver.escape, compiled.arguments(parameters))
        return len(compiled.sql) + sum(len(literal) - len("%s") for literal in literals)


def _length(value: object) -> int:
    if isinstance(value, str):
        return 4 * len(value)
    return len(value) if isinstance(value, bytes) else 0
