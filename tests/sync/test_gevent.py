"""The store without ``await`` in a process that gevent has patched, with real greenlets."""

from __future__ import annotations

import asyncio

import pytest

from support.matrix import Row, params
from support.sync_stores import run_program
from tokenstore import Keyring, open_store

_rows = pytest.mark.parametrize("row", params(names=["sqlite", "postgresql+asyncpg", "postgresql+psycopg"]))

_PROGRAM = """
from gevent import monkey
monkey.patch_all()
import asyncio, os, sys, threading, gevent
from datetime import UTC, datetime, timedelta
from tokenstore import Keyring, UnsupportedOperationError
from tokenstore.sync import open_store
from tokenstore.sync.loop_thread import loop_thread
opened = threading.Event()
calls = []
NEW = {"access_token": "new", "refresh_token": "next", "expires_in": 3600}
def get_native_id():
    return threading.get_native_id()
main = get_native_id()
def plain(record):
    calls.append(record["user_id"])
    opened.wait()  # of a greenlet
    return NEW
async def refresh(record):
    calls.append(record["user_id"])
    assert get_native_id() != main
    while not opened.is_set(): await asyncio.sleep(0.005)
    return NEW
url = sys.argv[1]
store = open_store(url, keyring=Keyring({"k1": bytes(range(32))}), lock_timeout=60,
                   refreshers={"plain": plain, "async": refresh})
store.setup()
USERS = 10
past = datetime.now(UTC) - timedelta(hours=1)
for provider in ("plain", "async"):
    for user in range(USERS):
        store.store_tokens(provider, f"{user}", "old", "refresh", past, extra={"expires_in": 3600})
turns = 0
def ticker():
    global turns
    while True:
        turns += 1
        gevent.sleep(0.001)
gevent.spawn(ticker)
# 100 greenlets at once, whose timeouts end before the refreshes do.
def impatient(number):
    provider = "plain" if number % 2 else "async"
    with gevent.Timeout(0.2, False):
        store.load_fresh_tokens(provider, f"{number // 2 % USERS}")
        return "loaded"
    return "timed out"
waiting = [gevent.spawn(impatient, number) for number in range(100)]
gevent.joinall(waiting, timeout=60, raise_error=True)
assert {greenlet.value for greenlet in waiting} == {"timed out"}, [greenlet.value for greenlet in waiting]
assert turns > 2, "other greenlets ran meanwhile"
opened.set()
def patient(number):
    provider = "plain" if number % 2 else "async"
    return store.load_fresh_tokens(provider, f"{number // 2 % USERS}")["access_token"]
waiting = [gevent.spawn(patient, number) for number in range(100)]
gevent.joinall(waiting, timeout=60, raise_error=True)
assert [greenlet.value for greenlet in waiting] == ["new"] * 100
assert len(calls) == 2 * USERS, "each refresh went on, and was made once"
# Transactions wait for each other, and for no other greenlet.
store.store_tokens("github", "shared", "0", None, None)
def count(_):
    with store.transaction() as tx:
        counted = int(tx.load_tokens("github", "shared", for_update=True)["access_token"])
        gevent.sleep(0)
        tx.store_tokens("github", "shared", str(counted + 1), None, None)
waiting = [gevent.spawn(count, number) for number in range(100)]
gevent.joinall(waiting, timeout=60, raise_error=True)
assert store.load_tokens("github", "shared")["access_token"] == "100"
with store.transaction() as tx:
    tx.load_tokens("github", "shared", for_update=True)
    def blocked():
        with gevent.Timeout(0.1, False), store.transaction() as other:
            other.load_tokens("github", "shared", for_update=True)
            raise AssertionError
    gevent.spawn(blocked).get(timeout=60)
    tx.store_tokens("github", "shared", "last", None, None)
assert store.load_tokens("github", "shared")["access_token"] == "last"
assert len(list(store.list_tokens(page_size=7))) == 2 * USERS + 1
# Errors, and threads of gevent's pool.
pool = gevent.get_hub().threadpool
assert pool.apply(store.load_tokens, ("github", "shared"))["access_token"] == "last"
assert pool.apply(get_native_id) != main
assert loop_thread().call(lambda: asyncio.to_thread(get_native_id)) != main
async def main_of_an_event_loop():
    try: store.load_tokens("github", "shared")
    except UnsupportedOperationError: return
    raise AssertionError
asyncio.run(main_of_an_event_loop())
# Plain refreshers leave no descriptors behind.
def descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
before = descriptors()
for user in range(USERS):
    store.load_fresh_tokens("plain", f"{user}", force=True, force_min_age=0)
assert descriptors() <= before + 3
# A forked process, with a loop thread of its own.
if (pid := os.fork()) == 0:
    code = 1
    try:
        store.store_tokens("github", "child", "access", None, None)
        store.close()
        code = 0
    finally:
        os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert store.load_tokens("github", "child")["access_token"] == "access"
# The process ends while a token is refreshed in the background.
opened.clear()
soon = datetime.now(UTC) + timedelta(seconds=90)
store.store_tokens("plain", "last", "old", "refresh", soon, extra={"expires_in": 3600})
assert store.load_fresh_tokens("plain", "last")["access_token"] == "old"
gevent.spawn_later(0.1, opened.set)
print("done")
"""


@_rows
def test_100_greenlets_share_the_refreshes_and_a_timeout_stops_a_waiter_but_no_refresh(
    row: Row, url: str, keyring: Keyring
) -> None:
    """Transactions, iterators, threads of gevent's pool and a fork work, too.

    The end of the process waits for a refresh in the background, and no warning is written.
    """
    assert run_program(_PROGRAM, url) == "done\n"

    async def stored() -> str | None:
        async with open_store(url, keyring=keyring) as store:
            record = await store.load_tokens("plain", "last")
        assert record is not None
        return record["refresh_token"]

    assert asyncio.run(stored()) == "next"
