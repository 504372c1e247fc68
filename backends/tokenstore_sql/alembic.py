"""What an application's ``env.py`` passes to Alembic, so that autogenerate treats the store's tables as they need it.

Both functions are arguments of ``context.configure()`` of the same name. They follow Alembic's rules, so they combine
with functions that the application has: ``include_object(...) and mine(...)``, ``render_item(...) or mine(...)``.
Alembic itself is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from tokenstore_sql.schema import AnyBlob, PostgresText, Utf8Binary

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext

__all__ = ["include_object", "render_item"]

# The tables may have any name, and may be of an older version of tokenstore, so these columns tell them from others.
_TOKEN_COLUMNS: Final = {"provider", "user_id", "access_token", "key_id", "generation", "lease_holder"}
_VALUE_COLUMNS: Final = {"namespace", "name", "value", "key_id", "version", "expires_at"}

_RENDERED: Final[Mapping[type, tuple[str, Callable[[Any], str]]]] = {
    Utf8Binary: ("mysql", lambda of: f"mysql.VARBINARY(length={of.impl.length})"),
    PostgresText: ("postgresql", lambda of: f"postgresql.TEXT(collation={of.collation!r})"),
    AnyBlob: ("sqlite", lambda _: "sqlite.BLOB()"),
}
"""From a type of :mod:`tokenstore_sql.schema` to SQLAlchemy's module of a database, and the type there."""


def include_object(object: Any, name: str | None, type_: str, reflected: bool, compare_to: Any) -> bool:  # noqa: A002
    """Keep autogenerate from dropping the store's tables where the application's ``MetaData`` does not have them.

    A table of tokens or of values is recognised by its columns, under any name and in any schema. Where the
    ``MetaData`` has it, autogenerate creates it and compares it as any other table.

    Args:
        object: What autogenerate found.
        name: Its name.
        type_: Its kind, such as ``"table"``.
        reflected: Whether it was read from the database.
        compare_to: The same object in the ``MetaData``; None: there is none.

    Returns:
        False for a table of the store that only the database has, and True for everything else.
    """
    return not (type_ == "table" and reflected and compare_to is None and _is_of_store(str(name), {*object.c.keys()}))


def render_item(type_: str, obj: object, autogen_context: AutogenContext) -> str | Literal[False]:
    """Write the column types of the store's tables as SQLAlchemy's own types, so that migrations need no tokenstore.

    The values in the columns are the same. The migration gets the import that the type needs through ``${imports}``,
    which every template of Alembic has.

    Args:
        type_: The kind of the object, such as ``"type"``.
        obj: What autogenerate renders.
        autogen_context: Alembic's state of this run.

    Returns:
        Python code for a type of the store's, and False for everything else, which Alembic then renders by itself.
    """
    if type_ != "type" or type(obj) not in _RENDERED:
        return False
    database, render = _RENDERED[type(obj)]
    autogen_context.imports.add(f"from sqlalchemy.dialects import {database}")
    return render(obj)


def _is_of_store(table: str, columns: set[str]) -> bool:
    return columns >= _TOKEN_COLUMNS or (columns >= _VALUE_COLUMNS and table.endswith("_values"))
