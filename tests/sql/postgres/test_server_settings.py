"""Settings that an administrator gave the database change no stored value and no result."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from secrets import token_hex, token_urlsafe
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from support import servers
from support.matrix import Row, params
from tokenstore import (
    AuthTokenStore,
    BackendUnavailableError,
    Keyring,
    LockTimeoutError,
    UnsupportedOperationError,
    open_store,
)

both_drivers = pytest.mark.parametrize("row", params(names=["postgresql+asyncpg", "postgresql+psycopg"]))

SETTINGS = [
    {"bytea_output": "escape"},
    {"standard_conforming_strings": "off"},
    {"standard_conforming_strings": "off", "bytea_output": "escape", "backslash_quote": "off"},
    {"array_nulls": "off"},
    {
        "DateStyle": "German, DMY",
        "IntervalStyle": "sql_standard",
        "TimeZone": "Pacific/Kiritimati",
        "extra_float_digits": "-15",
        "lc_messages": "C",
        "client_min_messages": "debug1",
        "escape_string_warning": "off",
        "backslash_quote": "on",
    },
    {"client_encoding": "LATIN1"},
    {"client_encoding": "SQL_ASCII"},
    {"statement_timeout": "5s", "lock_timeout": "5s", "idle_in_transaction_session_timeout": "5s"},
    {"default_transaction_isolation": "serializable"},
    {"default_transaction_isolation": "repeatable read", "default_transaction_deferrable": "on"},
]
settings = pytest.mark.parametrize("settings", SETTINGS, ids="-".join)

# So many concurrent stores share statements. The names contain characters that psycopg and the server could parse
# differently.
_USERS = [f"u{number} \\x41\\\\ ' \" {{NULL,é}} 東京 %s :p" for number in range(64)] + ["NULL"]
_EXPIRY = datetime(2099, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


@contextmanager
def _database(settings: dict[str, str], driver: str) -> Iterator[str]:
    """Create a database with these settings; yield its URL."""
    server, name = servers.postgres(), f"settings_{token_hex(4)}"
    server.execute(f"CREATE DATABASE {name}")
    try:
        for setting, value in settings.items():
            listed = ", ".join(f"'{part.strip()}'" for part in value.split(","))
            server.execute(f"ALTER DATABASE {name} SET {setting} = {listed}")
        yield server.url(driver, name)
    finally:
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@asynccontextmanager
async def _engine(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url, pool_size=2, max_overflow=0)
    try:
        yield engine
    finally:
        await engine.dispose()


def _tokens(number: int) -> tuple[str, str | None]:
    """Make tokens; every third row has no refresh token."""
    return token_urlsafe(40), None if number % 3 == 0 else token_urlsafe(40)


async def _exercise(store: AuthTokenStore, users: list[str], seen_by: AuthTokenStore) -> None:
    """Store, load, list, lock, refresh and delete; a store without these settings must read the same."""
    rows = {user: _tokens(number) for number, user in enumerate(users)}
    await asyncio.gather(*(store.store_tokens("github", user, *rows[user], _EXPIRY, _EXPIRY) for user in users))
    for reader in (store, seen_by):
        # First one by one, then concurrently in few statements.
        loaded = [await reader.load_tokens("github", user) for user in users]
        loaded += await asyncio.gather(*(reader.load_tokens("github", user) for user in users))
        for user, record in zip([*users, *users], loaded, strict=True):
            assert record is not None
            assert (record["access_token"], record["refresh_token"]) == rows[user]
            assert record["access_token_expires_at"] == _EXPIRY
            assert abs(record["updated_at"] - datetime.now(UTC)) < timedelta(minutes=1)
        assert [entry["user_id"] async for entry in reader.list_tokens(page_size=20)] == sorted(users)
    async with store.transaction() as tx:
        record = await tx.load_tokens("github", users[1], for_update=True)
        assert record is not None
        assert record["access_token"] == rows[users[1]][0]
        await tx.store_tokens("github", users[1], "locked", None, None)
    assert await _access_token(seen_by, users[1]) == "locked"

    async def refresh(_: object) -> dict[str, object]:
        return {"access_token": "refreshed", "refresh_token": "next", "expires_in": 3600}

    refreshed = await store.load_fresh_tokens("github", users[2], refresh=refresh, force=True, force_min_age=0)
    assert refreshed is not None
    assert refreshed["access_token"] == await _access_token(seen_by, users[2]) == "refreshed"
    assert await store.delete_tokens("github", users[-1])
    assert await seen_by.load_tokens("github", users[-1]) is None


async def _access_token(store: Any, user: str, *, for_update: bool = False) -> str | None:
    record = await store.load_tokens("github", user, for_update)
    return None if record is None else str(record["access_token"])


async def _exercise_session(engine: AsyncEngine, users: list[str], keyring: Keyring) -> None:
    async with AsyncSession(engine) as session:
        store = AuthTokenStore(session, keyring=keyring)
        for number, user in enumerate(users[:10]):
            access, refresh = _tokens(number)
            await store.store_tokens("github", user, access, refresh, _EXPIRY)
            assert await _access_token(store, user, for_update=True) == access
        await session.rollback()


def _run(settings: dict[str, str], row: Row, keyring: Keyring, work: Callable[[str, AuthTokenStore], Any]) -> None:
    """Run ``work`` with a database with these settings, and with a store to which they do not apply."""
    with _database(settings, row.name.partition("+")[2]) as url:

        async def main() -> None:
            plain = url.replace("+psycopg", "+asyncpg")
            async with open_store(plain, keyring=keyring) as seen_by:
                await seen_by.setup()
                await work(url, seen_by)

        asyncio.run(main())


@settings
@both_drivers
def test_settings_change_no_result_of_a_store_by_url(row: Row, settings: dict[str, str], keyring: Keyring) -> None:
    async def work(url: str, seen_by: AuthTokenStore) -> None:
        async with open_store(url, keyring=keyring, pool_size=2) as store:
            await _exercise(store, _USERS, seen_by)

    _run(settings, row, keyring, work)


# With SQL_ASCII, psycopg returns bytes for text, so that SQLAlchemy cannot connect.
@pytest.mark.parametrize(
    "settings", [each for each in SETTINGS if each.get("client_encoding") != "SQL_ASCII"], ids="-".join
)
@both_drivers
def test_settings_change_no_result_on_an_application_s_engine_or_session(
    row: Row, settings: dict[str, str], keyring: Keyring
) -> None:
    """A connection whose encoding cannot represent every name is refused with an error that names the setting."""
    # asyncpg requests UTF8 by itself.
    refused = "client_encoding" in settings and row.name.endswith("psycopg")

    async def work(url: str, seen_by: AuthTokenStore) -> None:
        async with _engine(url) as engine, open_store(engine, keyring=keyring) as store:
            if not refused:
                await _exercise(store, _USERS, seen_by)
                await _exercise_session(engine, _USERS, keyring)
                return
            named = f"client_encoding is {settings['client_encoding']}"
            # One call after the other: with concurrent calls, some would still run when the first has failed.
            for call in (
                store.store_tokens("github", "u1", "access", None, None),
                store.load_tokens("github", "u1"),
                _exercise_session(engine, ["u1"], keyring),
            ):
                with pytest.raises(UnsupportedOperationError, match=named):
                    await call

    _run(settings, row, keyring, work)


@both_drivers
def test_limits_that_an_administrator_set_raise_errors_of_tokenstore(row: Row, keyring: Keyring) -> None:
    """The limits are a short statement timeout, and a database that accepts no writes."""

    async def impatient(url: str, seen_by: AuthTokenStore) -> None:
        async with open_store(url, keyring=keyring) as store:
            await seen_by.store_tokens("github", "u1", "old", None, None)
            async with seen_by.transaction() as tx:
                assert await _access_token(tx, "u1", for_update=True) == "old"
                with pytest.raises(LockTimeoutError):
                    await store.store_tokens("github", "u1", "new", None, None)
                assert await _access_token(store, "u1") == "old"

    _run({"statement_timeout": "300ms"}, row, keyring, impatient)
    with _database({"default_transaction_read_only": "on"}, row.name.partition("+")[2]) as url:
        asyncio.run(_without_a_table(url, keyring))


async def _without_a_table(url: str, keyring: Keyring) -> None:
    async with open_store(url, keyring=keyring) as store:
        with pytest.raises(BackendUnavailableError, match="accepts no writes"):
            await store.setup()
