"""Databases that cannot be reached, and connections that are lost."""

from __future__ import annotations

import asyncio
from secrets import token_hex

import pytest
from sqlalchemy import URL, make_url

from support import server_processes
from support.database import Place, is_whole, password_of
from support.error_text import assert_silent
from support.matrix import mysql_rows, postgres_rows, server_rows
from support.polling import until
from support.tagged_tokens import REFRESH, load_tag, opened, store_in_transaction, store_tag
from tokenstore import BackendError, BackendUnavailableError, Keyring, LoginRefusedError, open_store

ACCESS = "gho_plaintext_access"
SECRETS = (ACCESS, REFRESH)
WRONG = "a-wrong-password"


async def _errors_of_all_calls(url: URL, keyring: Keyring) -> list[BackendError]:
    """What each kind of call raises."""
    found = []
    async with open_store(url.render_as_string(hide_password=False), keyring=keyring) as store:
        for action in (store.setup(), store_tag(store, "new"), load_tag(store), store_in_transaction(store)):
            with pytest.raises(BackendError) as caught:
                await action
            found.append(caught.value)
    return found


@server_rows
def test_a_server_that_does_not_listen_is_unavailable(place: Place, keyring: Keyring) -> None:
    url = make_url(place.engine_url).set(port=server_processes.free_port(), password=WRONG)
    for error in asyncio.run(_errors_of_all_calls(url, keyring)):
        assert type(error) is BackendUnavailableError
        assert_silent(error, *SECRETS, WRONG)


@server_rows
@pytest.mark.parametrize("wrong", ["password", "user", "database"])
def test_a_refused_login_is_no_outage_and_tells_what_to_check(place: Place, wrong: str, keyring: Keyring) -> None:
    """Each call raises the same class at once, with the server's code, and with no password of the URL."""
    right = make_url(place.engine_url)
    changed: dict[str, URL] = {
        "password": right.set(password=WRONG),
        "user": right.set(username="no_such_user", password=WRONG),
        "database": right.set(database="no_such_database"),
    }
    advice = "check the database's name" if wrong == "database" else "check the user name and the password"
    codes = {"3D000", "1049"} if wrong == "database" else {"28P01", "1045"}
    for error in asyncio.run(_errors_of_all_calls(changed[wrong], keyring)):
        assert type(error) is LoginRefusedError
        assert advice in str(error)
        assert "cannot be reached" not in str(error)
        assert error.code in codes
        assert_silent(error, *SECRETS, WRONG, password_of(place))


@mysql_rows
def test_a_user_without_rights_on_the_database_is_told_so(place: Place, keyring: Keyring) -> None:
    server, user = place.server(), f"u_{token_hex(6)}"
    server.execute(f"CREATE USER {user} IDENTIFIED BY '{WRONG}'")
    try:
        url = make_url(place.engine_url).set(username=user, password=WRONG)
        for error in asyncio.run(_errors_of_all_calls(url, keyring)):
            assert (type(error), error.code) == (LoginRefusedError, "1044")
            assert "grant" in str(error)
            assert_silent(error, *SECRETS, WRONG)
    finally:
        server.execute(f"DROP USER {user}")


@postgres_rows
def test_a_role_that_may_not_log_in_is_told_so(place: Place, keyring: Keyring) -> None:
    server, role = place.server(), f"r_{token_hex(6)}"
    server.execute(f"CREATE ROLE {role} NOLOGIN PASSWORD '{WRONG}'")
    try:
        url = make_url(place.engine_url).set(username=role, password=WRONG)
        for error in asyncio.run(_errors_of_all_calls(url, keyring)):
            assert (type(error), error.code) == (LoginRefusedError, "28000")
            assert "pg_hba.conf" in str(error)
            assert_silent(error, *SECRETS, WRONG)
    finally:
        server.execute(f"DROP ROLE {role}")


async def _terminate_all(place: Place) -> None:
    """Terminate all sessions of the database, and wait until they have ended."""
    server = place.server()
    if place.row.mark == "postgres":
        query = (
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        assert all(ended for (ended,) in await asyncio.to_thread(server.execute, query))
        return
    query = "SELECT id FROM information_schema.processlist WHERE db = database() AND id <> connection_id()"
    rows = await asyncio.to_thread(server.execute, query)
    for (thread,) in rows:
        await asyncio.to_thread(server.execute, f"KILL {thread}")
    await until(lambda: not set(server.execute(query)) & set(rows))


@server_rows
def test_a_terminated_connection_fails_only_its_transaction(place: Place, keyring: Keyring) -> None:
    """The open transaction raises BackendUnavailableError and is not committed; later calls use a new connection."""

    async def main() -> None:
        async with opened(place, keyring) as store:
            with pytest.raises(BackendUnavailableError) as caught:  # noqa: PT012
                async with store.transaction() as tx:
                    await store_tag(tx, ACCESS)
                    await _terminate_all(place)
                    await load_tag(tx)
            assert_silent(caught.value, *SECRETS, password_of(place))
            with pytest.raises(BackendUnavailableError):  # noqa: PT012
                async with store.transaction() as tx:
                    await store_tag(tx, ACCESS)
                    await _terminate_all(place)
            assert await load_tag(store) == "old"
            await asyncio.gather(*(load_tag(store) for _ in range(5)))
            await _terminate_all(place)
            await store_tag(store, "new")
            assert await load_tag(store) == "new"
            assert is_whole(store)

    asyncio.run(main())
