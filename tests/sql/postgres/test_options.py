"""The options of libpq are passed to the driver."""

from __future__ import annotations

import asyncio
import time

import pytest
from sqlalchemy import make_url

from support.database import Place
from support.matrix import postgres_rows
from support.tagged_tokens import load_tag
from tokenstore import BackendUnavailableError, ConfigurationError, Keyring, open_store


@postgres_rows
def test_libpq_s_options_are_passed_to_the_driver(place: Place, keyring: Keyring) -> None:
    """`sslmode=require` fails on a server without TLS, and the server shows the `application_name`."""

    async def main() -> None:
        async with open_store(place.url, keyring=keyring, sslmode="require") as store:
            with pytest.raises(BackendUnavailableError, match=r"(?i)SSL") as caught:
                await store.setup()
            assert str(make_url(place.engine_url).password) not in str(caught.value)
        async with open_store(place.url, keyring=keyring, sslmode="disable", application_name="shown-here") as store:
            await store.setup()
            await load_tag(store)
            query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shown-here'"
            assert await asyncio.to_thread(place.server().execute, query) == [(1,)]
        url = make_url(place.engine_url).set(host="192.0.2.1").render_as_string(hide_password=False)
        async with open_store(url, keyring=keyring, connect_timeout=1) as store:
            started = time.monotonic()
            with pytest.raises(BackendUnavailableError):
                await load_tag(store)
            assert time.monotonic() - started < 5

    asyncio.run(main())


@postgres_rows
def test_a_certificate_that_cannot_be_read_is_a_configuration_error(place: Place, keyring: Keyring) -> None:
    """An error that the driver raises before it connects is also mapped to an error of tokenstore."""

    async def main() -> None:
        async with open_store(
            place.url, keyring=keyring, sslmode="verify-full", sslrootcert="/nonexistent/root.crt"
        ) as store:
            with pytest.raises((ConfigurationError, BackendUnavailableError), match=r"root\.crt|SSL|file"):
                await store.setup()

    asyncio.run(main())
