"""The tables, and the types that make their columns mean the same on every database.

:data:`metadata`, :func:`token_table` and :func:`values_table` are public for users of Alembic: add the tables to your
own ``MetaData`` with ``token_table(my_metadata)`` and ``values_table(my_metadata)``, and autogenerate sees them.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Dialect,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    text,
)
from sqlalchemy.dialects import mysql, postgresql

from tokenstore.records import MAX_ACCOUNT_BYTES, MAX_PROVIDER_BYTES, MAX_USER_ID_BYTES
from tokenstore.value_records import MAX_VALUE_GROUP_BYTES, MAX_VALUE_NAME_BYTES

__all__ = [
    "DEFAULT_TABLE",
    "TOKEN_TABLE",
    "VALUES_TABLE",
    "PostgresText",
    "Utf8Binary",
    "exact_text",
    "metadata",
    "token_table",
    "values_table",
]

DEFAULT_TABLE = "oauth_tokens"

TOKEN_TABLE = "token table"  # noqa: S105 - no password
"""The name of the token table's kind in errors, and its key among the tables of a backend."""

VALUES_TABLE = "table of values"
"""The same for the table of values."""


class Utf8Binary(TypeDecorator[str]):
    """Text in a VARBINARY column: on MySQL and MariaDB the only type that compares byte for byte.

    Their default collations hold 'Alice' = 'alice', 'é' = 'e' and 'bob' = 'bob '; ``utf8mb4_bin`` still pads blanks.
    """

    impl = mysql.VARBINARY
    cache_ok = True

    # Not process_bind_param and process_result_value, for which SQLAlchemy makes three calls in place of one.

    def bind_processor(self, dialect: Dialect) -> Any:
        return _encoded

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        return _decoded


def _encoded(value: str | None) -> bytes | None:
    return None if value is None else value.encode()


def _decoded(value: object) -> object:
    # A user who can write to the table can put any bytes here. Those bytes must not end a query for several rows: they
    # become surrogates, which no text of the core has, so the core refuses the one row. (An altered table may hold text
    # already.)
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value


class AnyBlob(LargeBinary):
    """BLOB on SQLite, which keeps text and numbers in such a column, too, if the table is not STRICT.

    The core refuses such a value. SQLAlchemy's own type would raise TypeError for it, and for all rows of the query.
    """

    def adapt(self, cls: Any, **kw: Any) -> Any:
        return self

    def bind_processor(self, dialect: Dialect) -> None:
        """None: the driver takes bytes."""

    def result_processor(self, dialect: Dialect, coltype: object) -> None:
        """None: the driver returns bytes."""


class PostgresText(postgresql.TEXT):
    """TEXT on PostgreSQL, whose parameters are TEXT, too.

    SQLAlchemy's own type casts parameters to VARCHAR. PostgreSQL has no operator for TEXT and VARCHAR and takes the one
    for two TEXTs. If a user may create objects in a schema of the search_path, that user can create an operator for
    TEXT and VARCHAR. It matches better, runs with the rights of the store's role, and decides which row is found.
    """

    render_bind_cast = True

    def adapt(self, cls: Any, **kw: Any) -> Any:
        # SQLAlchemy would adapt this type to its driver's String, which is rendered as VARCHAR.
        return type(self)(collation=self.collation)


def exact_text(size: int) -> Text:
    """Text that equals itself alone and sorts by its UTF-8 bytes, on every database.

    Args:
        size: The most bytes; MySQL needs to know.
    """
    return (
        Text()
        .with_variant(PostgresText(collation="C"), "postgresql")
        .with_variant(Utf8Binary(size), "mysql", "mariadb")
    )


# A STRICT table of SQLite knows INTEGER only; it has 64 bits there.
_INT64 = BigInteger().with_variant(Integer(), "sqlite")
# MySQL's BLOB ends at 64 KiB.
_SEALED = LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb").with_variant(AnyBlob(), "sqlite")


