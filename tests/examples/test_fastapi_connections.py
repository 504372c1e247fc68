"""The application of examples/fastapi-connections, in a browser: the application and the provider are real processes.

The picture of the documentation is written anew by

    TOKENSTORE_TEST_SCREENSHOT=docs/connections.png python -m pytest tests/examples/test_fastapi_connections.py
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from signal import SIGINT

import httpx
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Locator, Page, expect

from support.browser import open_page
from support.paths import DOCS, ROOT
from support.server_processes import free_port
from tokenstore import Keyring, generate_key, open_store
from tokenstore.testing.provider import StrictRotatingProvider

_EXAMPLE = ROOT / "examples" / "fastapi-connections"
_PICTURE = DOCS / "connections.png"
_SCREENSHOT = "TOKENSTORE_TEST_SCREENSHOT"
_START = 60.0  # seconds


@contextmanager
def _running(url: str, environment: Mapping[str, str], *arguments: str | Path) -> Iterator[None]:
    """Run a Python program until the block ends; the block begins when it answers."""
    command = [sys.executable, "-W", "error", *arguments]
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + _START
        while not _answers(url):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.05)
        yield
    finally:
        process.send_signal(SIGINT)
        try:
            output, _ = process.communicate(timeout=_START)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
    assert process.returncode == 0, output
    assert "Traceback" not in output, output
    assert not re.search(r"\b(at|rt|ac)_\w{20}", output), "the application printed a token"


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/login", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@dataclass(frozen=True)
class _World:
    """The application at ``url``, and what else a test has to do with it.

    Attributes:
        provider: Where the users have their accounts.
        url: The application.
        database_url: Its store.
        keys: Its keys.
    """

    provider: StrictRotatingProvider
    url: str
    database_url: str
    keys: str

    def expire(self, user: str, account: str) -> None:
        """Let an access token expire, at the provider and in the store, which another process than this one uses."""

        async def expire() -> None:
            async with open_store(self.database_url, keyring=Keyring.from_string(self.keys)) as store:
                record = await store.load_tokens("example", user, account=account)
                assert record is not None
                await store.store_tokens(
                    "example",
                    user,
                    record["access_token"],
                    record["refresh_token"],
                    datetime.now(UTC) - timedelta(seconds=60),
                    account=account,
                )

        self.provider.expire_access_tokens(account)
        with ThreadPoolExecutor(1) as pool:  # Playwright's event loop runs in this thread
            pool.submit(asyncio.run, expire()).result()


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_World]:
    """One application for all tests, each with users of its own."""
    url, folder = f"http://127.0.0.1:{free_port()}", tmp_path_factory.mktemp("application")
    with StrictRotatingProvider(redirect_uris=[f"{url}/callback"]) as provider:
        world = _World(provider, url, f"sqlite:///{folder}/tokens.db", generate_key())
        environment = {
            "PUBLIC_URL": url,
            "TOKENSTORE_URL": world.database_url,
            "CLIENT_ID": provider.client_id,
            "CLIENT_SECRET": provider.client_secret,
            "AUTHORIZE_URL": provider.authorize_url,
            "TOKEN_URL": provider.token_url,
            "REVOCATION_URL": provider.revocation_url,
            "API_URL": provider.resource_url,
            "TOKENSTORE_KEYS": world.keys,
        }
        port = url.rpartition(":")[2]
        server = ("-m", "uvicorn", "--no-access-log", "--app-dir", _EXAMPLE)
        with _running(url, environment, *server, "app:app", "--port", port):
            provider.stop()
            yield world


@pytest.fixture
def world(application: _World) -> Iterator[_World]:
    """The application, with the provider running: the application keeps connections to it, which end with the test."""
    application.provider.start()
    yield application
    application.provider.stop()


# -- in the browser --------------------------------------------------------------------------------


@pytest.mark.browser
def test_a_user_connects_two_accounts_renews_one_and_disconnects_it(world: _World, tmp_path: Path) -> None:
    provider, before = world.provider, world.provider.stats()
    with open_page(960, 520) as page:
        # The first login makes the session.
        page.goto(world.url)
        page.get_by_label("Account").fill("alice")
        page.get_by_role("button", name="Log in at Example").click()
        expect(page.get_by_role("status")).to_have_text("The account is connected.")
        # A second account.
        page.get_by_label("Account").fill("bob")
        page.get_by_role("button", name="Connect", exact=True).click()
        expect(page.get_by_role("row")).to_have_count(3)
        assert page.url == f"{world.url}/?notice=connected"

        # The token has expired: the call has a fresh one, and a second call has the same one.
        world.expire("alice", "alice")
        page.get_by_role("row", name="alice").get_by_role("link", name="Open profile").click()
        expect(page.locator("dd").first).to_have_text("alice")
        page.reload()
        expect(page.locator("dd").first).to_have_text("alice")
        assert provider.stats().refreshes == before.refreshes + 1

        # The user withdraws the consent at the provider. The call finds out, and leads to the login.
        provider.revoke_user("bob")
        world.expire("alice", "bob")
        page.goto(world.url)
        with page.expect_response(lambda response: "/profile?account=bob" in response.url) as called:
            page.get_by_role("row", name="bob").get_by_role("link", name="Open profile").click()
        assert (called.value.status, called.value.headers["location"]) == (303, "/login?account=bob")
        expect(page.get_by_role("heading")).to_have_text("Log in again")

        page.goto(world.url)
        expect(_status(page, "alice")).to_have_text("Connected")
        expect(_status(page, "bob")).to_have_text("Log in again")
        _take_picture(page, tmp_path)

        # The new login renews the connection, and disconnecting revokes it.
        page.get_by_role("button", name="Log in again").click()
        expect(_status(page, "bob")).to_have_text("Connected")
        assert provider.stats().revoked_grants == before.revoked_grants + 1
        page.get_by_role("row", name="bob").get_by_role("button", name="Disconnect").click()
        expect(page.get_by_role("row")).to_have_count(2)
        expect(_status(page, "alice")).to_have_text("Connected")
        assert provider.stats().revoked_grants == before.revoked_grants + 2

        page.get_by_role("button", name="Log out").click()
        page.goto(world.url)
        assert page.url == f"{world.url}/login"


def _status(page: Page, account: str) -> Locator:
    return page.get_by_role("row", name=account).locator(".status")


def _take_picture(page: Page, folder: Path) -> None:
    """Write the picture of the documentation. The one in the repository must show the same text."""
    with Image.open(BytesIO(page.screenshot())) as screenshot:
        picture = screenshot.convert("RGB").quantize(64)
    info = PngInfo()
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "DATE", page.locator("main").inner_text())
    info.add_itxt("Description", text)
    target = Path(os.environ.get(_SCREENSHOT) or folder / _PICTURE.name)
    picture.save(target, optimize=True, pnginfo=info)
    assert target.stat().st_size < 100_000
    with Image.open(_PICTURE) as committed:
        assert committed.info["Description"] == text, f"run this test with {_SCREENSHOT}={_PICTURE.relative_to(ROOT)}"
        assert committed.size == picture.size


# -- what a browser does not do --------------------------------------------------------------------


def _begin(client: httpx.Client, account: str) -> str:
    """Begin a login, as the application's own form does. Returns the address to which the provider redirects."""
    begun = client.post("/login", data={"account": account}, headers={"Origin": str(client.base_url).rstrip("/")})
    return httpx.get(begun.headers["Location"], trust_env=False).headers["Location"]


