"""A row that somebody has altered in the database is refused. Other rows, and other users' calls, are not affected."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from support.database import Place, app_engine
from support.matrix import ROWS, Row, params, shared_rows
from tokenstore import AuthTokenStore, Keyring, RefreshableRecord, TamperedError, open_store
from tokenstore.records import TokenKey

MAX_INT64 = 2**63 - 1
ALTERED = "bobby"
KEY = ", ".join(TokenKey._fields)
OTHERS = ["alice", "carol"]
EXPIRED = datetime.now(UTC) - timedelta(hours=1)

NUMBERS: Mapping[str, Sequence[int]] = {
    "access_token_expires_at": (MAX_INT64, -MAX_INT64),
    "refresh_token_expires_at": (MAX_INT64,),
    "access_token_expiry_known": (7,),
    "generation": (MAX_INT64, -1),
    "lease_expires_at": (MAX_INT64,),
    "created_at": (MAX_INT64, -MAX_INT64),
    "updated_at": (MAX_INT64,),
}
TEXTS = {"key_id": "", "metadata_key_id": "", "lease_holder": "a\r\nholder", "failure_code": "\x1b[31mred"}
NOT_UTF8 = ("key_id", "metadata_key_id", "lease_holder", "failure_code")
NULLS = ("access_token", "key_id", "generation", "created_at")
NOT_LISTED = ("access_token", "metadata", "lease_holder")


def _alterations(row: Row) -> list[tuple[str, str]]:
    """A column, and the SQL of a value that no store writes into it."""
    found = [(column, str(value)) for column, values in NUMBERS.items() for value in values]
    literal = {"mysql": "x'{}'", "sqlite": "CAST(x'{}' AS TEXT)", "postgres": "convert_from('\\x{}', 'UTF8')"}[row.mark]
    found += [(column, literal.format(value.encode().hex()) if value else "''") for column, value in TEXTS.items()]
    found.append(("failure_code = 'timeout', retry_at", str(MAX_INT64)))
    found += [(column, "NULL") for column in NULLS]
    found.append(("metadata", {"mysql": "x'01'", "sqlite": "x'01'", "postgres": "'\\x01'"}[row.mark]))  # without a key
    if row.mark != "postgres":  # which refuses such text
        found += [(column, literal.format(value)) for column in NOT_UTF8 for value in ("61ff", "610062")]
    if row.mark == "sqlite":
        found += [("access_token", "'text'"), ("generation", "'text'"), ("lease_expires_at", "'text'"), ("key_id", "7")]
        found += [("metadata_key_id = 'k1', metadata", "'text'"), ("metadata_key_id", "7")]
    return found


class _Refresher:
    """Notes for whom it is called."""

    def __init__(self) -> None:
        self.users: list[str] = []

    async def __call__(self, record: RefreshableRecord) -> dict[str, Any]:
        self.users.append(record["user_id"])
        return {"access_token": "new", "refresh_token": "new", "expires_in": 3600}


@asynccontextmanager
async def _store(place: Place, kind: str, keyring: Keyring, refresher: _Refresher) -> AsyncIterator[AuthTokenStore]:
    refreshers = {"github": refresher}
    if kind == "url":
        async with open_store(place.url, keyring=keyring, refreshers=refreshers) as store:
            yield store
        return
    async with app_engine(place) as engine:
        if kind == "engine":
            async with open_store(engine, keyring=keyring, refreshers=refreshers, **place.options) as store:
                yield store
            return
        async with AsyncSession(engine) as session:
            yield AuthTokenStore(session, keyring=keyring, refreshers=refreshers, **place.options)


async def _without_constraints(place: Place) -> None:
    """Make the table accept anything, as one that an application's own migration created may do."""
    async with app_engine(place) as engine, engine.begin() as connection:
        if place.row.mark == "sqlite":
            columns = (
                await connection.execute(text(f"SELECT name, type FROM pragma_table_info('{place.table}')"))
            ).all()
            await connection.execute(text(f"DROP TABLE {place.table}"))
            declared = ", ".join(f"{name} {kind if kind == 'INTEGER' else 'BLOB'}" for name, kind in columns)
            await connection.execute(text(f"CREATE TABLE {place.table} ({declared}, PRIMARY KEY ({KEY}))"))
            return
        types = {
            "access_token": "MEDIUMBLOB",
            "key_id": "VARBINARY(32)",
            "generation": "BIGINT",
            "created_at": "BIGINT",
        }
        for column in NULLS:
            change = (
                f"MODIFY {column} {types[column]}" if place.row.mark == "mysql" else f"ALTER {column} DROP NOT NULL"
            )
            await connection.execute(text(f"ALTER TABLE {place.table} {change}"))