def token_table(metadata: MetaData, name: str = DEFAULT_TABLE, schema: str | None = None) -> Table:
    """Add the token table to a ``MetaData``.

    Args:
        metadata: Where to add it.
        name: The table's name.
        schema: Its schema; on MySQL and MariaDB a database.
    """
    return Table(
        name,
        metadata,
        Column("provider", exact_text(MAX_PROVIDER_BYTES), primary_key=True),
        Column("user_id", exact_text(MAX_USER_ID_BYTES), primary_key=True),
        Column(
            "account",
            exact_text(MAX_ACCOUNT_BYTES),
            primary_key=True,
            comment="which of the user's accounts at the provider; empty: the only one",
        ),
        Column("access_token", _SEALED, nullable=False),
        Column("refresh_token", _SEALED),
        Column("extra", _SEALED),
        Column("metadata", _SEALED, comment="the application's own fields, which no token response touches"),
        Column("metadata_key_id", exact_text(32), comment="the key that sealed the metadata"),
        Column("access_token_expires_at", _INT64, comment="microseconds since the epoch; null: no known expiry"),
        Column("refresh_token_expires_at", _INT64, comment="microseconds since the epoch; null: no known expiry"),
        Column(
            "access_token_expiry_known",
            _INT64,
            nullable=False,
            comment="1: an access token without an expiry never expires; 0: its expiry is unknown",
        ),
        Column("key_id", exact_text(32), nullable=False, comment="the key that sealed this row"),
        Column("generation", _INT64, nullable=False, comment="changes with every write of tokens"),
        Column("lease_holder", exact_text(64), comment="who is refreshing this row"),
        Column("lease_expires_at", _INT64, comment="microseconds since the epoch, on the database's clock"),
        Column("failure_code", exact_text(64), comment="why the last refresh of this generation failed"),
        Column("failed_at", _INT64, comment="when that refresh failed, on the database's clock"),
        Column("retry_at", _INT64, comment="when to try again; null: not before new tokens"),
        Column("due_at", _INT64, comment="microseconds since the epoch; null: no sweep refreshes this row"),
        Column("created_at", _INT64, nullable=False),
        Column("updated_at", _INT64, nullable=False),
        # With the account: else PostgreSQL may read one row by this index, and all accounts of the user with it.
        Index(f"{name}_by_user", "user_id", "provider", "account"),
        # In the order in which a sweep reads the due rows of one provider.
        Index(
            f"{name}_by_due",
            *("provider", "due_at", "user_id", "account"),
            postgresql_where=text("due_at IS NOT NULL"),
            sqlite_where=text("due_at IS NOT NULL"),
        ),
        schema=schema,
        sqlite_strict=True,
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
    )


def values_table(metadata: MetaData, name: str = DEFAULT_TABLE, schema: str | None = None) -> Table:
    """Add the table of values to a ``MetaData``. Its name is that of the token table and ``_values``.

    Args:
        metadata: Where to add it.
        name: The token table's name.
        schema: The schema of both.
    """
    name = f"{name}_values"
    return Table(
        name,
        metadata,
        Column("namespace", exact_text(MAX_VALUE_GROUP_BYTES), primary_key=True),
        Column("name", exact_text(MAX_VALUE_NAME_BYTES), primary_key=True),
        Column("value", _SEALED, nullable=False),
        Column("key_id", exact_text(32), nullable=False, comment="the key that sealed this value"),
        Column("expires_at", _INT64, comment="microseconds since the epoch, on the database's clock; null: never"),
        Column("version", _INT64, nullable=False, comment="another random number with every write of the value"),
        Column("created_at", _INT64, nullable=False),
        Column("updated_at", _INT64, nullable=False),
        # A short name: PostgreSQL's names have 63 bytes, and the token table's may have 48.
        Index(f"{name}_expiry", "expires_at"),
        schema=schema,
        sqlite_strict=True,
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
    )


metadata = MetaData()
"""A ``MetaData`` that holds the tables under their default names."""

token_table(metadata)
values_table(metadata)
