"""No error keeps a secret in the local variables of tokenstore's own frames.

The walk: each frame of tokenstore's own files in the traceback of the error, of its causes and of its contexts; in each
frame every local variable, its `repr`, and what is inside of it, seven levels deep: the elements of containers (also of
a record, which hides them from its `repr`), `__dict__` and slots of any object, and the arguments of exceptions. The
walk does not enter functions, classes, modules and event loops, because no tool that prints variables does. So it sees
more than error trackers, which print containers, and the `repr` of other objects. Secrets that a store needs are in
closures and in objects of `cryptography`. Frames of other packages and of the application are not walked: tokenstore's
errors chain no exception of theirs. The records of `TokensNotStoredError` are documented to be there.
"""

from __future__ import annotations

import asyncio
import base64
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from joserfc.jwk import RSAKey
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncSession
from typer.testing import CliRunner

from support.database import Place, app_engine, password_of
from support.frame_walk import Walk
from support.interceptor import Interceptor, failing
from support.matrix import Row, every_row, server_rows
from support.refreshers import Gone, Revoker, Script
from support.scripted_endpoint import Endpoint, Step, answer, hang_up
from support.server_processes import free_port
from tokenstore import (
    AuthTokenStore,
    Keyring,
    ProviderCallFailure,
    ProviderRefusedError,
    ProviderUnavailableError,
    ReauthorizationRequiredError,
    TokenRecord,
    TokensNotStoredError,
    UnsupportedOperationError,
    open_store,
)
from tokenstore.cli.app import app
from tokenstore.integrations import _endpoint
from tokenstore.integrations.oauth2 import OAuth2Refresher
from tokenstore.integrations.presets import PROVIDERS
from tokenstore.keyring import KEYS_VARIABLE
from tokenstore.records import TokenKey
from tokenstore_memory import MemoryBackend

ACCESS, REFRESH, CLAIM = "AT-5f0c-planted", "RT-91be/planted+x", "ID-77aa-planted"
NEW_ACCESS, NEW_REFRESH = "AT-2-5f0c-planted", "RT-2-91be-planted"
CLIENT_SECRET, PASSWORD = "CS-3c1d-planted", "PW-8e2b-planted"
KEY, OTHER_KEY = bytes(range(101, 133)), bytes(range(133, 165))
TOKENS = (ACCESS, REFRESH, CLAIM, NEW_ACCESS, NEW_REFRESH)
SECRETS = (*TOKENS, CLIENT_SECRET, PASSWORD, KEY, OTHER_KEY)
ROW = TokenKey("github", "u1")
NEW = {"access_token": NEW_ACCESS, "refresh_token": NEW_REFRESH, "expires_in": 3600, "id_token": CLAIM}


def _entry(name: str, key: bytes) -> str:
    return f"{name}:{base64.urlsafe_b64encode(key).decode()}"


def _keyring() -> Keyring:
    return Keyring({"first": KEY, "second": OTHER_KEY})


def _past() -> datetime:
    return datetime.now(UTC) - timedelta(hours=1)


@pytest.fixture
def walk() -> Iterator[Walk]:
    """It prints how many error paths it has walked."""
    walk = Walk(SECRETS)
    yield walk
    sys.stdout.write(f"{len(walk.paths)} error paths walked\n")


async def _fill(store: Any, **changes: Any) -> None:
    tokens: dict[str, Any] = {
        "access_token": ACCESS,
        "refresh_token": REFRESH,
        "access_token_expires_at": _past(),
        "extra": {"id_token": CLAIM},
        "metadata": {"note": CLAIM},
    }
    await store.store_tokens(**{"provider": "github", "user_id": "u1", **tokens, **changes})


# -- arguments ---------------------------------------------------------------------------------------


