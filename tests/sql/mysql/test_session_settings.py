"""Values are never executed as SQL, for any sql_mode, character set and time zone of the session.

The drivers write values into the SQL text. With some session settings the server parses that text differently, so that
a part of a user's id would be executed as SQL.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncSession

from support.database import Place, app_engine
from support.matrix import ROWS, Row, params
from tokenstore import AuthTokenStore, Keyring, UnsupportedOperationError, open_store
from tokenstore.records import TokenKey

mysql_rows = pytest.mark.parametrize("row", params(names=[row.name for row in ROWS if row.mark == "mysql"]))

# Each value ends its string literal with some session settings: without backslash escapes, or with a character set in
# which the last byte of the first character and the backslash are one character.
INJECTIONS = [
    "x' OR 1=1 -- ",
    "\u20ac' OR 1=1 -- ",
    "x\\' OR 1=1 -- ",
    "\\",
    "'",
    '"',
    '" OR 1=1 -- ',
    "x'; DELETE FROM t -- ",
]
ALL_BYTES = "".join(map(chr, range(1, 0x250)))
LONG = "access" + "a" * 16384


@pytest.fixture
def place(row: Row, url: str) -> Place:
    return Place(row, url)


async def _store(store: Any, user_id: str) -> None:
    # A sealed token of this size contains all byte values.
    extra = {"user": user_id, "all": ALL_BYTES}
    await store.store_tokens("github", user_id, LONG, None, datetime.now(UTC) + timedelta(hours=1), extra=extra)


async def _check(store: AuthTokenStore) -> None:
    """Make calls with each injection as the user id; they may only read, change and delete that user's row."""
    for user_id in INJECTIONS:
        assert await store.load_tokens("github", user_id) is None
        assert not await store.delete_tokens("github", user_id)
    for user_id in INJECTIONS:
        await _store(store, user_id)
    for user_id in INJECTIONS:
        record = await store.load_tokens("github", user_id)
        assert record is not None
        assert record["access_token"] == LONG
        assert record["extra"] == {"user": user_id, "all": ALL_BYTES}
        assert abs(record["updated_at"] - datetime.now(UTC)) < timedelta(seconds=30)
    assert [entry["user_id"] async for entry in store.list_tokens(user_id=INJECTIONS[0])] == [INJECTIONS[0]]
    many = await asyncio.gather(*(store.load_tokens("github", user_id) for user_id in INJECTIONS * 4))
    assert None not in many
    for user_id in INJECTIONS:
        assert await store.delete_tokens("github", user_id)
    await _check_rows(store)


async def _check_rows(store: AuthTokenStore) -> None:
    """Check that the rows of other users are unchanged."""
    assert [entry["user_id"] async for entry in store.list_tokens()] == ["u1", "u2"]
    for user_id in ("u1", "u2"):
        record = await store.load_tokens("github", user_id)
        assert record is not None
        assert record["access_token"] == LONG


@asynccontextmanager
async def _two_users(place: Place, keyring: Keyring) -> AsyncIterator[AuthTokenStore]:
    """Store the rows of two users; yield a store with its own connections to look at them."""
    async with open_store(place.url, keyring=keyring) as store:
        await store.setup()
        for user_id in ("u1", "u2"):
            await _store(store, user_id)
        yield store


@contextmanager
def _server_with(place: Place, **settings: str) -> Iterator[str]:
    """Yield a store's URL for a user whose new sessions get these settings from the server."""
    server, user, password = place.server(), f"app_{token_hex(4)}", token_hex(8)
    names = ", ".join(f"@@GLOBAL.{name}" for name in settings)
    [found] = server.execute(f"SELECT {names}")
    # init_connect is not for users with all privileges.
    server.execute(f"CREATE USER {user} IDENTIFIED BY '{password}'")
    server.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE, CREATE, INDEX ON {server.database}.* TO {user}")
    try:
        for name, value in settings.items():
            server.execute(f'SET GLOBAL {name} = "{value}"')
        yield make_url(place.url).set(username=user, password=password).render_as_string(hide_password=False)
    finally:
        for name, value in zip(settings, found, strict=True):
            server.execute(f"SET GLOBAL {name} = '{value}'")
        server.execute(f"DROP USER {user}")


