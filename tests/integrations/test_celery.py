"""Child processes of Celery's prefork pool, which end after each task, lose no tokens."""

from __future__ import annotations

import asyncio
import builtins
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.signals import worker_process_shutdown

from support.matrix import Row, sqlite_row
from tokenstore import Keyring, MissingDependencyError, TokenRecord, open_store
from tokenstore.integrations import celery
from tokenstore.sync import open_store as open_sync_store
from tokenstore.testing.provider import StrictRotatingProvider

_USERS = [f"user {number}" for number in range(4)]
_LIMIT = 60.0
# The application, as a user of the library writes it. Each task gets a token that is still valid, and ends while the
# provider handles the refresh in the background.
_APPLICATION = """
import faulthandler, json, os, signal, urllib.parse, urllib.request
faulthandler.register(signal.SIGRTMIN)
from celery import Celery
from tokenstore import Keyring
from tokenstore.integrations.celery import install
from tokenstore.sync import open_store
settings = json.loads(os.environ["SETTINGS"])
def refresh(record):
    form = {"grant_type": "refresh_token", "refresh_token": record["refresh_token"], **settings["client"]}
    request = urllib.request.Request(settings["token_url"], urllib.parse.urlencode(form).encode())
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        return json.load(answer)
store = open_store(settings["url"], keyring=Keyring({"k1": bytes(range(32))}), refreshers={"github": refresh})
install(store)
app = Celery("application", broker="filesystem://")
app.conf.broker_transport_options = settings["transport"]
@app.task(name="use")
def use(user):
    assert store.load_fresh_tokens("github", user)["access_token"]
"""


@pytest.fixture
def provider() -> Iterator[StrictRotatingProvider]:
    with StrictRotatingProvider(latency=1.0) as provider:
        yield provider


class _Rows:
    """The rows of the users, with the newest tokens that the test knows of."""

    def __init__(self, url: str, keyring: Keyring) -> None:
        self._url = url
        self._keyring = keyring

    def make_due(self, tokens: dict[str, Any]) -> None:
        """Store tokens that are valid, and within the refresh margin."""

        async def main() -> None:
            async with open_store(self._url, keyring=self._keyring) as store:
                await store.setup()
                soon = datetime.now(UTC) + timedelta(seconds=90)
                for user, (access, refresh) in tokens.items():
                    await store.store_tokens("github", user, access, refresh, soon, extra={"expires_in": 3600})

        asyncio.run(main())

    def read(self) -> dict[str, TokenRecord]:
        async def main() -> dict[str, TokenRecord]:
            async with open_store(self._url, keyring=self._keyring) as store:
                records = {user: await store.load_tokens("github", user) for user in _USERS}
            return {user: record for user, record in records.items() if record is not None}

        return asyncio.run(main())


def _until(condition: Callable[[], bool], worker: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _LIMIT
    while not condition():
        assert worker.poll() is None, log.read_text()
        if time.monotonic() > deadline:
            # The worker and its children write into the log where each of their threads is.
            os.killpg(worker.pid, signal.SIGRTMIN)
            time.sleep(1)
            pytest.fail(log.read_text())
        time.sleep(0.05)


@contextmanager
def _worker(directory: Path, settings: dict[str, Any]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run `celery worker`. It is stopped at the end, with its children."""
    (directory / "application.py").write_text(_APPLICATION)
    log = directory / "worker.log"
    command = [sys.executable, "-m", "celery", "-A", "application", "worker", "--pool=prefork", "--concurrency=2"]
    options = ["--max-tasks-per-child=1", "--loglevel=info", "--without-gossip", "--without-mingle"]
    path = os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [*command, *options],
            cwd=directory,
            env={**os.environ, "SETTINGS": json.dumps(settings), "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield worker, log
    finally:
        try:
            worker.terminate()
            worker.wait(_LIMIT)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


# Once in CI, on the oldest Python. On Python 3.15, for which Celery 5.7 is not made, two of 40 runs hung in Celery: two
# new children waited for the lock of the pool's queue of results, which no living process held.
@pytest.mark.soak
@sqlite_row
def test_children_that_end_after_each_task_lose_no_grant(
    row: Row, url: str, keyring: Keyring, provider: StrictRotatingProvider, tmp_path: Path
) -> None:
    """Each of two rounds refreshes each user's tokens once. In the second one the worker is told to stop meanwhile."""
    rows = _Rows(url, keyring)
    queue, written = tmp_path / "queue", tmp_path / "written"
    folders = {"data_folder_in": queue, "data_folder_out": queue, "control_folder": tmp_path / "c"}
    for folder in (*folders.values(), written):
        folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "url": url,
        "token_url": provider.token_url,
        "client": {"client_id": provider.client_id, "client_secret": provider.client_secret},
        "transport": {"polling_interval": 0.05, **{name: str(folder) for name, folder in folders.items()}},
    }
    app = Celery("application", broker="filesystem://")
    app.conf.broker_transport_options = {**settings["transport"], "data_folder_out": str(written)}
    grants = {user: provider.new_grant(user) for user in _USERS}
    known = {user: grant["refresh_token"] for user, grant in grants.items()}
    rows.make_due({user: (grant["access_token"], grant["refresh_token"]) for user, grant in grants.items()})

    def send() -> None:
        with app.connection_for_write() as connection:
            for user in _USERS:
                app.send_task("use", [user], connection=connection)
        for message in written.iterdir():
            # The worker may look at any time, and ends if it finds half a message.
            message.rename(queue / message.name)

    def all_new() -> bool:
        return all(record["refresh_token"] != known[user] for user, record in rows.read().items())

    with _worker(tmp_path, settings) as (worker, log):
        send()
        _until(all_new, worker, log)
        records = rows.read()
        known = {user: str(record["refresh_token"]) for user, record in records.items()}
        rows.make_due({user: (record["access_token"], record["refresh_token"]) for user, record in records.items()})
        send()
        _until(lambda: provider.stats().refreshes == 2 * len(_USERS), worker, log)
    assert all_new(), log.read_text()
    stats = provider.stats()
    assert (stats.refreshes, stats.reuses, stats.revoked_grants) == (2 * len(_USERS), 0, 0)


def test_a_store_that_is_installed_twice_is_closed_by_one_receiver(keyring: Keyring) -> None:
    """It is closed when a child process ends, and other receivers of the signal are left alone."""
    store, other = (open_sync_store("memory://", keyring=keyring) for _ in range(2))
    receivers: Any = worker_process_shutdown.receivers
    before = list(receivers)
    try:
        celery.install(store)
        celery.install(store)
        celery.install(other)
        assert len(receivers) == len(before) + 2
        worker_process_shutdown.send(sender=None, pid=1, exitcode=0)
        assert (store._is_closed, other._is_closed) == (True, True)
    finally:
        receivers[:] = before


def test_without_celery_the_error_names_the_extra(keyring: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_celery(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "celery":
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_celery)
    with pytest.raises(MissingDependencyError, match=r"tokenstore\[celery\]"):
        celery.install(open_sync_store("memory://", keyring=keyring))
