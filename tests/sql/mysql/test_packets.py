"""Statements that are larger than the server's max_allowed_packet, and the errors of other limits of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from support.database import Place, app_engine, connection_of, source_of
from support.matrix import ROWS, Row, params
from tokenstore import (
    AuthTokenStore,
    BackendError,
    BackendUnavailableError,
    Keyring,
    LockTimeoutError,
    RowTooLargeError,
    TokenRecord,
    TokensNotStoredError,
    open_store,
)
from tokenstore_sql.connections.alchemy import AlchemyConnection
from tokenstore_sql.errors import ConnectionLostError
from tokenstore_sql.mysql.errors import MySQLErrors

mysql_rows = pytest.mark.parametrize("row", params(names=[row.name for row in ROWS if row.mark == "mysql"]))
mariadb_rows = pytest.mark.parametrize("row", params(names=["mariadb+aiomysql", "mariadb+asyncmy"]))

LIMIT = 65536
BIG = "b" * 100_000


@pytest.fixture
def place(row: Row, url: str) -> Place:
    return Place(row, url)


@contextmanager
def _setting(place: Place, name: str, value: float) -> Iterator[None]:
    """Change a setting of the server for new connections."""
    server = place.server()
    [[found]] = server.execute(f"SELECT @@GLOBAL.{name}")
    server.execute(f"SET GLOBAL {name} = {value}")
    try:
        yield
    finally:
        server.execute(f"SET GLOBAL {name} = {found}")


@pytest.fixture
def small(place: Place) -> Iterator[None]:
    with _setting(place, "max_allowed_packet", LIMIT):
        yield


async def _store(store: Any, access: str, user_id: str = "u1") -> None:
    await store.store_tokens("github", user_id, access, None, datetime.now(UTC) + timedelta(hours=1))


async def _access(store: Any, user_id: str = "u1") -> str | None:
    record = await store.load_tokens("github", user_id)
    return None if record is None else str(record["access_token"])


async def _refused(store: Any) -> None:
    with pytest.raises(BackendError, match="max_allowed_packet") as caught:
        await _store(store, BIG)
    assert type(caught.value) is RowTooLargeError
    assert str(LIMIT) in str(caught.value)
    assert "Raise max_allowed_packet at the server" in str(caught.value)
    assert BIG[:100] not in str(caught.value)


@mysql_rows
@pytest.mark.usefixtures("small")
def test_the_error_for_a_row_that_is_too_large_names_max_allowed_packet(place: Place, keyring: Keyring) -> None:
    """The statement is not sent, so the connection stays usable, and the next write succeeds."""

    async def main() -> None:
        async with open_store(place.url, keyring=keyring, pool_size=1) as store:
            await store.setup()
            for number in range(20):
                await _store(store, f"token {number}")
                async with connection_of(store) as before:
                    pass
                await _refused(store)
                async with connection_of(store) as after:
                    assert after is before
                assert await _access(store) == f"token {number}"
            with pytest.raises(BackendError, match="max_allowed_packet"):  # noqa: PT012
                async with store.transaction() as tx:
                    await _store(tx, "never")
                    await _store(tx, BIG)
            assert await _access(store) == "token 19"

    asyncio.run(main())


@mysql_rows
@pytest.mark.usefixtures("small")
def test_a_row_that_is_too_large_is_refused_on_an_application_s_engine(place: Place, keyring: Keyring) -> None:
    async def main() -> None:
        async with (
            app_engine(place, pool_size=1, max_overflow=0) as engine,
            open_store(engine, keyring=keyring, **place.options) as store,
        ):
            await store.setup()
            for number in range(20):
                await _store(store, f"token {number}")
                await _refused(store)
                assert await _access(store) == f"token {number}"
            async with AsyncSession(engine) as session:
                borrowed = AuthTokenStore(session, keyring=keyring, **place.options)
                async with session.begin():
                    await _store(borrowed, "in the application's transaction")
                    await _refused(borrowed)
                assert await _access(borrowed) == "in the application's transaction"
                await _refused(borrowed)
                await _store(borrowed, "after")
                assert await _access(borrowed) == "after"

    asyncio.run(main())


@mysql_rows
@pytest.mark.usefixtures("small")
def test_new_tokens_that_are_too_large_are_handed_over_at_once(place: Place, keyring: Keyring) -> None:
    """The claim is a small statement, so it is granted; the caller gets the only copy without 30 s of retries."""

    async def refresh(record: TokenRecord) -> dict[str, Any]:
        return {"access_token": BIG, "refresh_token": "ghr_2", "expires_in": 3600}

    async def main() -> None:
        store = open_store(place.url, keyring=keyring, refreshers={"github": refresh})
        await store.setup()
        await store.store_tokens("github", "u1", "old", "ghr_1", datetime.now(UTC) - timedelta(hours=1))
        async with asyncio.timeout(10):
            with pytest.raises(TokensNotStoredError) as caught:
                await store.load_fresh_tokens("github", "u1")
        assert (caught.value.record["access_token"], caught.value.record["refresh_token"]) == (BIG, "ghr_2")
        with pytest.raises(TokensNotStoredError):
            await store.aclose()

    asyncio.run(main())


@mysql_rows
@pytest.mark.usefixtures("small")
def test_a_row_is_refused_exactly_from_the_limit_on(place: Place, keyring: Keyring) -> None:
    """Rows of sizes around the limit are either stored, or refused with an error that names the setting."""

    async def main() -> None:
        async with (
            app_engine(place, pool_size=1, max_overflow=0) as engine,
            open_store(engine, keyring=keyring, **place.options) as over_engine,
            open_store(place.url, keyring=keyring, pool_size=1) as own,
        ):
            await own.setup()
            for store in (own, over_engine):
                outcomes = []
                # Escaping makes random bytes about 2.7 % longer.
                for size in [*range(62_000, 65_400, 170), *range(LIMIT - 400, LIMIT, 20)]:
                    try:
                        await _store(store, "b" * size)
                    except BackendError as error:
                        outcomes.append(error.code if "max_allowed_packet" in str(error) else str(error))
                    else:
                        outcomes.append(None)
                        assert await _access(store) == "b" * size
                assert set(outcomes) == {None, "2020"}

    asyncio.run(main())


@mysql_rows
@pytest.mark.usefixtures("small")
def test_rows_of_a_batch_that_is_too_large_are_sent_one_by_one(place: Place, keyring: Keyring) -> None:
    async def main() -> None:
        async with open_store(place.url, keyring=keyring, pool_size=4) as store:
            await store.setup()
            users = [f"u{number}" for number in range(30)]
            await asyncio.gather(*(_store(store, user_id + "b" * 20_000, user_id) for user_id in users))
            for user_id in users:
                assert await _access(store, user_id) == user_id + "b" * 20_000

    asyncio.run(main())


@mysql_rows
@pytest.mark.usefixtures("small")
def test_a_connection_that_the_server_closed_is_not_used_again(place: Place, keyring: Keyring) -> None:
    """The server's limit is not known yet; the server answers with error 1153 and closes the connection."""
    statement, parameters = text("SELECT LENGTH(:value)"), {"value": BIG.encode()}

    async def main() -> None:
        async with open_store(place.url, keyring=keyring, pool_size=1) as store:
            await store.setup()
            for number in range(10):
                async with connection_of(store) as connection:
                    connection.info.clear()
                    with pytest.raises(ConnectionLostError) as caught:
                        await connection.run(statement, parameters)
                    assert MySQLErrors().code(caught.value.orig) in ("1153", "2006", "2013")
                    assert connection.lost
                assert source_of(store).open == 0
                await _store(store, f"token {number}")
        async with app_engine(place, pool_size=1, max_overflow=0) as engine:
            for _ in range(10):
                async with engine.connect() as alchemy:
                    plain = await AlchemyConnection.of(alchemy, MySQLErrors(), pooled=True)
                    with pytest.raises(DBAPIError):
                        await plain.run(statement, parameters)
                async with engine.connect() as alchemy:
                    assert (await alchemy.execute(text("SELECT 1"))).scalar_one() == 1

    asyncio.run(main())


