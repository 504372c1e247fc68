"""A server that accepts no more connections."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from sqlalchemy import make_url

from support.database import Place, source_of
from support.matrix import Row, params
from tokenstore import BackendUnavailableError, Keyring, open_store

server_rows = pytest.mark.parametrize(
    "row", params(names=["postgresql+asyncpg", "postgresql+psycopg", "mariadb+aiomysql", "mariadb+asyncmy"])
)

_numbers = itertools.count()


async def _limited(row: Row, url: str, keyring: Keyring, connections: int) -> str:
    """Create the table, and a user with a limit of so many connections. Returns the table's URL for that user."""
    async with open_store(url, keyring=keyring) as owner:
        await owner.setup()
    place = Place(row, url)
    server, user = place.server(), f"limited_{next(_numbers)}_{place.table[-8:]}"
    for statement in (
        [
            f"CREATE ROLE {user} LOGIN PASSWORD 'secret' CONNECTION LIMIT {connections}",
            f"GRANT ALL ON {place.table} TO {user}",
        ]
        if place.row.mark == "postgres"
        else [
            f"CREATE USER {user} IDENTIFIED BY 'secret' WITH MAX_USER_CONNECTIONS {connections}",
            f"GRANT ALL ON {server.database}.* TO {user}",
        ]
    ):
        server.execute(statement)
    return make_url(place.url).set(username=user, password="secret").render_as_string(hide_password=False)


@server_rows
def test_a_call_waits_for_a_connection_of_the_pool(row: Row, url: str, keyring: Keyring) -> None:
    """A store may open eight connections, but the server accepts two: eight transactions wait and succeed."""

    async def main() -> None:
        limited = await _limited(row, url, keyring, 2)
        async with open_store(limited, keyring=keyring, pool_size=8) as store:

            async def transaction(number: int) -> None:
                async with store.transaction() as tx:
                    await tx.store_tokens("github", f"u{number}", "access", None, None)
                    await asyncio.sleep(0)

            await asyncio.gather(*(transaction(number) for number in range(8)))
            assert len([entry async for entry in store.list_tokens()]) == 8
            assert source_of(store).open <= 2
            assert source_of(store).in_use == 0

    asyncio.run(main())


@server_rows
def test_a_call_waits_until_another_client_closes_its_connection(row: Row, url: str, keyring: Keyring) -> None:
    """A store without any connection can connect once another process has disconnected."""

    async def main() -> None:
        limited = await _limited(row, url, keyring, 1)
        async with open_store(limited, keyring=keyring) as first, open_store(limited, keyring=keyring) as second:
            assert await first.load_tokens("github", "u1") is None
            waiting = asyncio.create_task(second.load_tokens("github", "u1"))
            await asyncio.wait([waiting], timeout=0.2)
            assert not waiting.done()
            await first.aclose()
            assert await waiting is None

    asyncio.run(main())


@server_rows
def test_the_wait_ends_with_pool_timeout(row: Row, url: str, keyring: Keyring) -> None:
    """The error has the server's error code."""

    async def main() -> None:
        limited = await _limited(row, url, keyring, 1)
        async with (
            open_store(limited, keyring=keyring) as first,
            open_store(limited, keyring=keyring, pool_timeout=0.5) as second,
        ):
            assert await first.load_tokens("github", "u1") is None
            started = asyncio.get_running_loop().time()
            with pytest.raises(BackendUnavailableError) as caught:
                await second.load_tokens("github", "u1")
            assert caught.value.code in ("53300", "08000", "1203", "1226")
            assert 0.4 <= asyncio.get_running_loop().time() - started < 10

    asyncio.run(main())