@mysql_rows
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"init_connect": "SET sql_mode = 'NO_BACKSLASH_ESCAPES'"}, id="NO_BACKSLASH_ESCAPES"),
        pytest.param({"init_connect": "SET NAMES gbk"}, id="gbk"),
        pytest.param({"init_connect": "SET NAMES big5"}, id="big5"),
        pytest.param({"sql_mode": "NO_BACKSLASH_ESCAPES,ANSI_QUOTES"}, id="global"),
        pytest.param({"sql_mode": "ANSI_QUOTES", "init_connect": "SET time_zone = '-11:30'"}, id="ANSI_QUOTES"),
        pytest.param({"sql_mode": "PAD_CHAR_TO_FULL_LENGTH,IGNORE_SPACE,PIPES_AS_CONCAT"}, id="others"),
    ],
)
def test_a_store_s_own_sessions_have_known_settings(place: Place, settings: dict[str, str], keyring: Keyring) -> None:
    """The settings that the server gives to new sessions do not matter."""

    async def main() -> None:
        async with _two_users(place, keyring) as outside:
            with _server_with(place, **settings) as url:
                async with open_store(url, keyring=keyring) as store:
                    await store.setup()
                    await _check(store)
                    async with store.transaction() as tx:
                        assert not await tx.delete_tokens("github", INJECTIONS[0])
            await _check_rows(outside)

    asyncio.run(main())


@mysql_rows
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"init_command": "SET sql_mode = 'NO_BACKSLASH_ESCAPES'"}, "NO_BACKSLASH_ESCAPES"),
        ({"init_command": "SET sql_mode = 'ANSI_QUOTES,NO_BACKSLASH_ESCAPES'"}, "NO_BACKSLASH_ESCAPES"),
        *(({"charset": name}, name) for name in ("gbk", "big5", "cp932", "sjis")),
    ],
)
def test_an_application_s_session_with_unsafe_settings_is_refused(
    place: Place, arguments: dict[str, str], named: str, keyring: Keyring
) -> None:
    """The error is raised before a value is sent, and says which setting to change."""
    remedy = f"{named}.*(remove it from the sql_mode|charset=utf8mb4)"

    async def main() -> None:
        async with (
            _two_users(place, keyring) as outside,
            app_engine(place, connect_args=arguments) as engine,
            AsyncSession(engine) as session,
        ):
            store = open_store(engine, keyring=keyring, **place.options)
            borrowed = AuthTokenStore(session, keyring=keyring, **place.options)
            for each in (store, borrowed):
                for user_id in INJECTIONS:
                    with pytest.raises(UnsupportedOperationError, match=remedy):
                        await each.delete_tokens("github", user_id)
                    with pytest.raises(UnsupportedOperationError, match=named):
                        await each.load_tokens("github", user_id)
                    with pytest.raises(UnsupportedOperationError, match=named):
                        await _store(each, user_id)
            with pytest.raises(UnsupportedOperationError, match=named):
                async with store.transaction() as tx:
                    await tx.delete_tokens("github", INJECTIONS[0])
            await _check_rows(outside)

    asyncio.run(main())


@mysql_rows
def test_a_session_is_refused_while_its_sql_mode_is_not_safe(place: Place, keyring: Keyring) -> None:
    """The application changes the sql_mode between two calls."""

    async def main() -> None:
        async with (
            _two_users(place, keyring) as outside,
            app_engine(place, pool_size=1, max_overflow=0) as engine,
            AsyncSession(engine) as session,
            session.begin(),
        ):
            store = AuthTokenStore(session, keyring=keyring, **place.options)
            assert not await store.delete_tokens("github", INJECTIONS[0])
            await session.execute(text("SET sql_mode = 'NO_BACKSLASH_ESCAPES'"))
            with pytest.raises(UnsupportedOperationError, match="NO_BACKSLASH_ESCAPES"):
                await store.delete_tokens("github", INJECTIONS[0])
            await session.execute(text("SET sql_mode = ''"))
            assert not await store.delete_tokens("github", INJECTIONS[0])
            await _check_rows(store)
            await _check_rows(outside)

    asyncio.run(main())


@mysql_rows
@pytest.mark.parametrize(
    "arguments",
    [
        {"init_command": "SET sql_mode = 'ANSI_QUOTES'"},
        {"init_command": "SET time_zone = '+13:00'"},
        {"init_command": "SET sql_mode = ''"},
        {"charset": "latin1"},
        {"charset": "ujis"},
        {},
    ],
    ids=str,
)
def test_other_settings_of_an_application_s_session_change_no_result(
    place: Place, arguments: dict[str, str], keyring: Keyring
) -> None:
    async def main() -> None:
        async with (
            _two_users(place, keyring) as outside,
            app_engine(place, connect_args=arguments) as engine,
            AsyncSession(engine) as session,
        ):
            await _check(open_store(engine, keyring=keyring, **place.options))
            borrowed = AuthTokenStore(session, keyring=keyring, **place.options)
            for user_id in INJECTIONS:
                await _store(borrowed, user_id)
                assert await borrowed.load_tokens("github", user_id) is not None
                assert await borrowed.delete_tokens("github", user_id)
            there: Any = open_store(engine, keyring=keyring, **place.options)._backend
            here: Any = outside._backend
            key = TokenKey("github", "u1")
            assert await there.claim_lease(key, generation=(await here.get(key)).generation, holder="h", duration=10)
            for backend in (here, there):
                assert 5 < (await backend.get(key)).lease_expires_in <= 10

    asyncio.run(main())