@mariadb_rows
def test_the_server_s_statement_time_limit_raises_a_timeout_error(place: Place, keyring: Keyring) -> None:
    async def main() -> None:
        async with open_store(place.url, keyring=keyring) as other:
            await other.setup()
            await _store(other, "old")
        with _setting(place, "max_statement_time", 0.3):
            async with open_store(place.url, keyring=keyring) as store, place.held():
                with pytest.raises(LockTimeoutError) as caught:
                    await _store(store, "new")
                assert caught.value.code == "1969"

    asyncio.run(main())


@mysql_rows
def test_a_user_s_connection_limit_raises_backend_unavailable_error(place: Place, keyring: Keyring) -> None:
    server, user, password = place.server(), f"app_{token_hex(4)}", token_hex(8)
    server.execute(f"CREATE USER {user} IDENTIFIED BY '{password}' WITH MAX_USER_CONNECTIONS 1")
    server.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE, CREATE, INDEX ON {server.database}.* TO {user}")
    url = make_url(place.url).set(username=user, password=password).render_as_string(hide_password=False)

    async def main() -> None:
        async with open_store(url, keyring=keyring) as store, connection_of(store):
            with pytest.raises(BackendUnavailableError, match="max_user_connections") as caught:
                await _store(store, "new")
            assert caught.value.code == "1226"

    try:
        asyncio.run(main())
    finally:
        server.execute(f"DROP USER {user}")


@pytest.mark.parametrize(
    ("number", "name", "ends"),
    [
        (1047, "BackendUnavailableError", True),
        (1180, "BackendUnavailableError", True),
        (1226, "BackendUnavailableError", True),
        (1969, "LockTimeoutError", False),
        (3024, "LockTimeoutError", False),
        (1153, "RowTooLargeError", True),
        (2020, "RowTooLargeError", False),
        (1406, "RowTooLargeError", False),
        (1118, "RowTooLargeError", False),
        *((number, "BackendUnavailableError", True) for number in (1152, *range(1154, 1162), 1835)),
        (1205, "LockTimeoutError", False),
        (1062, "ConflictError", False),
    ],
)
def test_error_numbers_decide_the_error_class_and_whether_the_connection_is_kept(
    number: int, name: str, ends: bool
) -> None:
    """After some errors the connection cannot be used any more."""
    error = Exception(number, "words")
    assert MySQLErrors().classify(error)[0].__name__ == name
    assert MySQLErrors().ends_connection(error) == ends