def test_arguments(walk: Walk) -> None:
    """Of calls that carry tokens, and of calls on records."""

    async def main() -> None:
        store = open_store("memory://", keyring=_keyring(), refreshers={"github": Script(NEW)})
        bad: dict[str, list[Any]] = {
            "provider": ["", 7, "x" * 256],
            "user_id": ["", "\0", "\ud800", None],
            "account": ["x" * 256, "\0", "\ud800", None],
            "access_token": [ACCESS + "\n", [ACCESS], "", ACCESS.encode(), ACCESS + "\ud800"],
            "refresh_token": [REFRESH + "é", {"token": REFRESH}, REFRESH.encode()],
            "access_token_expires_at": [3600, "soon"],
            "refresh_token_expires_at": [3600],
            "extra": [{"id_token": {CLAIM}}, {7: CLAIM}, [CLAIM], {"id_token": CLAIM * 20_000}, {"a": float("nan")}],
        }
        async with store.transaction() as tx:
            for target in (store, tx):
                for name, values in bad.items():
                    for value in values:
                        await walk.wait(f"store_tokens, {name}", _fill(target, **{name: value}))
        await _fill(store)
        record: Any = await store.load_tokens("github", "u1")
        del record["access_token_expires_at"]
        walk.call("is_access_token_valid", store.is_access_token_valid, record)
        walk.call("clock_skew_seconds", store.is_access_token_valid, record, clock_skew_seconds=-1)
        walk.call("is_refresh_token_valid", store.is_refresh_token_valid, {"refresh_token": REFRESH})
        walk.call("needs_reseal", store.needs_reseal, {"access_token": ACCESS})
        await walk.wait("for_update", store.load_tokens("github", "u1", for_update=True))
        await walk.wait("generation", store.load_fresh_tokens("github", "u1", generation=7))
        await walk.wait("no refresher", store.load_fresh_tokens("gitlab", "u1"))
        await walk.wait("no revoker", store.revoke_tokens("github", "u1"))
        await store.aclose()
        await walk.wait("closed", _fill(store))
        await walk.wait("closed", store.load_fresh_tokens("github", "u1"))

    asyncio.run(main())


# -- rows that do not open, and refreshes -----------------------------------------------------------------


def test_rows_that_do_not_open(walk: Walk) -> None:
    """Of an unknown key, and altered: a record is opened field by field, so some fields have been opened by then."""

    async def main() -> None:
        backend = MemoryBackend(lock_timeout=0.05)
        store = AuthTokenStore(backend=backend, keyring=_keyring(), refreshers={"github": Revoker()})
        stranger = AuthTokenStore(backend=backend, keyring=Keyring({"other": OTHER_KEY}))
        await _fill(store)
        await walk.wait("unknown key", stranger.load_tokens("github", "u1"))
        await walk.wait("unknown key", stranger.reseal_tokens("github", "u1"))
        sealed = await backend.get(ROW)
        assert sealed is not None
        tokens = sealed.tokens
        assert tokens.refresh_token is not None
        assert tokens.extra is not None
        for change in (
            {"access_token": tokens.access_token[:-1] + b"\0"},
            {"refresh_token": tokens.access_token},
            {"refresh_token": b"short"},
            {"extra": tokens.extra[:-1] + b"\0"},
            {"key_id": "second"},
        ):
            await backend.put(ROW, replace(tokens, **change))
            await walk.wait("load_tokens", store.load_tokens("github", "u1"))
            await walk.wait("load_fresh_tokens", store.load_fresh_tokens("github", "u1"))
            await walk.wait(
                "load_fresh_tokens, force", store.load_fresh_tokens("github", "u1", force=True, force_min_age=0)
            )
            await walk.wait("revoke_tokens", store.revoke_tokens("github", "u1"))
            await walk.wait("in a transaction", _writes(store)["transaction"]())
            async for result in store.refresh_due(within=60):
                assert result.error is not None
                walk.through(result.error, "refresh_due")

    asyncio.run(main())


def _carrying(text: str) -> list[BaseException]:
    request = httpx.Request("POST", "https://provider.example", content=text)
    return [
        Gone(text),
        httpx.ConnectError(text, request=request),
        KeyError(text),
        TimeoutError(text),
        asyncio.CancelledError(text),
        ReauthorizationRequiredError(text),
        ProviderUnavailableError(text, retry_after=0),
        ProviderRefusedError(text, code=text[:64]),
        UnsupportedOperationError(text),
    ]


