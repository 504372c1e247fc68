"""``tokenstore demo``: its results on every database, and that it leaves no table, process or file behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect

from support.database import Place, app_engine
from support.matrix import Row, params, sqlite_row
from tokenstore import Keyring, open_store

COMMAND = [sys.executable, "-m", "tokenstore", "demo"]
SMALL = ["--processes", "3", "--tasks", "8"]


def run_demo(*options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the demo with a new folder for temporary files."""
    return subprocess.run(
        [*COMMAND, *options],
        env=os.environ | {"TMPDIR": str(folder), "TOKENSTORE_URL": "postgresql://nobody@127.0.0.1:1/nothing"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def tables(place: Place) -> set[str]:
    """Return the tables of a database."""

    async def read() -> set[str]:
        async with app_engine(place) as engine, engine.connect() as connection:
            return set(await connection.run_sync(lambda sync: inspect(sync).get_table_names()))

    return asyncio.run(read())


def check(report: dict[str, Any], total: int) -> None:
    """Check the values that every report must have."""
    fresh, row_lock, neither = report["fresh"], report["row_lock"], report["neither"]
    assert report["passed"]
    assert fresh.pop("connections") == 0
    assert 1 <= row_lock.pop("connections") <= report["processes"]
    for found in (fresh, row_lock):
        waits = found.pop("wait_p50"), found.pop("wait_max")
        assert 0 < waits[0] <= waits[1]
        assert waits[1] >= report["latency"] * 0.9
        assert found == {
            "requests": 1,
            "refreshes": 1,
            "reuses": 0,
            "grant_alive": True,
            "refreshed": 1,
            "waited": total - 1,
            "working": total,
            "errors": {},
        }
    assert neither["reuses"] >= 1
    assert neither["requests"] == neither["refreshes"] + neither["reuses"]
    assert not neither["grant_alive"]
    assert neither["working"] == 0
    assert neither["connections"] >= 1
    assert neither["refreshed"] + neither["waited"] + sum(neither["errors"].values()) == total


@pytest.mark.parametrize(
    "row", params(names=["sqlite", "postgresql+asyncpg", "mariadb+aiomysql"])
)  # one driver for each database
def test_one_refresh_with_lease_or_lock_a_lost_grant_with_neither_and_no_table_left(
    row: Row, url: str, tmp_path: Path, keyring: Keyring
) -> None:
    """The URL names a table with rows; the demo neither reads nor changes nor drops that table."""

    async def in_use(*, store_one: bool) -> list[str]:
        async with open_store(url, keyring=keyring) as store:
            if store_one:
                await store.setup()
                await store.store_tokens("github", "mine", "at", "rt", None)
            return [entry["user_id"] async for entry in store.list_tokens()]

    assert asyncio.run(in_use(store_one=True)) == ["mine"]
    before = tables(Place(row, url))
    done = run_demo("--json", "--url", url, *SMALL, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    check(json.loads(done.stdout), 24)
    assert tables(Place(row, url)) == before
    assert asyncio.run(in_use(store_one=False)) == ["mine"]


def test_without_a_url_the_demo_uses_a_temporary_file_and_explains_its_result(tmp_path: Path) -> None:
    """This is the README's first command. It uses a temporary SQLite file, also if TOKENSTORE_URL is set."""
    done = run_demo(folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    assert "\x1b" not in done.stdout
    for words in (
        "8 processes with 25 tasks each",
        "199 waited",
        "200 of 200",
        "revoked",
        "Lease and lock held:",
    ):
        assert words in done.stdout


def test_the_demo_prints_no_token_and_no_key(tmp_path: Path) -> None:
    done = run_demo(*SMALL, folder=tmp_path)
    assert not [mark for mark in ("at_", "rt_", "demo-secret", "demo:") if mark in done.stdout + done.stderr]


@pytest.mark.parametrize(
    ("after", "ending"),
    [("processes", signal.SIGINT), ("load_fresh_tokens", signal.SIGINT), ("load_fresh_tokens", signal.SIGTERM)],
    ids=["early-SIGINT", "between-rounds-SIGINT", "between-rounds-SIGTERM"],
)
@sqlite_row
def test_an_interrupted_demo_leaves_no_table_and_no_process(
    row: Row, url: str, tmp_path: Path, after: str, ending: signal.Signals
) -> None:
    before = tables(Place(row, url))
    with subprocess.Popen(
        [*COMMAND, "--url", url, *SMALL],
        env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        while after not in (line := running.stdout.readline()):
            assert line, running.stderr.read()
        if ending is signal.SIGINT:
            os.killpg(running.pid, ending)  # a terminal also sends the signal to the whole process group
        else:
            running.terminate()
        # The demo's processes share the pipes, so reading ends only when the last process has ended.
        _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (128 + ending, "")
    assert tables(Place(row, url)) == before
