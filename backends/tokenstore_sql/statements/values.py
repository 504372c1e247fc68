"""The statements on the table of values. What differs between databases comes from a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Integer, Select, Table, bindparam, case, delete, or_, select, update

from tokenstore_sql.statements.grammar import Grammar

__all__ = ["ValueStatements"]


class ValueStatements:
    """The statements for one table of values, built once.

    The parameters that name a row are ``g`` (group: the column ``namespace``) and ``n`` (name).

    Args:
        table: The table.
        grammar: The database's SQL.
    """

    def __init__(self, table: Table, grammar: Grammar) -> None:
        self.table = table
        self._now = now = grammar.now()
        c = table.c
        this_value = (c.namespace == bindparam("g"), c.name == bindparam("n"))
        this_version = c.version == bindparam("v", type_=BigInteger())
        columns = (
            c.namespace,
            c.name,
            c.value,
            c.key_id,
            c.expires_at,
            c.version,
            c.created_at,
            c.updated_at,
        )
        # SQLAlchemy 2.0 and 2.1 disagree on how to spell the type of a Select.
        live: Any = select(*columns).where(*this_value, self._is_live(c))
        self.get = live
        self.get_locked = grammar.for_update(live)
        self.take = grammar.take(table, this_value, self._is_live, columns)
        self.delete_version = delete(table).where(*this_value, this_version, self._is_live(c))

        sealed: dict[str, Any] = {name: bindparam(name) for name in ("value", "key_id")}
        # NULL as the time to live makes NULL: the value does not expire.
        expires_at = now + bindparam("ttl", type_=BigInteger())
        version = bindparam("v", type_=BigInteger())
        row: dict[str, Any] = {
            "namespace": bindparam("g"),
            "name": bindparam("n"),
            **sealed,
            "version": version,
            "expires_at": expires_at,
            "created_at": now,
            "updated_at": now,
        }
        self.insert = grammar.insert_if_absent(table, row, this_value)
        self.delete_if_expired = delete(table).where(*this_value, c.expires_at <= now)
        # An expired value counts as missing, whether or not it was purged. MySQL assigns in this order.
        created_at = case((c.expires_at <= now, now), else_=c.created_at)
        self.put = grammar.or_replace(
            grammar.insert(table).values(row),
            replaced=(*sealed, "version"),
            also={"created_at": created_at, "expires_at": expires_at, "updated_at": now},
        )
        self.delete_group = delete(table).where(c.namespace == bindparam("g"))
        self.expired: Any = (
            select(c.expires_at)
            .where(c.expires_at <= now)
            .order_by(c.expires_at)
            .limit(bindparam("limit", type_=Integer()))
        )
        self.delete_expired = delete(table).where(c.expires_at <= bindparam("until", type_=BigInteger()))
        self.rewrap = update(table).where(*this_value, this_version).values(**sealed)

    def _is_live(self, columns: Any) -> ColumnElement[bool]:
        """The condition that a value has not expired."""
        return or_(columns.expires_at.is_(None), columns.expires_at > self._now)

    @cache  # noqa: B019 - four at most, and they live as long as the store
    def scan(self, *, by_group: bool, after: bool) -> Sequence[Select[Any]]:
        """The queries whose rows, one query after the other up to ``limit``, are a page.

        As in :meth:`tokenstore_sql.statements.statements.Statements.scan`, a page that begins after a key (``after_g``,
        ``after_n``) is ranges of the primary key: the group's later names, then later groups.
        """
        c = self.table.c
        page: Any = (
            select(c.namespace, c.name, c.expires_at, c.key_id, c.created_at, c.updated_at)
            .where(self._is_live(c))
            .limit(bindparam("limit", type_=Integer()))
        )
        # Without a group, all but the row that has the version of the tables.
        page = page.where(c.namespace == bindparam("g") if by_group else c.namespace > "")
        if not after:
            return [page.order_by(c.namespace, c.name)]
        of_group = page.where(c.namespace == bindparam("after_g"), c.name > bindparam("after_n")).order_by(c.name)
        if by_group:
            return [of_group]
        return [of_group, page.where(c.namespace > bindparam("after_g")).order_by(c.namespace, c.name)]
