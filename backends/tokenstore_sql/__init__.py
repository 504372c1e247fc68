"""PostgreSQL, MySQL/MariaDB and SQLite backends over one schema, through SQLAlchemy Core.

PYTEST_DONT_REWRITE: this word keeps pytest, which finds the plugin of tokenstore.testing in the same distribution, from
warning that the package was imported before pytest began.
"""

from tokenstore_sql.schema import metadata, token_table, values_table

__all__ = ["metadata", "token_table", "values_table"]
