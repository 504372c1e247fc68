"""The SQL that tokenstore sends, as an application would write it for the driver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from benchmarks.tokens import SealedRow

__all__ = ["IDLE", "SQL", "WRITTEN"]

_READ: Final = (
    "provider, user_id, account, access_token, refresh_token, extra, access_token_expires_at, "
    "refresh_token_expires_at, access_token_expiry_known, key_id, generation, lease_holder, lease_expires_at, "
    "failure_code, retry_at, created_at, updated_at, metadata, metadata_key_id"
)
_READ_FOUR: Final = "access_token, refresh_token, access_token_expires_at, key_id"
_LISTED: Final = (
    "provider, user_id, account, refresh_token IS NOT NULL, access_token_expires_at, refresh_token_expires_at, "
    "access_token_expiry_known, key_id, generation, created_at, updated_at, failure_code, failed_at, retry_at, "
    "lease_expires_at, metadata_key_id"
)
WRITTEN: Final = (
    *("access_token", "refresh_token", "access_token_expires_at", "access_token_expiry_known", "due_at", "key_id"),
)
IDLE: Final = (
    *("extra", "refresh_token_expires_at", "lease_holder", "lease_expires_at", "failure_code", "failed_at", "retry_at"),
)
_NOW: Final = {
    "postgresql": "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS bigint)",
    "mysql": "CAST(UNIX_TIMESTAMP(SYSDATE(6)) * 1000000 AS SIGNED)",
    "sqlite": "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER) * 1000",
}
_MARKS: Final[dict[str, Callable[[int], str]]] = {
    "asyncpg": "${}".format,
    "psycopg": lambda _: "%s",
    "aiomysql": lambda _: "%s",
    "asyncmy": lambda _: "%s",
    "aiosqlite": lambda _: "?",
}


@dataclass(frozen=True)
class SQL:
    """The statements for one table, one dialect and one driver's style of parameters."""

    dialect: str
    driver: str
    table: str

    def _mark(self, number: int) -> str:
        return _MARKS[self.driver](number)

    @cached_property
    def load(self) -> str:
        """Read a row by (provider, user_id, account)."""
        one, two, three = map(self._mark, (1, 2, 3))
        this_row = f"provider = {one} AND user_id = {two} AND account = {three}"
        return f"SELECT {_READ} FROM {self.table} WHERE {this_row}"

    @cached_property
    def load_four(self) -> str:
        """Read four columns of a row in place of all of a record's."""
        return self.load.replace(_READ, _READ_FOUR, 1)

    @cached_property
    def lock(self) -> str:
        """Lock and read a row; on SQLite the transaction holds the database's write lock instead."""
        return self.load + {"postgresql": " FOR NO KEY UPDATE", "mysql": " FOR UPDATE"}.get(self.dialect, "")

    @cached_property
    def upsert(self) -> str:
        """Insert or replace a row; the parameters are the first ten fields of :class:`SealedRow`."""
        now = _NOW[self.dialect]
        columns = ("provider", "user_id", "account", *WRITTEN, "generation", "created_at", "updated_at")
        marks = ", ".join(map(self._mark, range(1, len(columns) - 1)))
        insert = f"INSERT INTO {self.table} ({', '.join(columns)}) VALUES ({marks}, {now}, {now})"
        if self.dialect == "mysql":
            new = [f"{column} = VALUES({column})" for column in WRITTEN]
            conflict = "ON DUPLICATE KEY UPDATE"
        else:
            new = [f"{column} = excluded.{column}" for column in WRITTEN]
            conflict = "ON CONFLICT (provider, user_id, account) DO UPDATE SET"
        new += [f"{column} = NULL" for column in IDLE]
        return f"{insert} {conflict} {', '.join(new)}, generation = {self.table}.generation + 1, updated_at = {now}"

    @cached_property
    def fill(self) -> str:
        """Insert a :class:`SealedRow`."""
        marks = ", ".join(map(self._mark, range(1, len(SealedRow._fields) + 1)))
        return f"INSERT INTO {self.table} ({', '.join(SealedRow._fields)}) VALUES ({marks})"

    @cached_property
    def due(self) -> str:
        """Read the first page of a provider's due rows; the parameters are the provider, the time and the limit."""
        one, two, three = map(self._mark, (1, 2, 3))
        read = "provider, user_id, account, due_at, access_token_expires_at, updated_at"
        where = f"provider = {one} AND due_at <= {two} ORDER BY due_at, user_id, account LIMIT {three}"
        return f"SELECT {read} FROM {self.table} WHERE {where}"

    @cached_property
    def scans(self) -> list[tuple[str, Callable[[str, str, str], tuple[str, ...]]]]:
        """The queries that read one page after a key, each with a function that makes its parameters from that key.

        The last parameter of each query is the limit.
        """
        one, two, three, four = map(self._mark, (1, 2, 3, 4))
        order = "provider, user_id, account"
        page = f"SELECT {_LISTED} FROM {self.table} WHERE"
        if self.dialect != "mysql":
            later = f"{page} ({order}) > ({one}, {two}, {three}) ORDER BY {order} LIMIT {four}"
            return [(later, lambda provider, user_id, account: (provider, user_id, account))]
        # Three queries, because MySQL does not use the index to compare (provider, user_id, account) as one value.
        of_user = f"{page} provider = {one} AND user_id = {two} AND account > {three} ORDER BY account LIMIT {four}"
        of_provider = f"{page} provider = {one} AND user_id > {two} ORDER BY user_id, account LIMIT {three}"
        others = f"{page} provider > {one} ORDER BY {order} LIMIT {two}"
        return [
            (of_user, lambda provider, user_id, account: (provider, user_id, account)),
            (of_provider, lambda provider, user_id, _: (provider, user_id)),
            (others, lambda provider, _user_id, _account: (provider,)),
        ]
