"""A store reaches a server of its own machine by a Unix socket."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import make_url

from support.database import Place
from support.matrix import server_rows
from support.tagged_tokens import load_tag, store_tag
from tokenstore import BackendUnavailableError, Keyring, open_store


@server_rows
def test_a_store_reaches_its_server_by_a_unix_socket(place: Place, keyring: Keyring) -> None:
    """The port that the URL names is closed, where the driver needs none to find the socket."""
    url = make_url(place.url)
    if place.row.mark == "postgres":
        [[folder]] = place.server().execute("SHOW unix_socket_directories")
        # The port is a part of the socket's name.
        url = url.set(host="").update_query_dict({"host": str(folder)})
    else:
        [[file]] = place.server().execute("SELECT @@socket")
        url = url.set(host="localhost", port=1).update_query_dict({"unix_socket": str(file)})

    async def main() -> None:
        async with open_store(url.render_as_string(hide_password=False), keyring=keyring) as store:
            await store.setup()
            await store_tag(store, "by-socket")
            assert await load_tag(store) == "by-socket"
        async with open_store(place.url, keyring=keyring) as by_network:
            assert await load_tag(by_network) == "by-socket"

    asyncio.run(main())


@server_rows
def test_a_socket_that_does_not_exist_is_an_outage(place: Place, keyring: Keyring) -> None:
    option = "host" if place.row.mark == "postgres" else "unix_socket"
    url = make_url(place.url).set(host="").update_query_dict({option: "/nonexistent/socket"})

    async def main() -> None:
        async with open_store(url.render_as_string(hide_password=False), keyring=keyring) as store:
            with pytest.raises(BackendUnavailableError):
                await load_tag(store)

    asyncio.run(main())
