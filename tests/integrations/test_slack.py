"""The installation stores of slack_sdk and Bolt: real Bolt applications on a local Slack."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from slack_bolt import App, BoltRequest
from slack_bolt.async_app import AsyncApp, AsyncBoltRequest
from slack_sdk.oauth.installation_store import Installation
from slack_sdk.signature import SignatureVerifier
from slack_sdk.web.async_client import AsyncWebClient
from slack_sdk.web.client import WebClient

from support.missing_libraries import import_error
from support.sync_stores import ended_loop_thread
from tokenstore import (
    AuthTokenStore,
    InvalidInputError,
    Keyring,
    MissingDependencyError,
    ProviderUnavailableError,
    open_store,
    sync,
)
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.slack import AsyncSlackInstallationStore, SlackInstallationStore
from tokenstore.testing.provider import StrictRotatingProvider

_CALLERS = 10
_TEAM: dict[str, Any] = {"enterprise_id": "E1", "team_id": "T1"}
_SECRET = "signing secret"
_KEYRING = Keyring({"k1": bytes(32)})


class _Slack:
    """Slack's Web API as Bolt calls it: ``auth.test`` answers for every token. It notes the calls of methods."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        slack = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                slack.calls.append((self.path.rpartition("/")[2], token))
                body = json.dumps({"ok": True, "team_id": "T1", "bot_id": "B1", "user_id": "UB1", "url": "x"}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *_: object) -> None:  # noqa: A002 - its name in the base class
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/api/"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def tokens_of(self, method: str) -> set[str]:
        return {token for called, token in self.calls if called == method}

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def slack() -> Iterator[_Slack]:
    slack = _Slack()
    yield slack
    slack.stop()


@pytest.fixture
def provider() -> Iterator[StrictRotatingProvider]:
    with StrictRotatingProvider(latency=0.1) as provider:
        yield provider


def _settings(provider: StrictRotatingProvider) -> dict[str, Any]:
    refresher = OAuth2Refresher(provider.token_url, provider.client_id, provider.client_secret)
    return {"keyring": _KEYRING, "refreshers": {"slack": refresher}}


def _run(
    path: Path, provider: StrictRotatingProvider, test: Callable[[AuthTokenStore], Coroutine[None, None, None]]
) -> None:
    async def run() -> None:
        async with open_store(f"sqlite:///{path / 'tokens.db'}", **_settings(provider)) as store:
            await store.setup()
            await test(store)

    asyncio.run(run())


@contextmanager
def _sync_store(path: Path, provider: StrictRotatingProvider) -> Iterator[sync.AuthTokenStore]:
    with ended_loop_thread(), sync.open_store(f"sqlite:///{path / 'tokens.db'}", **_settings(provider)) as store:
        store.setup()
        yield store


def _installation(provider: StrictRotatingProvider, *, expired: bool = True, **fields: Any) -> Installation:
    """An installation with a bot's tokens of a new grant."""
    return Installation(
        **{
            "app_id": "A1",
            **_TEAM,
            "team_name": "Team",
            "bot_token": "xoxb-old",
            "bot_refresh_token": provider.new_grant("bot")["refresh_token"],
            "bot_token_expires_at": int(time.time()) + (-60 if expired else 36_000),
            "bot_id": "B1",
            "bot_user_id": "UB1",
            "bot_scopes": ["chat:write", "commands"],
            "user_id": "U1",
            "incoming_webhook_url": "https://hooks.slack.com/services/secret",
            "custom_values": {"plan": "pro"},
            "installed_at": 1_700_000_000.5,
            **fields,
        }
    )


def _user_tokens(provider: StrictRotatingProvider, *, expired: bool = True) -> dict[str, Any]:
    return {
        "user_token": "xoxp-old",
        "user_refresh_token": provider.new_grant("person")["refresh_token"],
        "user_token_expires_at": int(time.time()) + (-60 if expired else 36_000),
        "user_scopes": ["search:read"],
    }


def _command(user: str = "U1") -> tuple[str, dict[str, Any]]:
    """A signed slash command, as Slack sends it."""
    body = f"command=%2Fhello&team_id=T1&enterprise_id=E1&user_id={user}&channel_id=C1&text="
    timestamp = str(int(time.time()))
    signature = SignatureVerifier(_SECRET).generate_signature(timestamp=timestamp, body=body)
    return body, {
        "content-type": ["application/x-www-form-urlencoded"],
        "x-slack-signature": [signature],
        "x-slack-request-timestamp": [timestamp],
    }


