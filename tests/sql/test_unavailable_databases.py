"""Databases that cannot be reached, and connections that are lost."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import make_url

from support import server_processes
from support.database import Place, is_whole, password_of
from support.error_text import assert_silent
from support.matrix import server_rows
from support.polling import until
from support.tagged_tokens import REFRESH, load_tag, opened, store_in_transaction, store_tag
from tokenstore import BackendUnavailableError, Keyring, open_store

ACCESS = "gho_plaintext_access"
SECRETS = (ACCESS, REFRESH)


@server_rows
@pytest.mark.parametrize("what", ["port", "password", "database"])
def test_the_error_for_an_unreachable_database_has_the_code_and_not_the_url(
    place: Place, what: str, keyring: Keyring
) -> None:
    """The port is closed, the password is wrong, or the database does not exist."""
    url = make_url(place.engine_url)
    secret = "a-wrong-password"
    changed = {
        "port": url.set(port=server_processes.free_port(), password=secret),
        "password": url.set(password=secret),
        "database": url.set(database="no_such_database"),
    }[what]

    async def main() -> None:
        async with open_store(changed.render_as_string(hide_password=False), keyring=keyring) as store:
            for action in (store.setup(), store_tag(store, "new"), load_tag(store), store_in_transaction(store)):
                with pytest.raises(BackendUnavailableError) as caught:
                    await action
                assert_silent(caught.value, *SECRETS, secret, password_of(place))
                if what != "port":
                    assert caught.value.code in ("28P01", "3D000", "08000", "1045", "1049", "1044")

    asyncio.run(main())


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
