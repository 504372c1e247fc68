"""A URL with several hosts: they are tried one by one until a connection to one that serves succeeds."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from secrets import token_hex

import pytest
from sqlalchemy import make_url

from support import servers
from support.database import Place, source_of
from support.error_text import assert_silent
from support.matrix import params
from support.silent_host import silent_host
from support.tagged_tokens import load_tag, store_tag
from tokenstore import BackendUnavailableError, ConfigurationError, Keyring, LoginRefusedError, open_store
from tokenstore_sql.connections.hosts import Host
from tokenstore_sql.mysql.hosts import hosts_of

both_drivers = pytest.mark.parametrize("row", params(names=["mariadb+aiomysql", "mariadb+asyncmy"]))

# Nothing listens there.
CLOSED = "127.0.0.1:1"


def _at(server: servers.Server) -> str:
    return f"{server.host}:{server.port}"


def _url(place: Place, *hosts: str) -> str:
    """The place's URL with these hosts in place of its own."""
    return _with_hosts(place.url, ",".join(hosts))


def _with_hosts(url: str, hosts: str) -> str:
    return re.sub("@[^/]*", f"@{hosts}", url)


@both_drivers
def test_a_host_that_refuses_connections_is_passed_over(place: Place, keyring: Keyring) -> None:
    """In the URL's place of the host, or as the option `host`."""
    hosts = (CLOSED, "[::1]:1", _at(place.server()))

    async def main() -> None:
        async with open_store(_url(place, *hosts), keyring=keyring) as store:
            await store.setup()
            await store_tag(store, "here")
        async with open_store(_url(place, ""), host=",".join(hosts), keyring=keyring) as store:
            assert await load_tag(store) == "here"

    asyncio.run(main())


@both_drivers
def test_a_host_that_never_answers_has_its_own_connect_timeout_and_is_tried_last_the_next_time(
    place: Place, keyring: Keyring
) -> None:
    """So it costs its time-out once, not with each new connection."""

    async def main() -> None:
        async with silent_host() as first, silent_host() as second:
            url = _url(place, first, second, _at(place.server()))
            async with open_store(place.url, keyring=keyring) as direct:
                await direct.setup()
            async with open_store(url, keyring=keyring, connect_timeout=2) as store:
                started = time.monotonic()
                await store_tag(store, "here")
                assert time.monotonic() - started > 4
                source_of(store).discard_idle()
                started = time.monotonic()
                assert await load_tag(store) == "here"
                assert time.monotonic() - started < 2

    asyncio.run(main())


@both_drivers
def test_if_no_host_answers_the_call_raises_backend_unavailable_error(place: Place, keyring: Keyring) -> None:
    async def main() -> None:
        async with (
            silent_host() as silent,
            open_store(_url(place, silent, CLOSED), keyring=keyring, connect_timeout=1) as store,
        ):
            with pytest.raises(BackendUnavailableError) as caught:
                await load_tag(store)
            assert_silent(caught.value, place.server().password)

    asyncio.run(main())


@both_drivers
def test_a_wrong_password_is_reported_and_not_tried_on_other_hosts(place: Place, keyring: Keyring) -> None:
    """The error says that the password is wrong, not that no server was reached."""
    url = _url(place, _at(place.server()), CLOSED).replace(place.server().password, "wrong")

    async def main() -> None:
        async with open_store(url, keyring=keyring) as store:
            with pytest.raises(LoginRefusedError, match="password"):
                await load_tag(store)

    asyncio.run(main())


@pytest.fixture(scope="module")
def other() -> servers.Server:
    """A second server, with databases of its own."""
    return servers.start_mariadb()


@pytest.fixture
def read_only(other: servers.Server) -> Iterator[Callable[[Place], str]]:
    """Makes the second server read-only, and returns a URL that names it before the first one."""
    user, password = f"app_{token_hex(4)}", token_hex(8)

    def url(place: Place) -> str:
        for server in (other, place.server()):
            server.execute(f"CREATE USER {user} IDENTIFIED BY '{password}'")
            server.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE, CREATE, INDEX ON {server.database}.* TO {user}")
        shared = make_url(place.url).set(username=user, password=password).render_as_string(hide_password=False)
        return shared.replace(f"@{_at(place.server())}", f"@{_at(other)},{_at(place.server())}")

    yield url
    for server in (other, servers.mariadb()):
        server.execute("SET GLOBAL read_only = 0")
        server.execute(f"DROP USER IF EXISTS {user}")


@both_drivers
def test_a_read_only_host_is_used_only_if_no_other_host_serves(
    place: Place, other: servers.Server, read_only: Callable[[Place], str], keyring: Keyring
) -> None:
    url = read_only(place)
    other.execute("SET GLOBAL read_only = 1")

    async def main() -> None:
        async with open_store(url, keyring=keyring) as store:
            await store.setup()
            await store_tag(store, "here")
        async with open_store(_with_hosts(url, f"{_at(other)},{CLOSED}"), keyring=keyring) as store:
            with pytest.raises(BackendUnavailableError, match="1290"):
                await store.setup()
        async with open_store(url, keyring=keyring) as store:
            assert await load_tag(store) == "here"

    asyncio.run(main())


@both_drivers
def test_a_write_to_a_server_that_became_read_only_goes_to_another_host(
    place: Place, other: servers.Server, read_only: Callable[[Place], str], keyring: Keyring
) -> None:
    """The server did nothing, so the write is sent again, once, over a new connection."""
    url = read_only(place)
    here, there = _at(place.server()), _at(other)

    async def main() -> None:
        for at in (here, there):
            async with open_store(_with_hosts(url, at), keyring=keyring) as direct:
                await direct.setup()
        async with open_store(url, keyring=keyring, pool_size=1) as store:
            await store_tag(store, "old")
            other.execute("SET GLOBAL read_only = 1")
            await store_tag(store, "new")
            assert await load_tag(store) == "new"
        for at, tag in ((here, "new"), (there, "old")):
            async with open_store(_with_hosts(url, at), keyring=keyring) as direct:
                assert await load_tag(direct) == tag

    asyncio.run(main())


def test_the_syntax_of_hosts() -> None:
    assert hosts_of("db1:3307,db2", 3306) == [Host("db1", 3307), Host("db2", 3306)]
    assert hosts_of("db1, [::1]:3307", None) == [Host("db1", None), Host("::1", 3307)]
    for wrong in ("", "db1,,db2", "db1:port", "::1", "[::1", "db1:3306:1", "db1:0", "/run/mysqld"):
        with pytest.raises(ConfigurationError, match="is no host"):
            hosts_of(wrong, None)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://u:p@a,,b/d", "is no host"),
        ("mysql://u:p@a:1,b:x/d", "is no host"),
        ("mysql://u:p@a,b/d?host=c", "pass the hosts once"),
        ("mysql://u:p@a,b/d?unix_socket=/run/s", "host and unix_socket"),
        ("sqlite://a,b/d", "no list of hosts"),
    ],
)
def test_urls_whose_hosts_are_wrong_are_refused(url: str, words: str, keyring: Keyring) -> None:
    with pytest.raises(ConfigurationError, match=words):
        open_store(url, keyring=keyring)