def _async_app(installations: AsyncSlackInstallationStore, slack: _Slack) -> AsyncApp:
    """A Bolt application whose command answers with the tokens that it got."""
    app = AsyncApp(
        signing_secret=_SECRET,
        installation_store=installations,
        client=AsyncWebClient(base_url=slack.url),
        process_before_response=True,
    )

    @app.command("/hello")
    async def hello(ack: Any, context: Any) -> None:
        await ack(f"{context.bot_token} {context.user_token}")

    return app


def test_bolt_s_listeners_get_a_token_that_was_refreshed_once(
    tmp_path: Path, provider: StrictRotatingProvider, slack: _Slack
) -> None:
    async def test(store: AuthTokenStore) -> None:
        installations = AsyncSlackInstallationStore(store)
        await installations.async_save(_installation(provider, **_user_tokens(provider)))
        app = _async_app(installations, slack)
        body, headers = _command()
        answers = await asyncio.gather(
            *(app.async_dispatch(AsyncBoltRequest(body=body, headers=headers)) for _ in range(_CALLERS))
        )
        bot = await store.load_tokens("slack", "E1-T1", account="bot")
        user = await store.load_tokens("slack", "E1-T1", account="user:U1")
        assert bot is not None
        assert user is not None
        fresh = f"{bot['access_token']} {user['access_token']}"
        assert {(answer.status, answer.body) for answer in answers} == {(200, fresh)}
        assert "old" not in fresh

    _run(tmp_path, provider, test)
    stats = provider.stats()
    assert (stats.refreshes, stats.requests, stats.reuses) == (2, 2, 0)
    assert slack.tokens_of("oauth.v2.access") == set()  # Bolt's own rotation


def test_bolt_without_await(tmp_path: Path, provider: StrictRotatingProvider, slack: _Slack) -> None:
    with _sync_store(tmp_path, provider) as store:
        installations = SlackInstallationStore(store)
        installations.save(_installation(provider))
        app = App(
            signing_secret=_SECRET,
            installation_store=installations,
            client=WebClient(base_url=slack.url),
            process_before_response=True,
        )

        @app.command("/hello")
        def hello(ack: Any, context: Any) -> None:
            ack(context.bot_token)

        body, headers = _command()
        with ThreadPoolExecutor(_CALLERS) as threads:
            answers = list(
                threads.map(lambda _: app.dispatch(BoltRequest(body=body, headers=headers)), range(_CALLERS))
            )
        bot = store.load_tokens("slack", "E1-T1", account="bot")
        assert bot is not None
        assert {(answer.status, answer.body) for answer in answers} == {(200, bot["access_token"])}
    stats = provider.stats()
    assert (stats.refreshes, stats.requests, stats.reuses) == (1, 1, 0)
    assert slack.tokens_of("oauth.v2.access") == set()


def test_another_person_gets_their_own_token(tmp_path: Path, provider: StrictRotatingProvider, slack: _Slack) -> None:
    async def test(store: AuthTokenStore) -> None:
        installations = AsyncSlackInstallationStore(store)
        second = {"user_id": "U2", "user_token": "xoxp-second", "installed_at": 1_700_000_001.0}
        await installations.async_save(_installation(provider, expired=False, **second))
        first = {"user_token": "xoxp-first", "installed_at": 1_700_000_002.0}
        await installations.async_save(_installation(provider, expired=False, **first))
        app = _async_app(installations, slack)
        answers = []
        for user in ("U1", "U2", "U3"):
            body, headers = _command(user)
            answers.append((await app.async_dispatch(AsyncBoltRequest(body=body, headers=headers))).body)
        assert answers == ["xoxb-old xoxp-first", "xoxb-old xoxp-second", "xoxb-old None"]

    _run(tmp_path, provider, test)


def test_what_was_saved_is_found_without_refresh_tokens(tmp_path: Path, provider: StrictRotatingProvider) -> None:
    async def test(store: AuthTokenStore) -> None:
        installations = AsyncSlackInstallationStore(store)
        saved = _installation(provider, expired=False, **_user_tokens(provider, expired=False))
        await installations.async_save(saved)
        hidden = {
            f"{whose}_{what}": None for whose in ("bot", "user") for what in ("refresh_token", "token_expires_at")
        }
        found = await installations.async_find_installation(**_TEAM)
        assert found is not None
        assert found.to_dict() == {**saved.to_dict(), **hidden}
        found = await installations.async_find_installation(**_TEAM, user_id="U1")
        assert found is not None
        assert found.to_dict() == {**saved.to_dict(), **hidden}
        assert await installations.async_find_installation(**_TEAM, user_id="U2") is None
        assert await installations.async_find_installation(enterprise_id="E1", team_id="T2") is None
        bot = await installations.async_find_bot(**_TEAM)
        assert bot is not None
        without = {name: None for name in hidden if name.startswith("bot")}
        assert bot.to_dict() == {**saved.to_bot().to_dict(), **without}

    _run(tmp_path, provider, test)


