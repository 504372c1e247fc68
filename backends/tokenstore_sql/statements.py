"""Every statement that touches the table, as SQLAlchemy Core; a dialect adds what only it can say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, ColumnElement, Select, Table, bindparam, delete, or_, select, tuple_, update

from tokenstore.records import TokenKey

if TYPE_CHECKING:
    from tokenstore_sql.dialect import Dialect

__all__ = ["Statements"]


def _micros(name: str) -> ColumnElement[int]:
    return bindparam(name, type_=BigInteger())


class Statements:
    """The statements for one table, built once.

    Parameters that name a row are ``p`` (provider) and ``u`` (user id); the rest is in each statement.
    """

    def __init__(self, table: Table, dialect: Dialect) -> None:
        self.table = table
        self.as_of = as_of = dialect.now().label("as_of")
        c, now = table.c, as_of.element
        this_row = (c.provider == bindparam("p"), c.user_id == bindparam("u"))
        this_version = (*this_row, c.generation == bindparam("g", type_=BigInteger()))
        held = (*this_version, c.lease_holder == bindparam("h"))
        columns = (
            c.provider,
            c.user_id,
            c.access_token,
            c.refresh_token,
            c.extra,
            c.access_token_expires_at,
            c.refresh_token_expires_at,
            c.key_id,
            c.generation,
            c.lease_holder,
            c.lease_expires_at,
            c.failure_code,
            c.retry_at,
            c.created_at,
            c.updated_at,
        )
        # SQLAlchemy 2.0 and 2.1 disagree on how to spell the type of a Select.
        unlocked: Any = select(*columns).where(*this_row)
        record: Any = select(*columns, as_of)
        self.get = record.where(*this_row)
        self.get_many = record.where(tuple_(c.provider, c.user_id).in_(bindparam("keys", expanding=True)))
        self.lock = dialect.lock_and_read(unlocked, as_of)

        sealed: dict[str, Any] = {
            name: bindparam(name) for name in ("access_token", "refresh_token", "extra", "key_id")
        }
        expiries = {name: _micros(name) for name in ("access_token_expires_at", "refresh_token_expires_at")}
        idle = {"lease_holder": None, "lease_expires_at": None, "failure_code": None, "retry_at": None}
        next_version = {**idle, "generation": c.generation + 1, "updated_at": now}
        self.put = dialect.upsert(
            table,
            {
                "provider": bindparam("p"),
                "user_id": bindparam("u"),
                **sealed,
                **expiries,
                "generation": bindparam("g", type_=BigInteger()),
                "created_at": now,
                "updated_at": now,
            },
            replaced=(*sealed, *expiries),
            also=next_version,
        )
        self.delete = delete(table).where(*this_row)
        claim = (
            update(table)
            .where(
                *this_version,
                c.lease_expires_at.is_(None) | (c.lease_expires_at <= now),
                # A failure without a time to retry holds until new tokens clear it: NULL <= now is not true.
                c.failure_code.is_(None) | (c.retry_at <= now),
            )
            .values(lease_holder=bindparam("h"), lease_expires_at=now + _micros("duration"))
        )
        self.claim = dialect.lock_first(claim, table, this_row)
        complete = (
            update(table)
            .where(
                *this_version,
                or_(c.lease_holder == bindparam("h"), c.lease_expires_at.is_(None), c.lease_expires_at <= now),
            )
            .values(**sealed, **expiries, **next_version)
        )
        self.complete = dialect.lock_first(complete, table, this_row)
        self.release = update(table).where(*held).values(**idle)
        fail = (
            update(table)
            .where(*held)
            .values({**idle, "failure_code": bindparam("code"), "retry_at": now + _micros("retry_in")})
        )
        self.fail = dialect.lock_first(fail, table, this_row)
        self.rewrap = update(table).where(*this_version).values(**sealed)
        # Changes nothing, yet takes the write lock of SQLite within a transaction that somebody else began.
        self.touch_nothing = update(table).where(c.generation.is_(None)).values(generation=c.generation)

    def scan(
        self, provider: str | None, user_id: str | None, after: TokenKey | None, limit: int
    ) -> Sequence[Select[Any]]:
        """The queries whose rows, one after the other up to the limit, are a page.

        After a key come first the rest of its provider's rows, then the later providers: two ranges of the primary
        key. MySQL does not use an index for the one comparison ``(provider, user_id) > (…)``.
        """
        c = self.table.c
        page: Any = select(
            c.provider,
            c.user_id,
            c.refresh_token.is_not(None).label("has_refresh_token"),
            c.access_token_expires_at,
            c.refresh_token_expires_at,
            c.key_id,
            c.generation,
            c.created_at,
            c.updated_at,
            self.as_of,
        ).limit(limit)
        if provider is not None:
            page = page.where(c.provider == provider)
        if user_id is not None:
            page = page.where(c.user_id == user_id)
        in_order = page.order_by(c.provider, c.user_id)
        if after is None:
            return [in_order]
        later = in_order.where(c.provider > after.provider)
        return [page.where(c.provider == after.provider, c.user_id > after.user_id).order_by(c.user_id), later]
