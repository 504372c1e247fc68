"""The option `host` with several hosts: they are tried one by one, in order, until a connection succeeds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from secrets import token_hex

import pytest

from support import servers
from support.database import source_of
from support.matrix import Row, params, row_named
from support.silent_host import silent_host
from tokenstore import (
    BackendUnavailableError,
    ConfigurationError,
    Keyring,
    LoginRefusedError,
    TableMissingError,
    open_store,
)
from tokenstore_sql.connections.hosts import Host
from tokenstore_sql.postgres.hosts import hosts_of

both_drivers = pytest.mark.parametrize("row", params(names=["postgresql+asyncpg", "postgresql+psycopg"]))


def _url(server: servers.Server, row: Row, *hosts: str) -> str:
    """Make a URL with its hosts only in the query."""
    url = server.url(row.name.partition("+")[2]).replace(f"@{server.host}:{server.port}", "@")
    return f"{url}?host={','.join(hosts)}&table=t_{token_hex(8)}"


def _at(server: servers.Server) -> str:
    return f"{server.host}:{server.port}"


@both_drivers
def test_each_host_that_never_answers_has_its_own_connect_timeout(row: Row, keyring: Keyring) -> None:
    async def main() -> None:
        async with silent_host() as first, silent_host() as second:
            url = _url(servers.postgres(), row, first, second, _at(servers.postgres()))
            async with open_store(url, keyring=keyring, connect_timeout=1, pool_size=1) as store:
                started = time.monotonic()
                await store.setup()
                await store.store_tokens("github", "u1", "here", None, None)
                record = await store.load_tokens("github", "u1")
                assert record is not None
                assert record["access_token"] == "here"
                assert time.monotonic() - started > 2  # the two hosts were tried before

    asyncio.run(main())


@both_drivers
def test_if_no_host_answers_the_call_raises_backend_unavailable_error(row: Row, keyring: Keyring) -> None:
    async def main() -> None:
        async with silent_host() as first, silent_host() as second:
            url = _url(servers.postgres(), row, first, second, "127.0.0.1:1")
            store = open_store(url, keyring=keyring, connect_timeout=1)
            with pytest.raises(BackendUnavailableError):
                await store.load_tokens("github", "u1")
            await store.aclose()

    asyncio.run(main())


@both_drivers
def test_a_wrong_password_is_reported_and_not_tried_on_other_hosts(row: Row, keyring: Keyring) -> None:
    """The error says that the password is wrong, not that no server was reached."""
    server = servers.postgres()
    url = _url(server, row, _at(server), _at(server)).replace(server.password, "wrong")

    async def main() -> None:
        async with open_store(url, keyring=keyring) as store:
            with pytest.raises(LoginRefusedError, match="password"):
                await store.load_tokens("github", "u1")

    asyncio.run(main())


@both_drivers
def test_target_session_attrs_chooses_the_primary_or_the_standby(
    row: Row, keyring: Keyring, start_postgres: Callable[..., servers.Server]
) -> None:
    """The hosts are a primary, its hot standby, and one that never answers; each option value is tested."""
    primary = start_postgres()
    standby = start_postgres(standby_of=primary)
    application = f"several_{token_hex(4)}"

    def asked() -> list[str]:
        """Return the servers to which the store is connected."""
        query = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{application}'"
        counts = {"primary": primary.execute(query), "standby": standby.execute(query)}
        return [name for name, [(count,)] in counts.items() if count]

    async def ask(silent: str, wanted: str | None, *hosts: servers.Server) -> list[str]:
        url = _url(primary, row, silent, *map(_at, hosts))
        options = "" if wanted is None else f"&target_session_attrs={wanted}"
        async with open_store(
            f"{url}{options}", keyring=keyring, connect_timeout=1, application_name=application
        ) as store:
            with pytest.raises(Exception, match="the table does not exist"):
                await store.load_tokens("github", "u1")
            return await asyncio.to_thread(asked)

    async def main() -> None:
        async with silent_host() as silent:
            for wanted in (None, "any"):
                assert await ask(silent, wanted, standby, primary) == ["standby"]
            for wanted in ("read-write", "primary"):
                assert await ask(silent, wanted, standby, primary) == ["primary"]
            for wanted in ("read-only", "standby", "prefer-standby"):
                assert await ask(silent, wanted, primary, standby) == ["standby"]
            assert await ask(silent, "prefer-standby", primary) == ["primary"]
            url = _url(primary, row, silent, _at(standby))
            async with open_store(f"{url}&target_session_attrs=primary", keyring=keyring, connect_timeout=1) as store:
                with pytest.raises(BackendUnavailableError):
                    await store.load_tokens("github", "u1")

    asyncio.run(main())


@both_drivers
def test_a_url_names_several_hosts_in_place_of_one(row: Row, keyring: Keyring) -> None:
    server = servers.postgres()
    url = server.url(row.name.partition("+")[2]).replace(f"@{_at(server)}", f"@127.0.0.1:1,{_at(server)}")

    async def main() -> None:
        async with open_store(f"{url}?table=t_{token_hex(8)}", keyring=keyring) as store:
            await store.setup()
            await store.store_tokens("github", "u1", "here", None, None)

    asyncio.run(main())


def test_asyncpg_tries_a_host_that_failed_last_the_next_time(keyring: Keyring) -> None:
    """So a host that never answers costs its time-out once, not with each new connection."""
    server = servers.postgres()

    async def main() -> None:
        async with silent_host() as silent:
            url = _url(server, row_named("postgresql+asyncpg"), silent, _at(server))
            async with open_store(url, keyring=keyring, connect_timeout=2) as store:
                took = []
                for _ in range(2):
                    started = time.monotonic()
                    with pytest.raises(TableMissingError):
                        await store.load_tokens("github", "u1")
                    took.append(time.monotonic() - started)
                    source_of(store).discard_idle()
                assert took[0] > 2 > took[1]

    asyncio.run(main())


def test_the_syntax_of_hosts() -> None:
    assert hosts_of("db1:5433,db2", 5432) == [Host("db1", 5433), Host("db2", 5432)]
    assert hosts_of("db1, db2", None) == [Host("db1", None), Host("db2", None)]
    assert hosts_of("[::1]:5433,[fe80::1]", 5432) == [Host("::1", 5433), Host("fe80::1", 5432)]
    assert hosts_of("/run/postgresql", 5432) == [Host("/run/postgresql", 5432)]
    for wrong in ("", "db1,,db2", "db1:port", "::1", "[::1", "db1:5432:1", "db1:0", "db1:65536"):
        with pytest.raises(ConfigurationError, match="is no host"):
            hosts_of(wrong, None)
