"""How many grants libraries lose that share tokens in a database: ``python -m benchmarks.grants``.

Run it in the root of the checkout. For each grant, several clients find the same expired access token at once. They
share nothing but a SQLite file, as clients in different processes would. Each client makes one request. The provider
issues a new refresh token with each refresh, and revokes a grant when a used refresh token comes back (RFC 9700 section
4.14.2). Each library is used in the way that its documentation describes, and then with tokenstore. No user is there:
a client that begins a login, as those of MCP do after a 401, gets no answer.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import logging
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, closing, contextmanager, nullcontext
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import fastmcp
import httpx2
import mcp
from authlib.integrations.httpx_client import AsyncOAuth2Client
from cryptography.fernet import Fernet
from fastmcp.client.auth import OAuth
from key_value.aio.protocols import AsyncKeyValue
from key_value.aio.stores.filetree import (
    FileTreeStore,
    FileTreeV1CollectionSanitizationStrategy,
    FileTreeV1KeySanitizationStrategy,
)
from key_value.aio.wrappers.encryption import FernetEncryptionWrapper
from mcp.client.auth import OAuthClientProvider, TokenStorage
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.auth import OAuthClientInformationFull, OAuthClientMetadata, OAuthToken
from pydantic import AnyUrl
from requests import Session
from requests_oauthlib import OAuth2Session
from rich.table import Table
from slack_bolt import BoltContext
from slack_bolt.authorization.authorize import InstallationStoreAuthorize
from slack_sdk.oauth.installation_store import Installation, InstallationStore
from slack_sdk.oauth.installation_store.sqlite3 import SQLite3InstallationStore
from slack_sdk.web import WebClient

from benchmarks.mcp_server import mcp_server
from benchmarks.report import console
from tokenstore import AuthTokenStore, Keyring, open_store, sync
from tokenstore.integrations.authlib import AsyncStoreOAuth2Client
from tokenstore.integrations.httpx2 import StoreAuth
from tokenstore.integrations.key_value import StoreKeyValue
from tokenstore.integrations.mcp import StoreOAuthProvider
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.requests import StoreAuth as StoreAuthOfRequests
from tokenstore.integrations.slack import SlackInstallationStore
from tokenstore.testing.provider import StrictRotatingProvider

_KEYRING = Keyring({"k1": bytes(32)})
_FERNET = Fernet(Fernet.generate_key())
_NAME = "acme"
_CALLBACK = "http://127.0.0.1:1/callback"
_METADATA = OAuthClientMetadata(redirect_uris=[AnyUrl(_CALLBACK)])
_LOGGER = logging.getLogger("benchmarks.grants")


class Place(NamedTuple):
    """Where the clients of one grant find their token, and what they call.

    Attributes:
        provider: The provider, whose ``/resource`` is called.
        front: What stands in front of the provider for some libraries: Slack's Web API, or an MCP server; else "".
        database: A SQLite file.
        user: The user.
    """

    provider: StrictRotatingProvider
    front: str
    database: Path
    user: str

    @property
    def resource(self) -> str:
        """What each client asks for."""
        return f"{self.provider.base_url}/resource"

    @property
    def client(self) -> dict[str, Any]:
        """The application at the provider."""
        return {"client_id": self.provider.client_id, "client_secret": self.provider.client_secret}

    @property
    def store(self) -> tuple[str, dict[str, Any]]:
        """The arguments of ``open_store``."""
        refresher = OAuth2Refresher(self.provider.token_url, **self.client)
        return f"sqlite:///{self.database}", {"keyring": _KEYRING, "refreshers": {_NAME: refresher, "slack": refresher}}


class Tokens:
    """A table of tokens as an application writes it: one row for each user."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def save(self, token: Mapping[str, Any], **_: object) -> None:
        """Store a user's token."""
        with self._connected() as connection:
            connection.execute("INSERT OR REPLACE INTO tokens VALUES (?, ?)", (self._place.user, json.dumps(token)))

    async def save_later(self, token: Mapping[str, Any], **_: object) -> None:
        """Store a user's token, as a library's callback."""
        self.save(token)

    def load(self) -> dict[str, Any]:
        """Read a user's token."""
        with self._connected() as connection:
            [text] = connection.execute("SELECT token FROM tokens WHERE user_id = ?", [self._place.user]).fetchone()
        token: dict[str, Any] = json.loads(text)
        return token

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._place.database, timeout=60, isolation_level=None)) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS tokens (user_id TEXT PRIMARY KEY, token TEXT)")
            yield connection


