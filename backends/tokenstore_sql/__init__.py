"""PostgreSQL, MySQL/MariaDB and SQLite backends over one schema, through SQLAlchemy Core."""

from tokenstore_sql.schema import metadata, token_table, values_table

__all__ = ["metadata", "token_table", "values_table"]