@contextmanager
def _client(world: _World, account: str | None = None) -> Iterator[httpx.Client]:
    """A client, with the session of a user."""
    with httpx.Client(base_url=world.url, trust_env=False) as client:
        if account is not None:
            assert client.get(_begin(client, account)).headers["Location"] == "/?notice=connected"
        yield client


def test_forms_of_other_sites_are_refused(world: _World) -> None:
    """Also those of a page without an origin, such as one in a sandbox."""
    with _client(world, "carol") as client:
        for origin in ("https://evil.example", "null", None):
            headers = {} if origin is None else {"Origin": origin}
            for path in ("/login", "/logout", "/disconnect"):
                assert client.post(path, data={"account": "carol"}, headers=headers).status_code == 403
        assert client.get("/profile?account=carol").status_code == 200


def test_a_login_ends_once_and_in_the_browser_in_which_it_began(world: _World) -> None:
    with _client(world, "carol") as client, _client(world) as other:
        foreign = _begin(other, "mallory")
        for address in (foreign, f"{world.url}/callback?state=made-up&code=ac_1"):
            assert client.get(address).headers["Location"] == "/login?notice=expired"
        assert other.get(foreign).headers["Location"] == "/login?notice=expired"
        assert client.get("/callback", params={"state": "\0" * 600, "code": "x"}).status_code == 422
        assert "mallory" not in client.get("/").text


