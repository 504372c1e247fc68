"""SQLAlchemy's connection to MySQL or MariaDB, of an application's engine or session."""

from __future__ import annotations

from sqlalchemy import Executable

from tokenstore_sql.connections.alchemy import AlchemyConnection
from tokenstore_sql.connections.connection import NO_PARAMETERS, Parameters, StatementResult
from tokenstore_sql.mysql.sessions import SESSION, trusted_session

__all__ = ["MySQLAlchemyConnection"]


class MySQLAlchemyConnection(AlchemyConnection):
    """Refuses sessions in which values are not safe."""

    async def run(self, statement: Executable, parameters: Parameters = NO_PARAMETERS) -> StatementResult:
        if statement is not SESSION:
            driver = await self.driver_connection()
            # At each call: the application may have changed its session since the last one.
            _ = await trusted_session(self, driver)
        return await super().run(statement, parameters)