def test_saving_what_was_found_keeps_the_refresh_token(tmp_path: Path, provider: StrictRotatingProvider) -> None:
    """Also if another process refreshed the tokens meanwhile."""

    async def test(store: AuthTokenStore) -> None:
        installations = AsyncSlackInstallationStore(store)
        await installations.async_save(
            _installation(provider, expired=False, enterprise_url="https://e1", **_user_tokens(provider, expired=False))
        )
        found = await installations.async_find_installation(**_TEAM)
        assert found is not None
        await store.load_fresh_tokens("slack", "E1-T1", account="bot", force=True)
        found.set_custom_value("plan", "free")
        found.enterprise_url = None
        await installations.async_save(found)
        await installations.async_save_bot(found.to_bot())
        record = await store.load_tokens("slack", "E1-T1", account="bot")
        assert record is not None
        assert record["refresh_token"] is not None
        again = await installations.async_find_installation(**_TEAM)
        assert again is not None
        assert again.custom_values == {"plan": "free"}
        assert again.enterprise_url is None
        assert again.bot_token == record["access_token"]
        # A new application, whose tokens do not rotate, replaces the tokens.
        again.app_id = "A2"
        again.bot_token = "xoxb-other"
        await installations.async_save(again)
        record = await store.load_tokens("slack", "E1-T1", account="bot")
        assert record is not None
        assert (record["access_token"], record["refresh_token"]) == ("xoxb-other", None)

    _run(tmp_path, provider, test)
    assert provider.stats().reuses == 0


def test_a_saved_installation_replaces_what_does_not_open(tmp_path: Path, provider: StrictRotatingProvider) -> None:
    async def test(store: AuthTokenStore) -> None:
        await AsyncSlackInstallationStore(store).async_save(_installation(provider))
        other = open_store(f"sqlite:///{tmp_path / 'tokens.db'}", keyring=Keyring({"k2": bytes(range(32))}))
        async with other:
            installations = AsyncSlackInstallationStore(other)
            without: dict[str, Any] = {"bot_refresh_token": None, "bot_token_expires_at": None}
            await installations.async_save(_installation(provider, bot_token="xoxb-new", **without))
            bot = await installations.async_find_bot(**_TEAM)
            assert bot is not None
            assert bot.bot_token == "xoxb-new"

    _run(tmp_path, provider, test)


def test_tokens_without_rotation_need_no_refresher(tmp_path: Path, provider: StrictRotatingProvider) -> None:
    async def test() -> None:
        async with open_store(f"sqlite:///{tmp_path / 'tokens.db'}", keyring=_KEYRING) as store:
            await store.setup()
            installations = AsyncSlackInstallationStore(store, provider="second app")
            bot = _installation(provider, bot_refresh_token=None, bot_token_expires_at=None).to_bot()
            await installations.async_save_bot(bot)
            found = await installations.async_find_bot(**_TEAM)
            assert found is not None
            assert found.to_dict() == bot.to_dict()
            # Without somebody who installed there is no installation, and Bolt looks for the bot.
            assert await installations.async_find_installation(**_TEAM) is None
            assert await AsyncSlackInstallationStore(store).async_find_bot(**_TEAM) is None

    asyncio.run(test())


