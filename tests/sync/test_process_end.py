"""When a process ends, ``atexit`` closes its stores without ``await``, and no warning is written."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from support.matrix import Row, params
from support.sync_stores import run_program
from tokenstore import Keyring, open_store
from tokenstore.testing.provider import StrictRotatingProvider

_rows = pytest.mark.parametrize("row", params(names=["sqlite", "postgresql+asyncpg", "postgresql+psycopg"]))
_sqlite = pytest.mark.parametrize("row", params(names=["sqlite"]))

_STORE = """
import asyncio, atexit, json, sys, threading, time, urllib.parse, urllib.request
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from tokenstore import Keyring
from tokenstore.sync import open_store
url, token_url, client_id, client_secret, refresh_token = sys.argv[1:]
requested = threading.Event()
def plain(record):
    form = {"grant_type": "refresh_token", "refresh_token": record["refresh_token"],
            "client_id": client_id, "client_secret": client_secret}
    request = urllib.request.Request(token_url, urllib.parse.urlencode(form).encode())
    requested.set()
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        return json.load(answer)
async def refresh(record):
    # Resolving the name takes a thread, and so does the call itself, when the process is ending.
    await asyncio.get_running_loop().getaddrinfo("localhost", None)
    return await asyncio.to_thread(plain, record)
def open_with(refresher):
    return open_store(url, keyring=Keyring({"k1": bytes(range(32))}), refreshers={"github": refresher})
def load_due(store):
    soon = datetime.now(UTC) + timedelta(seconds=90)
    store.store_tokens("github", "user", "old", refresh_token, soon, extra={"expires_in": 3600})
    assert store.load_fresh_tokens("github", "user")["access_token"] == "old"
"""
_ENDS_AT_ONCE = """
store = open_with({refresher})
load_due(store)
"""
_ENDS_DURING_THE_CALL = """
store = open_with(plain)
load_due(store)
assert requested.wait(30)
"""
_USES_THE_STORE_UNTIL_THE_END = """
store = open_with(plain)
# Python 3.12 starts no thread once the main one has ended, so those of the loop and of connections are there before.
store.store_tokens("github", "other", "a", None, None)
assert store.load_tokens("github", "other")
main_thread = threading.main_thread()
def work():  # goes on when the main thread has ended
    main_thread.join()
    load_due(store)
thread = threading.Thread(target=work)
thread.start()
# Of an application: it was registered later than the library's own, so it is called earlier.
atexit.register(lambda: store.put_value("at", "exit", 1))
"""
_CALLS_AFTER_THE_END = """
from tokenstore import StoreClosedError
store = open_with(plain)
store.load_tokens("github", "user")
from tokenstore.sync import loop_thread
loop_thread._Process.end()
for call in (lambda: store.load_tokens("github", "user"), lambda: next(store.list_tokens())):
    try: call()
    except StoreClosedError as error: assert "process is ending" in str(error)
    else: raise AssertionError
store.close()
"""


@pytest.fixture
def provider() -> Iterator[StrictRotatingProvider]:
    with StrictRotatingProvider(latency=0.5) as provider:
        yield provider


def _run(program: str, url: str, keyring: Keyring, provider: StrictRotatingProvider) -> str:
    """Run a program with a new grant; return the refresh token that its row has afterwards."""

    async def prepare() -> None:
        async with open_store(url, keyring=keyring) as store:
            await store.setup()

    async def stored() -> str:
        async with open_store(url, keyring=keyring) as store:
            record = await store.load_tokens("github", "user")
        return str(record and record["refresh_token"])

    asyncio.run(prepare())
    grant = provider.new_grant("user")
    token_url = provider.token_url.replace("127.0.0.1", "localhost")
    run_program(_STORE + program, url, token_url, provider.client_id, provider.client_secret, grant["refresh_token"])
    found = asyncio.run(stored())
    assert provider.stats().reuses == 0
    return "new" if found not in (grant["refresh_token"], "None") else found


def _ends_at_once(url: str, keyring: Keyring, provider: StrictRotatingProvider, refresher: str) -> None:
    assert _run(_ENDS_AT_ONCE.format(refresher=refresher), url, keyring, provider) == "new"
    assert provider.stats().refreshes == 1


@_rows
def test_a_process_that_ends_waits_for_the_refresh_in_the_background(
    row: Row, url: str, keyring: Keyring, provider: StrictRotatingProvider
) -> None:
    """Also if the refresh has yet to resolve the provider's name, and to start a thread. No warning is written."""
    _ends_at_once(url, keyring, provider, "refresh")


@_sqlite
def test_a_process_that_ends_waits_for_the_refresh_of_a_plain_function(
    row: Row, url: str, keyring: Keyring, provider: StrictRotatingProvider
) -> None:
    _ends_at_once(url, keyring, provider, "plain")


@_sqlite
def test_a_process_that_ends_during_the_call_of_the_provider_waits_for_the_response(
    row: Row, url: str, keyring: Keyring, provider: StrictRotatingProvider
) -> None:
    assert _run(_ENDS_DURING_THE_CALL, url, keyring, provider) == "new"


@_sqlite
def test_the_store_can_be_used_until_the_last_thread_and_exit_function_end(
    row: Row, url: str, keyring: Keyring, provider: StrictRotatingProvider
) -> None:
    assert _run(_USES_THE_STORE_UNTIL_THE_END, url, keyring, provider) == "new"


@_sqlite
def test_a_call_after_the_end_is_an_error(
    row: Row, url: str, keyring: Keyring, provider: StrictRotatingProvider
) -> None:
    assert _run(_CALLS_AFTER_THE_END, url, keyring, provider) == "None"


def test_a_program_that_never_calls_its_store_ends_without_a_thread() -> None:
    program = """
import threading
from tokenstore import Keyring
from tokenstore.sync import open_store
store = open_store("memory://", keyring=Keyring({"k1": bytes(32)}))
assert threading.active_count() == 1
"""
    assert run_program(program) == ""