def _log_in(place: Place) -> dict[str, Any]:
    """A new grant, whose access token has expired."""
    issued = place.provider.new_grant(place.user)
    return {**issued, "access_token": "expired", "expires_in": -60, "expires_at": time.time() - 60}


def _begin_in_table(place: Place) -> None:
    Tokens(place).save(_log_in(place))


def _begin_in_store(place: Place) -> None:
    token = _log_in(place)
    with _opened_sync(place) as store:
        store.setup()
        expiry = datetime.fromtimestamp(token["expires_at"], UTC)
        store.store_tokens(_NAME, place.user, token["access_token"], token["refresh_token"], expiry)


async def _authlib(place: Place) -> bool:
    """https://docs.authlib.org/en/stable/oauth2/client/http/oauth2-session.html#refresh-auto-update-token."""
    tokens = Tokens(place)
    # Its published types do not say that it is a client of httpx2.
    opened: Any = AsyncOAuth2Client(
        **place.client, token_endpoint=place.provider.token_url, token=tokens.load(), update_token=tokens.save_later
    )
    async with opened as client:
        return bool((await client.get(place.resource)).status_code == 200)


async def _authlib_with_store(place: Place) -> bool:
    async with _opened(place) as store, AsyncStoreOAuth2Client(store, _NAME, place.user) as client:
        return bool((await client.get(place.resource)).status_code == 200)


def _requests_oauthlib(place: Place) -> bool:
    """https://requests-oauthlib.readthedocs.io/en/latest/oauth2_workflow.html#refreshing-tokens, the third way."""
    tokens = Tokens(place)
    session = OAuth2Session(
        place.client["client_id"],
        token=tokens.load(),
        auto_refresh_url=place.provider.token_url,
        auto_refresh_kwargs=place.client,
        token_updater=tokens.save,
    )
    with session:
        return bool(session.get(place.resource, timeout=60).status_code == 200)


def _requests_with_store(place: Place) -> bool:
    with _opened_sync(place) as store, Session() as session:
        auth = StoreAuthOfRequests(store, _NAME, place.user, origins=[place.provider.base_url])
        return session.get(place.resource, auth=auth, timeout=60).status_code == 200