async def _prepare(place: Place, keyring: Keyring) -> None:
    async with open_store(place.url, keyring=keyring) as store:
        await store.setup()
        await _without_constraints(place)
        for user in (*OTHERS, ALTERED):
            await store.store_tokens("github", user, "access", "refresh", EXPIRED)


async def _alter(engine: AsyncEngine, place: Place, column: str, value: str, user: str = ALTERED) -> None:
    async with engine.begin() as connection:
        statement = f"UPDATE {place.table} SET {column} = {value} WHERE user_id = '{user}'"
        assert (await connection.execute(text(statement.replace(":", r"\:")))).rowcount == 1


async def _listed(store: AuthTokenStore, page_size: int) -> tuple[list[str], TamperedError | None]:
    listed = []
    try:
        async for entry in store.list_tokens(page_size=page_size):
            listed.append(entry["user_id"])  # noqa: PERF401 - what was listed before the error counts
    except TamperedError as error:
        return listed, error
    return listed, None


def _assert_is_refused(answer: object) -> None:
    assert isinstance(answer, TamperedError), repr(answer)
    assert ALTERED in str(answer)
    assert str(answer).isprintable()
    # Nothing that a driver or a decoder raised, which could show the value.
    assert answer.__cause__ is answer.__context__ is None


async def _check(store: AuthTokenStore, refresher: _Refresher, *, listed: bool, at_once: int) -> None:
    """Call the store for the altered row and for the others."""
    users = [*OTHERS, ALTERED] * at_once
    loads = [store.load_tokens("github", user) for user in users]
    if at_once > 1:  # so that they share a statement
        answers = await asyncio.gather(*loads, return_exceptions=True)
    else:  # a session carries out one call after the other
        answers = [(await asyncio.gather(load, return_exceptions=True))[0] for load in loads]
    for user, answer in zip(users, answers, strict=True):
        if user == ALTERED:
            _assert_is_refused(answer)
        else:
            assert isinstance(answer, dict), repr(answer)

    seen, error = await _listed(store, page_size=2)
    if listed:
        assert (seen, error) == (sorted([*OTHERS, ALTERED]), None)
    else:
        assert seen == OTHERS
        _assert_is_refused(error)

    if at_once > 1:
        for user in OTHERS:
            await store.store_tokens("github", user, "access", "refresh", EXPIRED)
        results = {result.user_id: result async for result in store.refresh_due(within=60)}
        assert {user: results[user].outcome for user in OTHERS} == dict.fromkeys(OTHERS, "refreshed")
        _assert_is_refused(results[ALTERED].error)
        with pytest.raises(TamperedError):
            await store.load_fresh_tokens("github", ALTERED)
    # Its refresh token was not spent: the database might refuse the new one.
    assert ALTERED not in refresher.users


