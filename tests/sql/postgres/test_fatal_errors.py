"""Fatal errors, after which the server closes the connection, whatever their SQLSTATE is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from secrets import token_hex
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from support import servers
from support.database import source_of
from support.matrix import Row, params
from tokenstore import AuthTokenStore, BackendUnavailableError, Keyring, LockTimeoutError, open_store
from tokenstore_sql.postgres.errors import PostgresErrors

both_drivers = pytest.mark.parametrize("row", params(names=["postgresql+asyncpg", "postgresql+psycopg"]))
either_source = pytest.mark.parametrize("source", ["url", "engine"])


class _Diagnosis:
    """The diagnosis of an error as psycopg provides it."""

    def __init__(self, severity: str | None) -> None:
        self.severity = "SCHWERWIEGEND"
        self.severity_nonlocalized = severity


class _Answer(Exception):
    """An error as a driver raises it."""

    def __init__(self, code: str, **attributes: Any) -> None:
        super().__init__()
        self.sqlstate = code
        vars(self).update(attributes)


@pytest.mark.parametrize("code", ["40001", "55P03", "42P01", "XX000", "25P04", "57014"])
def test_the_severity_decides_whether_the_connection_is_kept(code: str) -> None:
    ends = PostgresErrors().ends_connection
    for severity in ("FATAL", "PANIC"):
        assert ends(_Answer(code, severity_en=severity, severity="SCHWERWIEGEND"))
        assert ends(_Answer(code, severity=severity))
        assert ends(_Answer(code, diag=_Diagnosis(severity)))
        wrapped = _Answer(code)
        wrapped.__cause__ = _Answer(code, severity_en=severity)
        assert ends(wrapped)
    assert not ends(_Answer(code, severity_en="ERROR"))
    assert not ends(_Answer(code, diag=_Diagnosis("ERROR")))
    assert not ends(_Answer(code))


@pytest.mark.parametrize("code", ["25006", "25P03", "57P01", "57P03", "08006", "53300"])
def test_an_error_of_an_unavailable_server_ends_the_connection_at_any_severity(code: str) -> None:
    assert PostgresErrors().ends_connection(_Answer(code, severity_en="ERROR"))


@contextmanager
def _database(driver: str, **settings: str) -> Iterator[str]:
    """Create a database with these settings; yield its URL."""
    server, name = servers.postgres(), f"fatal_{token_hex(4)}"
    server.execute(f"CREATE DATABASE {name}")
    try:
        for setting, value in settings.items():
            server.execute(f"ALTER DATABASE {name} SET {setting} = '{value}'")
        yield server.url(driver, name)
    finally:
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@either_source
@both_drivers
def test_a_connection_is_not_used_again_after_a_fatal_error(row: Row, source: str, keyring: Keyring) -> None:
    """With `exit_on_error` each error is fatal. After a lock timeout, the next call gets another connection."""

    async def main(url: str) -> None:
        async with AsyncExitStack() as stack:
            opened: Any = f"{url}?pool_size=1"
            if source == "engine":
                opened = create_async_engine(url, pool_size=1, max_overflow=0)
                stack.push_async_callback(opened.dispose)
            store = await stack.enter_async_context(open_store(opened, keyring=keyring, lock_timeout=0.2))
            other = await stack.enter_async_context(open_store(url, keyring=keyring))
            await store.setup()
            for _ in range(3):
                await store.store_tokens("github", "u1", "old", None, None)
                await store.store_tokens("github", "u2", "old", None, None)
                async with other.transaction() as held:
                    assert await held.load_tokens("github", "u1", for_update=True) is not None
                    with pytest.raises(LockTimeoutError) as caught:
                        async with store.transaction() as tx:
                            await tx.load_tokens("github", "u1", for_update=True)
                    assert caught.value.code == "55P03"
                    await store.store_tokens("github", "u2", "new", None, None)
                    assert source_of(store).in_use == 0

    with _database(row.name.partition("+")[2], exit_on_error="on") as url:
        asyncio.run(main(url))


async def _slow_transaction(store: AuthTokenStore) -> None:
    async with store.transaction() as tx:
        assert await tx.load_tokens("github", "u1", for_update=True) is not None
        await asyncio.sleep(0.6)  # longer than the server allows
        await tx.store_tokens("github", "u1", "new", None, None)


@both_drivers
def test_the_connection_of_a_transaction_that_was_idle_too_long_is_discarded(row: Row, keyring: Keyring) -> None:
    """The server ends the session between two statements; the caller gets an error of tokenstore."""

    async def main(url: str) -> None:
        async with open_store(url, keyring=keyring, pool_size=1) as store:
            await store.setup()
            await store.store_tokens("github", "u1", "old", None, None)
            with pytest.raises(BackendUnavailableError):
                await _slow_transaction(store)
            assert source_of(store).open == 0
            record = await store.load_tokens("github", "u1")
            assert record is not None
            assert record["access_token"] == "old"

    with _database(row.name.partition("+")[2], idle_in_transaction_session_timeout="300ms") as url:
        asyncio.run(main(url))
