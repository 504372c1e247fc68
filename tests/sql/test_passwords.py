"""The option ``password``: each new connection gets the password that is valid then, such as a short-lived one."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable, Iterator
from secrets import token_hex
from typing import Any

import pytest
from sqlalchemy import make_url

from support.database import Place
from support.matrix import each_server, server_rows
from support.tagged_tokens import load_tag, store_tag
from tokenstore import BackendUnavailableError, ConfigurationError, Keyring, LoginRefusedError, open_store


class _Account:
    """A user of the server whose password changes."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.name = f"iam_{token_hex(4)}"
        self.password = token_hex(16)
        self._is_postgres = place.row.mark == "postgres"
        server = place.server()
        if self._is_postgres:
            server.execute(f"CREATE ROLE {self.name} LOGIN PASSWORD '{self.password}'")
            server.execute(f"GRANT ALL ON SCHEMA public TO {self.name}")
        else:
            server.execute(f"CREATE USER {self.name} IDENTIFIED BY '{self.password}'")
            server.execute(f"GRANT ALL ON {server.database}.* TO {self.name}")

    @property
    def url(self) -> str:
        """The URL with this user, and without a password."""
        return make_url(self.place.url)._replace(username=self.name, password=None).render_as_string()

    def change_password(self) -> None:
        """Change it, and end the user's sessions, so that the next call has to connect."""
        self.password = token_hex(16)
        server = self.place.server()
        if self._is_postgres:
            server.execute(f"ALTER ROLE {self.name} PASSWORD '{self.password}'")
            server.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{self.name}'")
            return
        server.execute(f"ALTER USER {self.name} IDENTIFIED BY '{self.password}'")
        for (session,) in server.execute(f"SELECT id FROM information_schema.processlist WHERE user = '{self.name}'"):
            server.execute(f"KILL {session}")

    def drop(self) -> None:
        server = self.place.server()
        if self._is_postgres:
            server.execute(f"DROP OWNED BY {self.name} CASCADE")
            server.execute(f"DROP ROLE {self.name}")
        else:
            server.execute(f"DROP USER {self.name}")


@pytest.fixture
def account(place: Place) -> Iterator[_Account]:
    account = _Account(place)
    yield account
    account.drop()


@server_rows
@pytest.mark.parametrize("kind", ["async def", "def"])
def test_each_new_connection_gets_the_present_password(account: _Account, kind: str, keyring: Keyring) -> None:
    """The password is changed, and the old sessions end. A plain function runs in another thread than the loop's."""
    asked_in: list[int] = []

    def password() -> str:
        asked_in.append(threading.get_ident())
        return account.password

    async def password_of_a_service() -> str:
        await asyncio.sleep(0)
        return password()

    source: Any = password if kind == "def" else password_of_a_service

    async def main() -> None:
        async with open_store(account.url, keyring=keyring, password=source, pool_size=1) as store:
            assert not asked_in
            await store.setup()
            await store_tag(store, "before")
            before = len(asked_in)
            assert await load_tag(store) == "before"
            assert len(asked_in) == before  # the same connection
            await asyncio.to_thread(account.change_password)
            assert await load_tag(store) == "before"
            assert len(asked_in) > before
            await store_tag(store, "after")
            assert await load_tag(store) == "after"
            assert account.password not in repr(store)
        assert (threading.get_ident() in asked_in) is (kind == "async def")

    asyncio.run(main())


async def _hang() -> str:
    await asyncio.Event().wait()
    return ""


async def _fail() -> str:
    raise OSError("no credentials: s3cret")


async def _return_nothing() -> str:
    return ""


@each_server
@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        (_fail, BackendUnavailableError, "the callable `password` raised OSError$"),
        (_hang, BackendUnavailableError, "the callable `password` returned nothing within 1 s"),
        (_return_nothing, ConfigurationError, "must return a non-empty str, and returned str"),
        (lambda: b"bytes", ConfigurationError, "must return a non-empty str, and returned bytes"),
    ],
)
def test_a_callable_that_gives_no_password_is_a_clear_error(
    place: Place, source: Callable[[], Any], kind: type[Exception], words: str, keyring: Keyring
) -> None:
    """The error names the exception's type, because its text may contain a secret."""
    url = make_url(place.url)._replace(password=None).render_as_string()

    async def main() -> None:
        async with open_store(url, keyring=keyring, password=source, connect_timeout=1) as store:
            with pytest.raises(kind, match=words) as caught:
                await load_tag(store)
            assert "s3cret" not in "".join(traceback.format_exception(caught.value))

    asyncio.run(main())


@each_server
def test_a_wrong_password_is_a_refused_login(place: Place, keyring: Keyring) -> None:
    """No part of the error has the password. A fixed one may be given, too."""
    url = make_url(place.url)._replace(password=None).render_as_string()

    async def main() -> None:
        async with open_store(url, keyring=keyring, password="wr0ng-one") as store:
            with pytest.raises(LoginRefusedError) as caught:
                await load_tag(store)
            assert "wr0ng-one" not in "".join(traceback.format_exception(caught.value))

    asyncio.run(main())


@each_server
def test_a_password_is_given_once_and_is_a_text_or_a_callable(place: Place, keyring: Keyring) -> None:
    with pytest.raises(ConfigurationError, match="password: in the URL and as an option"):
        open_store(place.url, keyring=keyring, password="another")
    for wrong in ("", 5, None):
        with pytest.raises(ConfigurationError, match="password must be a non-empty str, or a callable") as caught:
            open_store(place.url, keyring=keyring, password=wrong)  # type: ignore[arg-type]
        assert str(make_url(place.url).password) not in str(caught.value)
