"""Jobs of worker processes for a change of the tables: programs of one version and of the next, which is made up."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import BigInteger, Column, Index, Integer, MetaData, Table

from support.workers import Link
from tokenstore import AuthTokenStore, RefreshableRecord
from tokenstore.records import MigrationResult
from tokenstore_sql import migrations, operations, schema

__all__ = ["COLUMN", "TITLE", "become_next_version", "end_traffic", "migrate", "tokens_of", "traffic"]

COLUMN = "last_used_at"
TITLE = "a column for the time of the last use, and an index on it"

_END = ("control", "end")


async def become_next_version(link: Link) -> None:
    """Make this process a program of the next version, whose token table has a column and an index more."""
    of_this_version = schema.token_table

    def token_table(metadata: MetaData, name: str = schema.DEFAULT_TABLE, schema: str | None = None) -> Table:
        table = of_this_version(metadata, name, schema)
        column: Column[Any] = Column(COLUMN, BigInteger().with_variant(Integer(), "sqlite"))
        table.append_column(column)
        Index(f"{name}_by_use", column)
        return table

    for module in (schema, operations):
        module.token_table = token_table  # type: ignore[attr-defined]
    migrations.MIGRATIONS = (
        migrations.Migration(TITLE, columns=[("token table", COLUMN)], indexes=[("token table", "_by_use")]),
    )
    link.meet()


async def migrate(link: Link, url: str, dry_run: bool = False) -> MigrationResult:
    """Migrate the tables to this process's version."""
    (one, *_) = await link.open(url)
    link.meet()
    return await one.tokens.migrate(dry_run=dry_run)


async def traffic(link: Link, url: str, name: str, callers: int) -> dict[str, str]:
    """Let callers log users in, refresh and load, until a row says to end; return each user's last access token."""
    (one, *_) = await link.open(url)
    await _turn(one.tokens, name, 0)
    link.meet()

    async def call(user_id: str) -> str:
        turn, last = 0, ""
        while await one.tokens.load_tokens(*_END) is None:
            last = await _turn(one.tokens, user_id, turn)
            turn += 1
        return last

    users = [f"{name}-{number}" for number in range(callers)]
    return dict(zip(users, await asyncio.gather(*map(call, users)), strict=True))


async def end_traffic(link: Link, url: str) -> None:
    """Store the row that ends the traffic."""
    (one, *_) = await link.open(url)
    link.meet()
    await one.tokens.store_tokens(*_END, "end", None, None)


async def tokens_of(link: Link, url: str) -> dict[str, str]:
    """Return each user's access token, as this process opens it."""
    (one, *_) = await link.open(url)
    link.meet()
    users = [entry["user_id"] async for entry in one.tokens.list_tokens(provider="github")]
    records = [await one.tokens.load_tokens("github", user_id) for user_id in users]
    return {user_id: record["access_token"] for user_id, record in zip(users, records, strict=True) if record}


async def _turn(store: AuthTokenStore, user_id: str, turn: int) -> str:
    expired = datetime.now(UTC) - timedelta(hours=1)
    await store.store_tokens("github", user_id, f"login-{turn}", f"refresh-{turn}", expired)

    async def refresh(record: RefreshableRecord) -> Mapping[str, Any]:
        assert record["refresh_token"] == f"refresh-{turn}"
        return {"access_token": f"fresh-{turn}", "refresh_token": f"next-{turn}", "expires_in": 3600}

    record = await store.load_fresh_tokens("github", user_id, refresh=refresh)
    assert record is not None
    assert record["access_token"] == f"fresh-{turn}"
    await store.put_value("turns", user_id, turn)
    assert await store.pop_value("turns", user_id) == turn
    return record["access_token"]