def test_a_revoked_grant_is_not_found(
    tmp_path: Path, provider: StrictRotatingProvider, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(store: AuthTokenStore) -> None:
        installations = AsyncSlackInstallationStore(store)
        await installations.async_save(_installation(provider, **_user_tokens(provider)))
        revoked = _installation(provider, bot_refresh_token="revoked")
        await installations.async_save(revoked)
        assert await installations.async_find_bot(**_TEAM) is None
        found = await installations.async_find_installation(**_TEAM, user_id="U1")
        assert found is not None
        assert found.bot_token is None
        assert found.bot_id is None
        assert found.user_token is not None
        assert [record.name for record in caplog.records if "installed again" in record.message]

    _run(tmp_path, provider, test)


def test_an_outage_is_an_error_and_not_a_missing_installation(tmp_path: Path, provider: StrictRotatingProvider) -> None:
    async def test(store: AuthTokenStore) -> None:
        installations = AsyncSlackInstallationStore(store)
        await installations.async_save(_installation(provider))
        provider.stop()
        with pytest.raises(ProviderUnavailableError):
            await installations.async_find_bot(**_TEAM)

    _run(tmp_path, provider, test)


def test_people_without_a_bot(tmp_path: Path, provider: StrictRotatingProvider) -> None:
    """The last installation is found; each person's tokens are their own."""

    async def test(store: AuthTokenStore) -> None:
        installations = AsyncSlackInstallationStore(store)
        for number in (1, 3, 2):
            await installations.async_save(
                Installation(
                    **_TEAM, user_id=f"U{number}", user_token=f"xoxp-{number}", installed_at=float(number), bot_id="B9"
                )
            )
        found = await installations.async_find_installation(**_TEAM)
        assert found is not None
        assert (found.user_id, found.user_token, found.bot_token, found.bot_id) == ("U3", "xoxp-3", None, None)
        found = await installations.async_find_installation(**_TEAM, user_id="U2")
        assert found is not None
        assert found.user_token == "xoxp-2"
        assert await installations.async_find_bot(**_TEAM) is None

    _run(tmp_path, provider, test)


def test_deleting(tmp_path: Path, provider: StrictRotatingProvider) -> None:
    with _sync_store(tmp_path, provider) as store:
        installations = SlackInstallationStore(store)

        def accounts() -> list[str]:
            return sorted(entry["account"] for entry in store.list_tokens(user_id="E1-T1"))

        for user in ("U1", "U2", "U3"):
            installations.save(_installation(provider, expired=False, user_id=user, user_token=f"xoxp-{user}"))
        # A row of the application's own in the same workspace is not touched.
        store.store_tokens("slack", "E1-T1", "xapp-1", None, None, account="app")
        assert accounts() == ["app", "bot", "user:U1", "user:U2", "user:U3"]
        installations.delete_installation(**_TEAM, user_id="U1")
        assert accounts() == ["app", "bot", "user:U2", "user:U3"]
        found = installations.find_installation(**_TEAM)
        assert found is not None
        assert (found.user_id, found.user_token) == ("U3", "xoxp-U3")
        installations.delete_installation(**_TEAM, user_id="U3")
        assert installations.find_installation(**_TEAM, user_id="U3") is None
        found = installations.find_installation(**_TEAM)
        assert found is not None
        assert (found.user_id, found.bot_token) == ("U2", "xoxb-old")
        installations.delete_bot(**_TEAM)
        assert installations.find_bot(**_TEAM) is None
        installations.save_bot(_installation(provider, expired=False).to_bot())
        assert accounts() == ["app", "bot", "user:U2"]
        installations.delete_all(**_TEAM)
        assert accounts() == ["app"]


def test_an_organisation_and_its_workspaces_are_apart(tmp_path: Path, provider: StrictRotatingProvider) -> None:
    async def test(store: AuthTokenStore) -> None:
        installations = AsyncSlackInstallationStore(store)
        await installations.async_save(
            _installation(provider, expired=False, is_enterprise_install=True, team_id=None, bot_token="xoxb-org")
        )
        await installations.async_save(
            _installation(provider, expired=False, enterprise_id=None, bot_token="xoxb-alone")
        )
        tokens = []
        for enterprise, team, everywhere in (("E1", "T7", True), ("E1", None, None), (None, "T1", False)):
            bot = await installations.async_find_bot(
                enterprise_id=enterprise, team_id=team, is_enterprise_install=everywhere
            )
            assert bot is not None
            tokens.append(bot.bot_token)
        assert tokens == ["xoxb-org", "xoxb-org", "xoxb-alone"]
        assert await installations.async_find_bot(enterprise_id="E1", team_id="T1") is None

    _run(tmp_path, provider, test)


def test_an_installation_without_a_token_is_refused(tmp_path: Path, provider: StrictRotatingProvider) -> None:
    async def test(store: AuthTokenStore) -> None:
        with pytest.raises(InvalidInputError, match="bot token or a user token"):
            await AsyncSlackInstallationStore(store).async_save(Installation(**_TEAM, user_id="U1"))
        assert [entry async for entry in store.list_tokens()] == []

    _run(tmp_path, provider, test)


def test_without_slack_sdk_the_error_says_what_to_install() -> None:
    error = import_error("tokenstore.integrations.slack", "slack_sdk")
    assert error.startswith(MissingDependencyError.__name__)
    assert 'pip install "tokenstore[slack]"' in error
