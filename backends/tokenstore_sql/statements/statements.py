"""The statements on one table. What differs between databases comes from a grammar."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Executable,
    Integer,
    Select,
    Table,
    and_,
    bindparam,
    case,
    delete,
    func,
    literal,
    literal_column,
    not_,
    null,
    or_,
    select,
    true,
    update,
)

from tokenstore.health import REFUSED, Status
from tokenstore.records import MAX_GENERATION, TokenKey
from tokenstore_sql.statements.grammar import KEY_PARAMETERS, Grammar, RecordColumns, key_columns

__all__ = ["Statements"]


# From the parameters of a write of tokens to the columns that get their values.
_PUT: Final[Mapping[str, str]] = {
    **KEY_PARAMETERS,
    "access_token": "access_token",
    "refresh_token": "refresh_token",
    "extra": "extra",
    "access_token_expires_at": "access_token_expires_at",
    "refresh_token_expires_at": "refresh_token_expires_at",
    "access_token_expiry_known": "access_token_expiry_known",
    "key_id": "key_id",
    "due_at": "due_at",
    "g": "generation",
}


def _number(name: str) -> ColumnElement[int]:
    return bindparam(name, type_=BigInteger())


class Statements:
    """The statements for one table, built once.

    The parameters that name a row are ``p`` (provider), ``u`` (user id) and ``a`` (account).

    Args:
        table: The table.
        grammar: The database's SQL.
    """

    def __init__(self, table: Table, grammar: Grammar) -> None:
        self.table = table
        self.grammar = grammar
        self._of_size: dict[tuple[str, int], Executable] = {}
        self.as_of = as_of = grammar.now().label("as_of")
        c, now = table.c, as_of.element
        this_row = tuple(column == bindparam(name) for name, column in key_columns(table).items())
        this_version = (*this_row, c.generation == bindparam("g", type_=BigInteger()))
        held = (*this_version, c.lease_holder == bindparam("h"))
        columns = RecordColumns(
            sealed=(c.access_token, c.refresh_token, c.extra, c.metadata),
            key=tuple(table.primary_key),
            texts=(c.key_id, c.metadata_key_id, c.lease_holder, c.failure_code),
            numbers=(
                c.access_token_expires_at,
                c.refresh_token_expires_at,
                c.access_token_expiry_known,
                c.generation,
                c.lease_expires_at,
                c.retry_at,
                c.created_at,
                c.updated_at,
            ),
        )
        # SQLAlchemy 2.0 and 2.1 disagree on how to spell the type of a Select.
        record: Any = grammar.read(columns, as_of)
        self.get = record.where(*this_row)
        self._record = record
        self.lock = grammar.lock_and_read(columns, as_of, this_row)
        self.clock = select(as_of)

        sealed: dict[str, Any] = {
            name: bindparam(name) for name in ("access_token", "refresh_token", "extra", "key_id")
        }
        expiries = {
            name: _number(name)
            for name in (
                "access_token_expires_at",
                "refresh_token_expires_at",
                "access_token_expiry_known",
                "due_at",
            )
        }
        idle = dict.fromkeys(("lease_holder", "lease_expires_at", "failure_code", "failed_at", "retry_at"), null())
        # For every generation that a store has written, the mask and coalesce() change nothing. They bring a row whose
        # generation was altered back into range, so that its user can log in again.
        in_range = func.coalesce(c.generation, literal_column("0")).bitwise_and(
            literal_column(str(MAX_GENERATION // 2 - 1))
        )
        next_version = {**idle, "generation": in_range + literal_column("1"), "updated_at": now}
        self._replaced, self._also = (*sealed, *expiries), next_version
        key: dict[str, Any] = {column: bindparam(name) for name, column in KEY_PARAMETERS.items()}
        written = {**key, **sealed, **expiries}
        own: dict[str, Any] = {name: bindparam(name) for name in ("metadata", "metadata_key_id")}
        first = {"generation": bindparam("g", type_=BigInteger()), "created_at": now, "updated_at": now}
        insert = grammar.insert(table).values({**written, **first})
        self._is_empty = is_empty = and_(c.key_id == literal_column("''"), c.access_token == grammar.no_bytes)
        self.put = grammar.or_replace(insert, replaced=self._replaced, also=self._also)
        with_metadata = grammar.insert(table).values({**written, **own, **first})
        self.put_with_metadata = grammar.or_replace(with_metadata, replaced=(*self._replaced, *own), also=self._also)
        self.insert = grammar.insert_if_absent(table, {**written, **own, **first}, this_row)
        self.fill = update(table).where(*this_row, is_empty).values(**sealed, **expiries, **own, **next_version)
        self.delete = delete(table).where(*this_row)
        claim = (
            update(table)
            .where(
                *this_version,
                c.lease_expires_at.is_(None) | (c.lease_expires_at <= now),
                # A failure without a time to retry holds until new tokens clear it: NULL <= now is not true.
                c.failure_code.is_(None) | (c.retry_at <= now),
            )
            .values(lease_holder=bindparam("h"), lease_expires_at=now + _number("duration"))
        )
        self.claim = grammar.lock_first(claim, table, this_row)
        complete = (
            update(table)
            .where(
                *this_version,
                or_(c.lease_holder == bindparam("h"), c.lease_expires_at.is_(None), c.lease_expires_at <= now),
            )
            .values(**sealed, **expiries, **next_version)
        )
        self.complete = grammar.lock_first(complete, table, this_row)
        self.complete_with_metadata = grammar.lock_first(complete.values(**own), table, this_row)
        self.release = update(table).where(*held).values(**idle)
        fail = (
            update(table)
            .where(*held)
            .values(
                {
                    **idle,
                    "failure_code": bindparam("code"),
                    "failed_at": now,
                    "retry_at": now + _number("retry_in"),
                    # A dead row leaves the index of due rows.
                    "due_at": case((_number("retry_in").is_not(None), c.due_at)),
                }
            )
        )
        self.fail = grammar.lock_first(fail, table, this_row)
        # As `SealedTokens.due_at` has it.
        due_again = case((c.refresh_token.is_not(None), c.access_token_expires_at))
        self.clear_failure = (
            update(table)
            .where(*this_row, c.failed_at <= func.coalesce(_number("as_of"), now) - _number("min_age"))
            # In this order: MySQL computes later values from earlier ones.
            .ordered_values(
                (c.due_at, case((c.retry_at.is_(None), due_again), else_=c.due_at)),
                (c.failure_code, null()),
                (c.failed_at, null()),
                (c.retry_at, null()),
            )
        )
        self.rewrap = update(table).where(*this_version).values(**sealed)
        # Two statements, because each database has an operator of its own for "equal, or both null".
        self.set_metadata = update(table).where(*this_row, c.metadata == bindparam("replacing")).values(**own)
        self.set_first_metadata = update(table).where(*this_row, c.metadata.is_(None)).values(**own)

    def get_many(self, keys: Sequence[TokenKey]) -> tuple[Executable, Mapping[str, Any]]:
        """The query for several rows, which come in no order, and its parameters."""
        if not self.grammar.any_number:
            # The number of keys is rounded up to a power of two by naming the last key again: few queries to compile.
            keys = [*keys, *[keys[-1]] * ((1 << (len(keys) - 1).bit_length()) - len(keys))]
        query = self._of("get", len(keys), lambda size: self.grammar.among(self._record, self.table, size))
        return query, self.grammar.together(tuple(KEY_PARAMETERS), keys)

    def put_many(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Executable, Mapping[str, Any]]:
        """The upsert of several rows, and its parameters; ``rows`` are the parameters of ``put`` for each row."""

        def upsert(size: int) -> Executable:
            inserted = self.grammar.insert_many(self.table, _PUT, self.as_of.element, size)
            made: Executable = self.grammar.or_replace(inserted, replaced=self._replaced, also=self._also)
            return made

        statement = self._of("put", len(rows), upsert)
        return statement, self.grammar.together(tuple(_PUT), [[row[name] for name in _PUT] for row in rows])

    def _of(self, what: str, size: int, build: Callable[[int], Executable]) -> Executable:
        """The statement for that many rows: the same object each time, because statements are compiled by identity."""
        place = (what, 0 if self.grammar.any_number else size)
        if (statement := self._of_size.get(place)) is None:
            statement = self._of_size[place] = build(size)
        return statement

    @cache  # noqa: B019 - sixteen at most, and they live as long as the store
    def scan(
        self, *, by_provider: bool, by_user: bool, after: bool, with_metadata: bool = False
    ) -> Sequence[Select[Any]]:
        """The queries whose rows, one query after the other up to ``limit``, are a page.

        A page that begins after a key (``after_p``, ``after_u``, ``after_a``) is three ranges of the primary key: the
        user's later accounts, the provider's later users, then the rows of later providers. MySQL would not use the
        index for the one comparison ``(provider, user_id, account) > (…)``.

        Args:
            by_provider: Only rows of the provider ``p``.
            by_user: Only rows of the user ``u``.
            after: Only rows after a key.
            with_metadata: Whether the sealed metadata is the last column.
        """
        c = self.table.c
        page: Any = select(
            c.provider,
            c.user_id,
            c.account,
            c.refresh_token.is_not(None).label("has_refresh_token"),
            and_(c.refresh_token.is_(None), c.due_at.is_not(None)).label("issued"),
            c.access_token_expires_at,
            c.refresh_token_expires_at,
            c.access_token_expiry_known,
            c.key_id,
            c.generation,
            c.created_at,
            c.updated_at,
            self.as_of,
            c.failure_code,
            c.failed_at,
            c.retry_at,
            c.lease_expires_at,
            c.metadata_key_id,
            *([c.metadata] if with_metadata else ()),
        ).limit(bindparam("limit", type_=Integer()))
        page = page.where(not_(self._is_empty))
        if by_provider:
            page = page.where(c.provider == bindparam("p"))
        if by_user:
            page = page.where(c.user_id == bindparam("u"))
        if not after:
            return [page.order_by(c.provider, c.user_id, c.account)]
        of_provider = page.where(c.provider == bindparam("after_p"))
        of_user = of_provider.where(c.user_id == bindparam("after_u"))
        return [
            of_user.where(c.account > bindparam("after_a")).order_by(c.account),
            of_provider.where(c.user_id > bindparam("after_u")).order_by(c.user_id, c.account),
            page.where(c.provider > bindparam("after_p")).order_by(c.provider, c.user_id, c.account),
        ]

    @cache  # noqa: B019 - two hundred at most, and they live as long as the store
    def search(
        self,
        *,
        by_provider: bool,
        by_user: bool,
        after: bool,
        status: bool,
        expiring: bool,
        prefix: bool,
        open_end: bool,
        with_metadata: bool,
    ) -> Sequence[Select[Any]]:
        """The queries of :meth:`scan`, which read up to ``limit`` rows each, restricted to the rows that are searched.

        The last two columns of a row are whether it was found, and its place among the rows that were read. The row at
        the place ``limit`` is always there, because the next page begins after it.

        Args:
            by_provider: As for :meth:`scan`.
            by_user: As for :meth:`scan`.
            after: As for :meth:`scan`.
            status: Only rows of ``status``, where a token is expiring for ``margin`` microseconds.
            expiring: Only rows that expire within ``within`` microseconds.
            prefix: Only users from ``user_from`` on.
            open_end: With ``prefix``: all of them; else those before ``user_to``.
            with_metadata: As for :meth:`scan`.
        """
        return [
            self._found(
                page,
                status=status,
                expiring=expiring,
                prefix=prefix,
                open_end=open_end,
                with_metadata=with_metadata,
            )
            for page in self.scan(by_provider=by_provider, by_user=by_user, after=after)
        ]

    def _found(
        self, page: Any, *, status: bool, expiring: bool, prefix: bool, open_end: bool, with_metadata: bool
    ) -> Select[Any]:
        read = page.subquery("page")
        place = func.row_number().over(order_by=[read.c.provider, read.c.user_id, read.c.account])
        row = select(read, place.label("place")).subquery("placed").c
        conditions: list[ColumnElement[bool]] = []
        if status:
            conditions.append(_status(row) == bindparam("status"))
        if expiring:
            conditions.append(row.access_token_expires_at <= row.as_of + _number("within"))
        if prefix:
            conditions.append(row.user_id >= bindparam("user_from"))
            if not open_end:
                conditions.append(row.user_id < bindparam("user_to"))
        found = case((and_(true(), *conditions), literal_column("1")), else_=literal_column("0")).label("found")
        columns = [row[column.name] for column in read.c]
        if with_metadata:
            # By a query of its own for each row that is found: the rows that are only read would fill the memory.
            c = self.table.c
            this_row = [c[name] == row[name] for name in KEY_PARAMETERS.values()]
            columns.append(select(c.metadata).where(*this_row).scalar_subquery().label("metadata"))
        last = row.place == bindparam("limit", type_=Integer())
        query: Any = select(*columns, found, row.place).where(or_(and_(true(), *conditions), last))
        placed: Select[Any] = query.order_by(row.place)
        return placed

    @cache  # noqa: B019 - two at most, and they live as long as the store
    def scan_due(self, *, after: bool) -> Sequence[Select[Any]]:
        """The queries whose rows, one query after the other up to ``limit``, are a page of due rows.

        The parameters are the provider ``p``, and ``as_of`` (null: the clock) and ``within``, both in microseconds. A
        page that begins after a position (``after_d``, ``after_u``, ``after_a``) is three ranges of the index, as in
        :meth:`scan`.
        """
        c = self.table.c
        # Not `now`, which differs from row to row, so that no database searches an index for times before it.
        started = self.grammar.statement_start()
        until = func.coalesce(_number("as_of"), started) + _number("within")
        page: Any = (
            select(
                c.provider,
                c.user_id,
                c.account,
                c.due_at,
                c.access_token_expires_at,
                c.updated_at,
                started,
                self._is_empty.label("is_empty"),
            )
            .where(c.provider == bindparam("p"), c.due_at <= until)
            .limit(bindparam("limit", type_=Integer()))
        )
        if not after:
            return [page.order_by(c.due_at, c.user_id, c.account)]
        at_once = page.where(c.due_at == _number("after_d"))
        of_user = at_once.where(c.user_id == bindparam("after_u"))
        return [
            of_user.where(c.account > bindparam("after_a")).order_by(c.account),
            at_once.where(c.user_id > bindparam("after_u")).order_by(c.user_id, c.account),
            page.where(c.due_at > _number("after_d")).order_by(c.due_at, c.user_id, c.account),
        ]


def _status(row: Any) -> ColumnElement[str]:
    """:func:`tokenstore.health.status_of` as an expression."""
    now, expires_at = row.as_of, row.access_token_expires_at
    expired = expires_at <= now
    renewable = or_(row.issued, and_(row.has_refresh_token, func.coalesce(row.refresh_token_expires_at > now, true())))
    dead = and_(row.failure_code.is_not(None), row.retry_at.is_(None))
    failed = or_(dead, and_(row.failure_code.is_not(None), row.retry_at > now))
    refused = row.failure_code.startswith(REFUSED)
    statuses: Sequence[tuple[ColumnElement[bool], Status]] = (
        (or_(dead, and_(expired, not_(renewable))), "reauthorization_required"),
        (and_(failed, refused), "refused"),
        (row.lease_expires_at > now, "refreshing"),
        (failed, "retrying"),
        (expired, "expired"),
        (expires_at <= now + _number("margin"), "expiring"),
    )
    valid: Status = "valid"
    return case(*((condition, literal(status)) for condition, status in statuses), else_=literal(valid))