@shared_rows
@pytest.mark.parametrize("kind", ["url", "engine", "session"])
def test_an_altered_row_is_refused_and_no_other_row_is(place: Place, kind: str, keyring: Keyring) -> None:
    """Loads that share a statement, the listing and the refresh of due rows all go on for the other users."""

    async def main() -> None:
        await _prepare(place, keyring)
        refresher = _Refresher()
        async with _store(place, kind, keyring, refresher) as store, app_engine(place) as engine:
            for column, value in _alterations(place.row):
                await _alter(engine, place, column, value)
                listed = column.rpartition(" ")[2] in NOT_LISTED
                try:
                    await _check(store, refresher, listed=listed, at_once=1 if kind == "session" else 8)
                except BaseException as error:
                    error.add_note(f"with {column} = {value}")
                    raise
                assert await store.delete_tokens("github", ALTERED)
                await store.store_tokens("github", ALTERED, "access", "refresh", EXPIRED)
                assert await store.load_tokens("github", ALTERED) is not None

    asyncio.run(main())


@shared_rows
def test_a_login_replaces_a_row_with_an_altered_generation(place: Place, keyring: Keyring) -> None:
    """The next generation is in range again: otherwise the database would refuse every later write of the row."""

    async def main() -> None:
        await _prepare(place, keyring)
        async with open_store(place.url, keyring=keyring) as store, app_engine(place) as engine:
            for generation in ("NULL", "-1", str(-MAX_INT64 - 1), str(MAX_INT64)):
                await _alter(engine, place, "generation", generation)
                for token in ("first", "second"):
                    await store.store_tokens("github", ALTERED, token, None, None)
                    loaded = await store.load_tokens("github", ALTERED)
                    assert loaded is not None
                    assert loaded["access_token"] == token

    asyncio.run(main())


@pytest.mark.parametrize("row", params(names=[row.name for row in ROWS if row.mark in ("sqlite", "mysql")]))
def test_a_row_whose_key_is_not_text_does_not_end_a_listing(place: Place, keyring: Keyring) -> None:
    """No query can begin behind such a key, so the next page begins before it."""

    async def main() -> None:
        literal = "x'{}'" if place.row.mark == "mysql" else "CAST(x'{}' AS TEXT)"
        await _prepare(place, keyring)
        refresher, sound = _Refresher(), sorted([*OTHERS, ALTERED])
        async with _store(place, "url", keyring, refresher) as store, app_engine(place) as engine:
            for number in range(3):
                await store.store_tokens("github", f"b{number}", "access", "refresh", EXPIRED)
                key = literal.format((b"b\xff" + b"%d" % number).hex())
                await _alter(engine, place, "user_id", key, user=f"b{number}")
            for page_size in (1, 2, 3, 500):
                seen, error = await _listed(store, page_size)
                assert seen == sound
                assert str(error).endswith("(2 more rows were altered)")
            results = [result async for result in store.refresh_due(within=60, page_size=2)]
        assert sorted(result.user_id for result in results if result.outcome == "refreshed") == sound
        escaped = sorted(result.user_id for result in results if result.outcome == "failed")
        assert escaped == [f"b\\udcff{number}" for number in range(3)]
        assert sorted(refresher.users) == sound

    asyncio.run(main())


@shared_rows
def test_a_row_with_an_impossible_due_time_does_not_end_a_sweep(place: Place, keyring: Keyring) -> None:
    """It is reported as altered, and the other rows are refreshed. A row without a due time is not found."""

    async def main() -> None:
        await _prepare(place, keyring)
        refresher = _Refresher()
        async with _store(place, "url", keyring, refresher) as store, app_engine(place) as engine:
            for value, page_size in ((-MAX_INT64, 1), (-MAX_INT64, 2), (-MAX_INT64, 500), ("NULL", 2)):
                for user in (*OTHERS, ALTERED):
                    await store.store_tokens("github", user, "access", "refresh", EXPIRED)
                await _alter(engine, place, "due_at", str(value))
                results = {result.user_id: result async for result in store.refresh_due(within=60, page_size=page_size)}
                altered = results.pop(ALTERED, None)
                assert (altered is None) == (value == "NULL")
                if altered is not None:
                    _assert_is_refused(altered.error)
                assert {user: result.outcome for user, result in results.items()} == dict.fromkeys(OTHERS, "refreshed")
        assert ALTERED not in refresher.users

    asyncio.run(main())