class _RefreshAuth(httpx2.Auth):
    """https://www.python-httpx.org/advanced/authentication/#custom-authentication-schemes, with tokens in a table."""

    requires_response_body = True

    def __init__(self, place: Place) -> None:
        self._place = place
        self._tokens = Tokens(place)
        self._token = self._tokens.load()

    def auth_flow(self, request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
        request.headers["Authorization"] = f"Bearer {self._token['access_token']}"
        response = yield request
        if response.status_code == 401:
            form = {"grant_type": "refresh_token", "refresh_token": self._token["refresh_token"], **self._place.client}
            answer = yield httpx2.Request("POST", self._place.provider.token_url, data=form)
            if answer.status_code == 200:
                self._token = answer.json()
                self._tokens.save(self._token)
                request.headers["Authorization"] = f"Bearer {self._token['access_token']}"
                yield request


async def _httpx(place: Place) -> bool:
    async with httpx2.AsyncClient(auth=_RefreshAuth(place), timeout=60) as client:
        return (await client.get(place.resource)).status_code == 200


async def _httpx_with_store(place: Place) -> bool:
    async with _opened(place) as store, httpx2.AsyncClient(timeout=60) as client:
        auth = StoreAuth(store, _NAME, place.user, origins=[place.provider.base_url])
        return (await client.get(place.resource, auth=auth)).status_code == 200


def _installation(place: Place) -> Installation:
    token = _log_in(place)
    return Installation(
        app_id="A1",
        team_id=place.user,
        user_id="U1",
        bot_token=token["access_token"],
        bot_refresh_token=token["refresh_token"],
        bot_token_expires_at=int(token["expires_at"]),
        bot_id="B1",
        bot_user_id="UB1",
    )


def _authorized(place: Place, installations: InstallationStore) -> bool:
    """What Bolt does for each event."""
    authorize = InstallationStoreAuthorize(
        logger=_LOGGER,
        installation_store=installations,
        **place.client,
        client=WebClient(base_url=place.front, timeout=60),
    )
    context = BoltContext({"client": WebClient(base_url=place.front, timeout=60)})
    return authorize(context=context, enterprise_id=None, team_id=place.user, user_id="U1") is not None


def _slack_s_own(place: Place) -> SQLite3InstallationStore:
    return SQLite3InstallationStore(database=str(place.database), client_id=place.client["client_id"], logger=_LOGGER)


def _begin_in_slack_s_own(place: Place) -> None:
    installations = _slack_s_own(place)
    installations.init()  # type: ignore[no-untyped-call]
    installations.save(_installation(place))


def _slack(place: Place) -> bool:
    """https://docs.slack.dev/tools/bolt-python/concepts/authenticating-oauth."""
    return _authorized(place, _slack_s_own(place))


def _begin_in_slack_s_store(place: Place) -> None:
    with _opened_sync(place) as store:
        store.setup()
        SlackInstallationStore(store).save(_installation(place))


def _slack_with_store(place: Place) -> bool:
    with _opened_sync(place) as store:
        return _authorized(place, SlackInstallationStore(store))


class _McpStorage(TokenStorage):
    """Tokens of the MCP SDK in an application's table. The client is registered, and not by the SDK."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._tokens = Tokens(place)

    async def get_tokens(self) -> OAuthToken | None:
        return OAuthToken.model_validate(self._tokens.load())

    async def set_tokens(self, tokens: OAuthToken) -> None:
        self._tokens.save(tokens.model_dump(mode="json"))

    async def get_client_info(self) -> OAuthClientInformationFull | None:
        return _registered(self._place)

    async def set_client_info(self, client_info: OAuthClientInformationFull) -> None:
        pass


def _registered(place: Place) -> OAuthClientInformationFull:
    return OAuthClientInformationFull(
        **place.client, redirect_uris=[AnyUrl(_CALLBACK)], token_endpoint_auth_method="client_secret_post"
    )


async def _mcp(place: Place) -> bool:
    """https://py.sdk.modelcontextprotocol.io/client/oauth-clients/#token-storage."""
    return await _mcp_answer(place, OAuthClientProvider(place.front, _METADATA, _McpStorage(place)))


def _begin_in_mcp_s_store(place: Place) -> None:
    """The row that a login through the provider leaves, as its metadata has the client; it has expired since."""

    async def log_in() -> None:
        async with _opened(place) as store:
            await store.setup()
            auth = StoreOAuthProvider(store, place.user, place.front, _METADATA)
            auth.context.client_info = _registered(place)
            token = _log_in(place)
            await auth.context.storage.set_tokens(OAuthToken.model_validate({**token, "expires_in": 3600}))
            pair = token["access_token"], token["refresh_token"]
            expiry = datetime.fromtimestamp(token["expires_at"], UTC)
            await store.store_tokens("mcp", place.user, *pair, expiry, account=place.front)

    asyncio.run(log_in())


async def _mcp_with_store(place: Place) -> bool:
    async with _opened(place) as store:
        return await _mcp_answer(place, StoreOAuthProvider(store, place.user, place.front, _METADATA))


async def _mcp_answer(place: Place, auth: httpx2.Auth) -> bool:
    async with (
        httpx2.AsyncClient(auth=auth, timeout=60) as http,
        mcp.Client(streamable_http_client(place.front, http_client=http)) as client,
    ):
        return not (await client.call_tool("answer")).is_error


def _fastmcp_s_own(place: Place, storage: AsyncKeyValue) -> OAuth:
    return OAuth(place.front, token_storage=storage, **place.client)


def _encrypted_files(place: Place) -> AsyncKeyValue:
    folder = place.database.parent / place.user
    folder.mkdir(exist_ok=True)
    files = FileTreeStore(
        data_directory=folder,
        key_sanitization_strategy=FileTreeV1KeySanitizationStrategy(folder),
        collection_sanitization_strategy=FileTreeV1CollectionSanitizationStrategy(folder),
    )
    return FernetEncryptionWrapper(key_value=files, fernet=_FERNET)


async def _save_in_fastmcp_s_own(place: Place, storage: AsyncKeyValue) -> None:
    token = OAuthToken.model_validate(_log_in(place))
    await _fastmcp_s_own(place, storage).token_storage_adapter.set_tokens(token)


def _begin_in_files(place: Place) -> None:
    asyncio.run(_save_in_fastmcp_s_own(place, _encrypted_files(place)))


async def _fastmcp(place: Place) -> bool:
    """https://gofastmcp.com/clients/auth/oauth#token-storage, in files."""
    return await _fastmcp_answer(place, _fastmcp_s_own(place, _encrypted_files(place)))


def _begin_in_values(place: Place) -> None:
    async def save() -> None:
        async with _opened(place) as store:
            await store.setup()
            await _save_in_fastmcp_s_own(place, StoreKeyValue(store))

    asyncio.run(save())


async def _fastmcp_with_values(place: Place) -> bool:
    """The same in the store's values: encryption without a lock."""
    async with _opened(place) as store:
        return await _fastmcp_answer(place, _fastmcp_s_own(place, StoreKeyValue(store)))


async def _fastmcp_with_store(place: Place) -> bool:
    async with _opened(place) as store:
        auth = StoreAuth(store, _NAME, place.user, origins=[place.front.removesuffix("/mcp")])
        return await _fastmcp_answer(place, auth)


async def _fastmcp_answer(place: Place, auth: httpx2.Auth) -> bool:
    async with fastmcp.Client(place.front, auth=auth) as client:
        return not (await client.call_tool("answer")).is_error


@asynccontextmanager
async def _opened(place: Place) -> AsyncIterator[AuthTokenStore]:
    target, options = place.store
    async with open_store(target, **options) as store:
        yield store


@contextmanager
def _opened_sync(place: Place) -> Iterator[sync.AuthTokenStore]:
    target, options = place.store
    with sync.open_store(target, **options) as store:
        yield store


@contextmanager
def _slack_shaped(provider: StrictRotatingProvider) -> Iterator[str]:
    """Slack's Web API, in front of the provider."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found = {name: self.headers[name] for name in ("Authorization", "Content-Type") if self.headers[name]}
            with httpx2.Client(trust_env=False, timeout=60) as client:
                if self.path.endswith("/auth.test"):
                    response = client.get(f"{provider.base_url}/resource", headers=found)
                    answer = {"team_id": "T1", "bot_id": "B1", "user_id": "UB1", "url": "https://example.com"}
                else:
                    response = client.post(provider.token_url, content=body, headers=found)
                    answer = {**response.json(), "token_type": "bot"}
            ok = response.status_code == 200
            text = json.dumps(
                {"ok": True, **answer} if ok else {"ok": False, "error": "invalid_refresh_token"}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *_: object) -> None:  # noqa: A002 - its name in the base class
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/api/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Way(NamedTuple):
    """One way to use a library.

    Attributes:
        library: The library.
        way: What it is used with.
        begin: Stores the expired token of a new grant.
        use: Makes one client's request; returns whether it succeeded.
        front: Starts what the library needs in front of the provider, and gives its URL.
    """

    library: str
    way: str
    begin: Callable[[Place], None]
    use: Callable[[Place], bool] | Callable[[Place], Awaitable[bool]]
    front: Callable[[StrictRotatingProvider], AbstractContextManager[str]] = lambda _: nullcontext("")


WAYS = [
    Way("Authlib", "update_token", _begin_in_table, _authlib),
    Way("Authlib", "tokenstore", _begin_in_store, _authlib_with_store),
    Way("requests-oauthlib", "token_updater", _begin_in_table, _requests_oauthlib),
    Way("Requests", "tokenstore", _begin_in_store, _requests_with_store),
    Way("slack_sdk, Bolt", "SQLite3InstallationStore", _begin_in_slack_s_own, _slack, _slack_shaped),
    Way("slack_sdk, Bolt", "tokenstore", _begin_in_slack_s_store, _slack_with_store, _slack_shaped),
    Way("MCP SDK", "TokenStorage", _begin_in_table, _mcp, mcp_server),
    Way("MCP SDK", "tokenstore", _begin_in_mcp_s_store, _mcp_with_store, mcp_server),
    Way("FastMCP", "an encrypted FileTreeStore", _begin_in_files, _fastmcp, mcp_server),
    Way("FastMCP", "StoreKeyValue", _begin_in_values, _fastmcp_with_values, mcp_server),
    Way("FastMCP", "tokenstore", _begin_in_store, _fastmcp_with_store, mcp_server),
    Way("httpx2", "an Auth class of one's own", _begin_in_table, _httpx),
    Way("httpx2", "tokenstore", _begin_in_store, _httpx_with_store),
]


def _use_at_once(way: Way, place: Place, clients: int) -> list[bool]:
    """Make each client's request. A client that raises an exception has failed."""
    if inspect.iscoroutinefunction(way.use):

        async def use_all() -> list[Any]:
            requests: list[Any] = [way.use(place) for _ in range(clients)]
            return await asyncio.gather(*requests, return_exceptions=True)

        return [found is True for found in asyncio.run(use_all())]

    def use(_: int) -> bool:
        try:
            return way.use(place) is True
        except Exception:  # noqa: BLE001 - whatever the library raises, its client got no answer
            return False

    with ThreadPoolExecutor(clients) as threads:
        return list(threads.map(use, range(clients)))


def measure(way: Way, grants: int, clients: int) -> list[str]:
    """Use a library for several grants; return the line of the table."""
    answered = 0
    with (
        StrictRotatingProvider(latency=0.05) as provider,
        way.front(provider) as front,
        tempfile.TemporaryDirectory() as folder,
    ):
        for number in range(grants):
            place = Place(provider, front, Path(folder) / "tokens.db", f"T{number}")
            way.begin(place)
            answered += sum(_use_at_once(way, place, clients))
        stats = provider.stats()
    return [
        way.library,
        way.way,
        f"{answered} of {grants * clients}",
        str(stats.refreshes),
        f"{stats.revoked_grants} of {grants}",
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grants", description=__doc__)
    parser.add_argument("--grants", type=int, default=10, help="grants for each library (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=10, help="clients at once (default: %(default)s)")
    chosen = parser.parse_args()
    # oauthlib sends tokens to https only, and the provider here is on the loopback interface.
    os.environ["OAUTHLIB_INSECURE_TRANSPORT"] = "1"
    logging.disable()  # the libraries log what the table counts
    grid = Table("library", "tokens kept by", "clients with an answer", "refreshes", "grants lost")
    for way in WAYS:
        grid.add_row(*measure(way, chosen.grants, chosen.clients))
    console().print(grid)


if __name__ == "__main__":
    main()
