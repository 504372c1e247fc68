"""`--namespace` and TOKENSTORE_NAMESPACE: what the commands seal and open."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from support.command_line import KEYS, RESPONSE, cli, on_store
from tokenstore import Keyring, open_store
from tokenstore.store import AuthTokenStore

REFRESHERS = """
async def refresh(record):
    return {"access_token": "new", "refresh_token": "new", "expires_in": 3600}

refreshers = {"github": refresh}
"""


def test_put_and_show_seal_and_open_in_the_namespace(sqlite: str) -> None:
    """The option overrides the variable, also with the empty name, and may stand before the command."""
    put = ("put", "github", "u1")
    show = ("show", "github", "u1")
    ours = {"url": sqlite, "TOKENSTORE_NAMESPACE": "ours"}
    for arguments, variables in (([], ours), (["--namespace", "ours"], {"url": sqlite})):
        stored = cli(*arguments, *put, stdin=json.dumps(RESPONSE), **variables)
        assert stored.code == 0, stored.err
        assert cli(*show, **ours).code == 0
        assert cli(*show, "--namespace", "ours", url=sqlite).code == 0
        assert cli("--namespace", "theirs", *show, "--namespace", "ours", url=sqlite).code == 0
        for options in (["--namespace", ""], ["--namespace", "theirs"]):
            done = cli(*show, *options, **ours)
            assert (done.code, done.out) == (4, "")
            assert "sealed in another namespace" in done.err
        assert cli(*show, url=sqlite).code == 4
    assert cli("list", url=sqlite).code == 0
    assert cli("delete", "github", "u1", "--yes", url=sqlite).code == 0


def test_a_namespace_that_is_not_acceptable_is_a_usage_error(sqlite: str) -> None:
    done = cli("show", "github", "u1", "--namespace", "a" * 256, url=sqlite)
    assert (done.code, done.err) == (2, "error: namespace has 256 bytes as UTF-8; at most 255 are allowed\n")


def test_refresh_due_refreshes_in_the_namespace(sqlite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another one, each row is a failure that the exit code tells."""

    async def fill(_: AuthTokenStore) -> None:
        async with open_store(sqlite, keyring=Keyring.from_string(KEYS), namespace="ours") as store:
            await store.store_tokens("github", "u1", "old", "ghr", datetime.now(UTC) + timedelta(minutes=5))

    on_store(sqlite, fill)
    (tmp_path / "namespace_refreshers.py").write_text(REFRESHERS, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command adds the folder to sys.path
    command = ("refresh-due", "--refreshers", "namespace_refreshers:refreshers")
    failed = cli(*command, url=sqlite)
    assert (failed.code, failed.out) == (5, "1 failed\n")
    assert "sealed in another namespace" in failed.err
    done = cli(*command, "--namespace", "ours", url=sqlite)
    assert (done.code, done.out) == (0, "1 refreshed\n")