class _Bug(Revoker):
    """A refresher of the application, with a bug and its own variables."""

    async def __call__(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        response = dict(NEW)
        return {"access_token": response["acess_token"]}

    async def revoke(self, record: Mapping[str, Any]) -> None:
        raise Gone(record["refresh_token"])


def test_refreshers(walk: Walk) -> None:
    """That raise, that return nonsense, and that do not answer; what the event loop and `on_error` get, too."""

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def from_a_callback(_: object, context: dict[str, Any]) -> None:
            if error := context.get("exception"):
                walk.through(error, "event loop")

        loop.set_exception_handler(from_a_callback)
        failures: list[ProviderCallFailure] = []
        text = " ".join((*TOKENS, CLIENT_SECRET))
        refreshers: list[Any] = [Revoker(error) for error in _carrying(text)]
        for one in refreshers:
            one._answers = [one.error]
        refreshers.append(_Bug())
        nonsense: list[Any] = [
            None, [NEW_ACCESS], {"access_token": [NEW_ACCESS]}, {"refresh_token": NEW_REFRESH},
            {"access_token": 7, "refresh_token": NEW_REFRESH, "x": {NEW_REFRESH}, "expires_in": NEW_ACCESS},
            {"access_token": "é" + NEW_ACCESS, "refresh_token": NEW_REFRESH},
        ]  # fmt: skip
        refreshers += [Script(each) for each in nonsense]
        for refresher in refreshers:
            backend = MemoryBackend()
            store = AuthTokenStore(
                backend=backend, keyring=_keyring(), refreshers={"github": refresher}, on_error=failures.append
            )
            await _fill(store)
            name = f"{type(refresher).__name__} {type(getattr(refresher, 'error', None)).__name__}"
            results = await asyncio.gather(
                *(store.load_fresh_tokens("github", "u1") for _ in range(3)), return_exceptions=True
            )
            for error in results:
                assert isinstance(error, BaseException)
                walk.through(error, name)
            await walk.wait(f"{name}, later", store.load_fresh_tokens("github", "u1", force=True, force_min_age=0))
            if isinstance(refresher, Revoker):
                await walk.wait(f"{name}, revoke", store.revoke_tokens("github", "u1"))
            await _fill(store)
            async for result in store.refresh_due(within=60):
                assert result.error is not None
                walk.through(result.error, f"{name}, refresh_due")
            await store.aclose()
        assert len(failures) > len(refreshers)
        for failure in failures:
            walk.through(failure.error, "on_error", frames_alone=True)
        hanging = Revoker()
        hanging.hold()
        store = AuthTokenStore(
            backend=MemoryBackend(), keyring=_keyring(), refreshers={"github": hanging}, refresh_timeout=0.05
        )
        await _fill(store)
        await walk.wait("refresh_timeout", store.load_fresh_tokens("github", "u1"))
        await walk.wait("refresh_timeout, revoke", store.revoke_tokens("github", "u1"))
        await walk.wait("the caller's own timeout", _cut_off(store))
        await store.aclose()

    asyncio.run(main())


async def _cut_off(store: AuthTokenStore) -> None:
    hanging = Script()
    hanging.hold()
    async with asyncio.timeout(0.01):
        await store.load_fresh_tokens("github", "u1", force=True, force_min_age=0, refresh=hanging, generation=None)
        await asyncio.Event().wait()


def test_new_tokens_that_cannot_be_stored(walk: Walk) -> None:
    """The error's records are the one place for them."""

    async def main() -> None:
        interceptor = Interceptor(MemoryBackend())
        store = AuthTokenStore(
            backend=interceptor, keyring=_keyring(), refreshers={"github": Script(NEW)}, refresh_timeout=0.05
        )
        await _fill(store)
        interceptor.before["complete_lease"] = failing()
        await walk.wait("load_fresh_tokens", store.load_fresh_tokens("github", "u1"))
        await walk.wait("refresh_due", _due(store))
        await walk.wait("aclose", store.aclose())
        assert sum("TokensNotStoredError" in path for path in walk.paths) == len(walk.paths)

    asyncio.run(main())


async def _due(store: AuthTokenStore) -> None:
    async for result in store.refresh_due(within=60):
        assert isinstance(result.error, TokensNotStoredError)
        raise result.error


# -- databases --------------------------------------------------------------------------------------------


@every_row
def test_databases(walk: Walk, row: Row, url: str) -> None:
    """No table, a lock that is held, rows that are refused or altered, a caller that is cut off, a closed store."""
    place = Place(row, url)
    walk.look_for(password_of(place))

    async def main() -> None:
        async with open_store(url, keyring=_keyring(), lock_timeout=0.2, refreshers={"github": Script(NEW)}) as store:
            if row.mark != "memory":
                for path, call in _calls(store).items():
                    await walk.wait(f"no table, {path}", call())
            await store.setup()
            await _fill(store)
            if row.shared:
                async with place.held():
                    await asyncio.gather(*(walk.wait(f"held, {path}", call()) for path, call in _writes(store).items()))
            else:
                async with store.transaction() as tx:
                    await tx.load_tokens("github", "u1", for_update=True)
                    for path, call in _writes(store).items():
                        await walk.wait(f"held, {path}", call())
            await walk.wait("in a transaction", _fail_in_transaction(store))
            await walk.wait("cut off", _wait_for_lock(store))
            backend = store._backend
            sealed = await backend.get(ROW)
            assert sealed is not None
            await backend.put(ROW, replace(sealed.tokens, refresh_token=sealed.tokens.access_token))
            for path, call in _reads(store).items():
                await walk.wait(f"altered, {path}", call())
            if row.shared:
                await _on_an_engine(walk, place)
        await walk.wait("closed", _fill(store))

    asyncio.run(main())


Calls = dict[str, Callable[[], Awaitable[object]]]


def _reads(store: AuthTokenStore) -> Calls:
    return {
        "load": lambda: store.load_tokens("github", "u1"),
        "fresh": lambda: store.load_fresh_tokens("github", "u1"),
        "reseal": lambda: store.reseal_tokens("github", "u1"),
    }


def _writes(store: AuthTokenStore) -> Calls:
    async def in_transaction() -> None:
        async with store.transaction() as tx:
            await tx.load_tokens("github", "u1", for_update=True)
            await _fill(tx)

    return {
        "store": lambda: _fill(store),
        "update": lambda: store.update_metadata("github", "u1", {"note": CLAIM[::-1], "other": CLAIM}),
        "transaction": in_transaction,
        "delete": lambda: store.delete_tokens("github", "u1"),
    }


def _calls(store: AuthTokenStore) -> Calls:
    async def listed() -> None:
        async for _ in store.list_tokens():
            pass

    async def due() -> None:
        async for _ in store.refresh_due(within=60):
            pass

    return {**_reads(store), **_writes(store), "list": listed, "refresh_due": due}


async def _fail_in_transaction(store: AuthTokenStore) -> None:
    async with store.transaction() as tx:
        await _fill(tx)
        with suppress(Exception):
            await _fill(tx, access_token="")
        raise Gone("the application's own")


async def _wait_for_lock(store: AuthTokenStore) -> None:
    async with store.transaction() as tx:
        await tx.load_tokens("github", "u1", for_update=True)
        async with asyncio.timeout(0.05):
            await _fill(store)


async def _on_an_engine(walk: Walk, place: Place) -> None:
    async with app_engine(place) as engine, AsyncSession(engine) as session:
        stores = {
            "engine": open_store(engine, keyring=_keyring(), lock_timeout=0.2, **place.options),
            "session": AuthTokenStore(session, keyring=_keyring(), lock_timeout=0.2, **place.options),
        }
        for name, store in stores.items():
            await walk.wait(f"altered, {name}", store.load_tokens("github", "u1"))
            async with place.held():
                await walk.wait(f"held, {name}", _fill(store))
            await session.rollback()


@server_rows
def test_databases_that_cannot_be_reached(walk: Walk, row: Row, url: str) -> None:
    """A wrong password, a closed port, an unknown host and database."""
    place = Place(row, url)
    parts = make_url(place.url)
    walk.look_for(password_of(place))
    changed = {
        "password": parts.set(password=PASSWORD),
        "port": parts.set(password=PASSWORD, port=free_port()),
        "host": parts.set(password=PASSWORD, host="nowhere.invalid"),
        "database": parts.set(database="no_such_database"),
        "TLS": parts.set(password=PASSWORD).update_query_dict(
            {"sslmode": "require"} if row.mark == "postgres" else {"ssl": "true"}
        ),
    }

    async def main() -> None:
        for name, wrong in changed.items():
            target, refreshers = wrong.render_as_string(hide_password=False), {"github": Revoker()}
            async with open_store(target, keyring=_keyring(), refreshers=refreshers) as store:
                for path, call in {**_calls(store), "setup": store.setup}.items():
                    await walk.wait(f"{name}, {path}", call())

    asyncio.run(main())


# -- OAuth2Refresher --------------------------------------------------------------------------------------


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.stop()


def test_token_endpoints(walk: Walk, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of HTTP and of OAuth, and answers that make no sense, with each kind of client."""
    monkeypatch.setattr(_endpoint, "_PAUSE", (0.0, 0.0))
    key = RSAKey.generate_key(2048).as_dict(private=True)
    walk.look_for(str(key["d"]), str(key["p"]))
    clients: dict[str, dict[str, Any]] = {
        "basic": {"client_secret": CLIENT_SECRET},
        "post": {"client_secret": CLIENT_SECRET, "auth_method": "client_secret_post"},
        "key": {"private_key": key},
        **{name: {"client_secret": CLIENT_SECRET, "provider": PROVIDERS[name]} for name in ("github", "slack")},
    }
    body = {"error_description": REFRESH, "access_token": [NEW_ACCESS], "refresh_token": NEW_REFRESH}
    steps: dict[str, Step] = {
        "invalid_grant": answer({"error": "invalid_grant", **body}, 400),
        "the secret as code": answer({"error": CLIENT_SECRET, **body}, 401),
        "503": answer(body, 503),
        "no token": answer(body),
        "no JSON": answer(f"<{NEW_ACCESS}>".encode(), 200),
        "redirect": answer(body, 302, Location=f"https://elsewhere.example/{REFRESH}"),
        "no answer": hang_up,
        "wrong coding": answer(b"\x1f\x8b" + NEW_ACCESS.encode(), 200, Content_Encoding="gzip"),
        "time": endpoint.hang,
    }
    record = TokenRecord(access_token=ACCESS, refresh_token=REFRESH)

    async def main() -> None:
        for name, options in clients.items():
            refresher = OAuth2Refresher(endpoint.url, "client", revocation_url=endpoint.url, timeout=0.3, **options)
            store = open_store("memory://", keyring=_keyring(), refreshers={"github": refresher})
            for what, step in steps.items():
                endpoint.script(step)
                await walk.wait(f"{name}, {what}", refresher(record))
                if what not in ("no token", "no JSON", "wrong coding"):
                    await walk.wait(f"{name}, {what}, revoke", refresher.revoke(record))
                await _fill(store)
                await walk.wait(f"{name}, {what}, store", store.load_fresh_tokens("github", "u1"))
            await walk.wait(f"{name}, no refresh token", refresher(TokenRecord(refresh_token=None)))
            await walk.wait(f"{name}, not a token", refresher(TokenRecord(refresh_token=[REFRESH])))
            closed = OAuth2Refresher(f"http://127.0.0.1:{free_port()}/", "client", **options)
            await walk.wait(f"{name}, port", closed(record))
            await walk.wait(f"{name}, no revocation", closed.revoke(record))
            await store.aclose()

    asyncio.run(main())


def test_clients(walk: Walk) -> None:
    url = "https://provider.example/token"
    pem = RSAKey.generate_key(2048).as_pem(private=True).decode()
    walk.look_for(pem.splitlines()[5])
    wrong: list[dict[str, Any]] = [
        {"client_secret": CLIENT_SECRET, "private_key": pem},
        {"client_secret": CLIENT_SECRET, "auth_method": "none"},
        {"client_secret": CLIENT_SECRET + "\ud800"},
        {"client_secret": [CLIENT_SECRET]},
        {"client_secret": CLIENT_SECRET, "timeout": 0},
        {"client_secret": CLIENT_SECRET, "scope": ""},
        {"client_secret": CLIENT_SECRET, "rotation": "often"},
        {"client_secret": CLIENT_SECRET, "extra_parameters": {"scope": "x"}},
        {"private_key": pem, "jwt_algorithm": "none"},
        {"private_key": pem[:-60]},
        {"private_key": pem, "jwt_headers": {"unheard_of": "x"}},
    ]
    for number, options in enumerate(wrong):
        walk.call(f"client {number}", OAuth2Refresher, url, "client", **options)
        walk.call(
            f"preset {number}", OAuth2Refresher.for_provider, "github", base_url="http://h", client_id="c", **options
        )
    walk.call("URL", OAuth2Refresher, f"https://someone:{PASSWORD}@h/", "client", CLIENT_SECRET)
    walk.call("preset", OAuth2Refresher.for_provider, "nobody", client_id="client", client_secret=CLIENT_SECRET)


# -- the command line -------------------------------------------------------------------------------------


def test_the_command_line(walk: Walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command ends with SystemExit, which keeps nothing of it."""
    url, keys = f"sqlite:///{tmp_path}/t.db", f"{_entry('first', KEY)},{_entry('second', OTHER_KEY)}"
    server = f"postgresql://someone:{PASSWORD}@127.0.0.1:{free_port()}/db"
    put = ["put", "github", "u1"]
    good = f'{{"access_token": "{ACCESS}", "refresh_token": "{REFRESH}", "id_token": "{CLAIM}"}}'
    (tmp_path / "planted_refreshers.py").write_text(
        f"def refresh(record):\n    raise ValueError(record['refresh_token'])\nrefreshers = {{'github': refresh}}\n"
        f"broken = '{CLIENT_SECRET}'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command adds the folder
    runs: list[tuple[list[str], str, str]] = [
        (["init", "--url", server], "", keys),
        (["--url", server, "list"], "", keys),
        ([*put, "--url", server], good, keys),
        ([*put, "--url", f"nothing://someone:{PASSWORD}@h"], good, keys),
        ([*put, "--url", url], good[:-1], keys),
        ([*put, "--url", url], good.replace(ACCESS, ACCESS + "\\nx"), keys),
        ([*put, "--url", url], f'{{"refresh_token": "{REFRESH}"}}', keys),
        ([*put, "--url", url, "--expires-in", "x"], good, keys),
        ([*put, "--url", url, "--expires-at", "x"], good, keys),
        ([*put, "--url", url], good, f"{keys},x:{base64.b64encode(KEY[:30]).decode()}"),
        ([*put, "--url", url], good, ""),
        (["show", "github", "u1", "--reveal", "--url", url], "", _entry("third", OTHER_KEY)),
        (["show", "github", "u1", "--reveal", "--url", url, "--unknown"], "", keys),
        (["show", "github", "nobody", "--reveal", "--url", url], "", keys),
        (["list", server], "", keys),
        (["refresh-due", "--url", url, "--refreshers", "planted_refreshers:refreshers"], "", keys),
        (["refresh-due", "--url", url, "--refreshers", "planted_refreshers:broken"], "", keys),
        (["refresh-due", "--url", url, "--refreshers", "planted_refreshers:absent"], "", keys),
    ]
    runner = CliRunner()
    environment = {KEYS_VARIABLE: keys, "TOKENSTORE_URL": None}
    for arguments, stdin in ((["init"], ""), ([*put, "--expires-in", "1"], good)):
        assert runner.invoke(app, [*arguments, "--url", url], input=stdin, env=environment).exit_code == 0
    for arguments, stdin, used in runs:
        result = runner.invoke(app, arguments, input=stdin, env={**environment, KEYS_VARIABLE: used})
        assert result.exit_code in (1, 2, 3, 4, 5), result.output
        assert isinstance(result.exception, SystemExit)
        walk.through(result.exception, " ".join(arguments).replace(PASSWORD, "…"))
