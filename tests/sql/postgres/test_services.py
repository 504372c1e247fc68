"""A service of libpq's connection service file names the server, as a psql user has it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import make_url

from support.database import Place
from support.matrix import postgres_rows
from support.tagged_tokens import load_tag, store_tag
from tokenstore import Keyring, TokenStoreError, open_store


@pytest.fixture
def service_file(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with one service, which names everything but the table."""
    server = make_url(place.engine_url)
    path = tmp_path / "pg_service.conf"
    path.write_text(
        "[tokens]\n"
        f"host={server.host}\nport={server.port}\ndbname={server.database}\n"
        f"user={server.username}\npassword={server.password}\n"
    )
    monkeypatch.setenv("PGSERVICEFILE", str(path))


def _url(place: Place) -> str:
    return f"{place.row.name}://?table={place.table}"


@postgres_rows
@pytest.mark.usefixtures("service_file")
def test_the_url_names_a_service(place: Place, keyring: Keyring) -> None:
    async def main() -> None:
        async with open_store(f"{_url(place)}&service=tokens", keyring=keyring) as store:
            await store.setup()
            await store_tag(store, "by-service")
            assert await load_tag(store) == "by-service"

    asyncio.run(main())


@postgres_rows
@pytest.mark.usefixtures("service_file")
def test_the_environment_names_a_service(place: Place, keyring: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `PGSERVICE` the URL is no more than the scheme."""
    monkeypatch.setenv("PGSERVICE", "tokens")

    async def main() -> None:
        async with open_store(_url(place), keyring=keyring) as store:
            await store.setup()
            await store_tag(store, "by-environment")
            assert await load_tag(store) == "by-environment"

    asyncio.run(main())


@postgres_rows
@pytest.mark.usefixtures("service_file")
def test_a_service_that_is_not_in_the_file_is_an_error(place: Place, keyring: Keyring) -> None:
    """Asyncpg would connect to this machine."""

    async def main() -> None:
        async with open_store(f"{_url(place)}&service=tokes", keyring=keyring) as store:
            await load_tag(store)

    with pytest.raises(TokenStoreError, match="tokes"):
        asyncio.run(main())