def test_a_user_who_refuses_at_the_provider_connects_nothing(world: _World) -> None:
    with _client(world, "carol") as client:
        world.provider.consents = False
        try:
            refused = _begin(client, "dave")
        finally:
            world.provider.consents = True
        assert client.get(refused).headers["Location"] == "/?notice=refused"
        assert "dave" not in client.get("/").text


def test_no_text_of_an_address_or_of_the_provider_becomes_html(world: _World) -> None:
    name = "<script>alert(1)</script>&\"'"
    with _client(world, "erin") as client:
        assert client.get(_begin(client, name)).status_code == 303
        listed, profile = client.get("/"), client.get("/profile", params={"account": name})
        assert "&lt;script&gt;" in listed.text
        assert profile.status_code == 200
        others = [client.get(path) for path in ("/?notice=<script>", "/login?account=<script>")]
        others.append(client.get("/login", params={"account": name}))
        for page in (listed, profile, *others):
            assert "<script" not in page.text
        missing = client.get("/profile", params={"account": "a\r\nb"}, headers={"Accept": "text/html"})
        assert (missing.status_code, missing.headers["Location"]) == (303, "/login?account=a%0D%0Ab")


def test_a_session_ends_with_the_logout_and_is_not_in_the_database(world: _World) -> None:
    with _client(world, "carol") as client:
        session = client.cookies["session"]
        files = Path(world.database_url.removeprefix("sqlite:///")).parent.iterdir()
        assert session.encode() not in b"".join(file.read_bytes() for file in files)
        client.post("/logout", headers={"Origin": world.url})
        client.cookies.set("session", session)
        assert client.get("/").headers["Location"] == "/login"


def test_an_outage_is_told_to_the_user_and_changes_nothing(world: _World) -> None:
    with _client(world, "frank") as client:
        world.expire("frank", "frank")
        world.provider.outage = True
        try:
            away = client.get("/profile?account=frank")
            kept = client.post("/disconnect", data={"account": "frank"}, headers={"Origin": world.url})
        finally:
            world.provider.outage = False
        assert away.headers["Location"] == kept.headers["Location"] == "/?notice=unavailable"
        listed = client.get("/").text
        assert "Example does not answer" in listed
        assert "Next attempt at" in listed
        unknown = client.get("/profile?account=nobody")
        assert (unknown.status_code, unknown.json()["error"]) == (401, "tokens_missing")


def test_one_command_runs_the_application_and_its_provider() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with (
        _running(url, {}, _EXAMPLE / "demo.py", "--port", url.rpartition(":")[2]),
        httpx.Client(base_url=url, trust_env=False, follow_redirects=True) as client,
    ):
        page = client.post("/login", headers={"Origin": url})  # the provider logs alice in
        assert page.url == f"{url}/?notice=connected"
        assert "alice" in page.text
        assert "alice" in client.get("/profile?account=alice").text
