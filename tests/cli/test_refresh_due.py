"""`refresh-due`: the rows that it refreshes, its output and its exit codes."""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from support.command_line import ACCESS, NESTED, REFRESH, cli, load, on_store, shows_no_secret
from tokenstore.store import AuthTokenStore

REFRESHERS = f"""
from tokenstore import ProviderRefusedError, ReauthorizationRequiredError

async def refresh(record):
    if record["user_id"] == "u-revoked":
        raise ReauthorizationRequiredError("revoked")
    if record["user_id"] == "u-unlucky":
        raise ProviderRefusedError("blocked")  # an outage would defer the other rows as well
    return {{"access_token": "{ACCESS}", "refresh_token": "{REFRESH}", "expires_in": 3600}}

refreshers = {{"github": refresh}}
secret = "{NESTED}"
broken = None
empty = {{}}
"""


@pytest.fixture
def due(sqlite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a store with three due rows and three others; the current folder has the module of refreshers."""

    async def fill(store: AuthTokenStore) -> None:
        soon, later = (datetime.now(UTC) + timedelta(minutes=minutes) for minutes in (5, 60))
        for number in range(3):
            await store.store_tokens("github", f"u{number}", "old", "ghr", soon)
        await store.store_tokens("github", "u-later", "old", "ghr", later)
        await store.store_tokens("github", "u-none", "old", None, soon)
        await store.store_tokens("gitlab", "u-other", "old", "ghr", soon)

    on_store(sqlite, fill)
    module = tmp_path / "my_refreshers.py"
    module.write_text(REFRESHERS, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command adds the folder to sys.path
    return sqlite


def test_refresh_due_refreshes_what_expires_soon(due: str) -> None:
    """Each row with a refresher, a refresh token and an expiry within the time is refreshed once, and no other row."""
    done = cli("refresh-due", "--within", "10m", "--refreshers", "my_refreshers:refreshers", url=due)
    assert (done.code, done.err) == (0, "")
    assert done.out == "3 refreshed, 1 of gitlab, which has no refresher\n"
    again = cli("refresh-due", "--within", "600", "--refreshers", "my_refreshers:refreshers", url=due)
    assert (again.code, again.out) == (0, "1 of gitlab, which has no refresher\n")
    other = cli("refresh-due", "--provider", "github", "--refreshers", "my_refreshers:refreshers", url=due)
    assert (other.code, other.out) == (0, "nothing due\n")
    for user, expected in (("u0", ACCESS), ("u-later", "old"), ("u-none", "old")):
        record = load(due, user=user)
        assert record is not None
        assert record["access_token"] == expected
    shows_no_secret(done, again)


def test_an_altered_row_does_not_keep_refresh_due_from_the_others(due: str) -> None:
    with closing(sqlite3.connect(due.removeprefix("sqlite:///"))) as connection, connection:
        connection.execute("UPDATE oauth_tokens SET access_token_expires_at = 9223372036854775807 WHERE user_id = 'u1'")
    done = cli("refresh-due", "--within", "10m", "--refreshers", "my_refreshers:refreshers", url=due)
    assert (done.code, done.out) == (5, "1 failed, 2 refreshed, 1 of gitlab, which has no refresher\n")
    assert "user 'u1': access_token_expires_at has a value that no store has written" in done.err


def test_refresh_due_prints_each_row_as_json_and_reports_failures_by_exit_code(due: str) -> None:
    async def fill(store: AuthTokenStore) -> None:
        await store.store_tokens("github", "u-unlucky", "old", "ghr", datetime.now(UTC))

    on_store(due, fill)
    done = cli("refresh-due", "--json", url=due, TOKENSTORE_REFRESHERS="my_refreshers:refreshers")
    assert done.code == 5
    outcomes = {row["user_id"]: row["outcome"] for row in done.rows}
    assert outcomes == {
        **dict.fromkeys(("u0", "u1", "u2"), "refreshed"),
        "u-unlucky": "failed",
        "u-other": "no_refresher",
    }
    [error] = [row["error"] for row in done.rows if row["error"] is not None]
    assert error.startswith("provider 'github', user 'u-unlucky': the provider refuses this client")
    shows_no_secret(done)


def test_a_failure_that_is_known_does_not_fail_the_command_again(due: str) -> None:
    """A refusal whose retry time is still to come is counted, and not called again; a dead row is not even found."""

    async def fill(store: AuthTokenStore) -> None:
        for user in ("u-unlucky", "u-revoked"):
            await store.store_tokens("github", user, "old", "ghr", datetime.now(UTC))

    on_store(due, fill)
    options = {"url": due, "TOKENSTORE_REFRESHERS": "my_refreshers:refreshers"}
    first = cli("refresh-due", "--provider", "github", **options)
    assert (first.code, first.out) == (5, "2 failed, 3 refreshed\n")
    assert sorted(line.split(": ")[1] for line in first.err.splitlines()) == [
        "provider 'github', user 'u-revoked'",
        "provider 'github', user 'u-unlucky'",
    ]
    again = cli("refresh-due", "--provider", "github", **options)
    assert (again.code, again.err) == (0, "")
    assert again.out == "1 deferred after an earlier failure\n"
    told = {row["user_id"]: row for row in cli("refresh-due", "--provider", "github", "--json", **options).rows}
    assert {user: row["outcome"] for user, row in told.items()} == {"u-unlucky": "deferred"}
    shows_no_secret(first, again)


def test_an_expired_refresh_token_does_not_fail_the_command(due: str) -> None:
    async def fill(store: AuthTokenStore) -> None:
        now = datetime.now(UTC)
        await store.store_tokens("github", "u-expired", "old", "ghr", now, now - timedelta(days=1))

    on_store(due, fill)
    options = {"url": due, "TOKENSTORE_REFRESHERS": "my_refreshers:refreshers"}
    done = cli("refresh-due", "--provider", "github", "--json", **options)
    assert done.code == 0
    [dead] = [row for row in done.rows if row["outcome"] == "dead"]
    assert dead["user_id"] == "u-expired"
    assert "the user has to log in again" in dead["error"]
    again = cli("refresh-due", "--provider", "github", **options)
    assert again.out == "1 without a usable refresh token, so the user has to log in again\n"


def test_a_file_in_the_current_folder_takes_the_place_of_no_module(due: str, tmp_path: Path) -> None:
    (tmp_path / "tabnanny.py").write_text("raise ValueError('of the current folder')", "utf-8")
    (tmp_path / "more_refreshers.py").write_text("import tabnanny\nfrom my_refreshers import refreshers\n", "utf-8")
    done = cli("refresh-due", "--refreshers", "more_refreshers:refreshers", url=due)
    assert (done.code, done.out, done.err) == (0, "3 refreshed, 1 of gitlab, which has no refresher\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--within", "soon"], "--within must be a time such as 90s, 10m, 2h or 1d"),
        ([], "no refreshers: pass --refreshers MODULE:NAME or set TOKENSTORE_REFRESHERS"),
        (["--refreshers", "my_refreshers"], "no refreshers: pass"),
        (["--refreshers", "nowhere:refreshers"], "nowhere:refreshers cannot be imported (ModuleNotFoundError)"),
        (["--refreshers", "my_refreshers:absent"], "my_refreshers:absent cannot be imported (AttributeError)"),
        (["--refreshers", "my_refreshers:secret"], "my_refreshers:secret must be a mapping"),
        (["--refreshers", "my_refreshers:empty"], "my_refreshers:empty has no refreshers"),
        (["--refreshers", "my_refreshers:refreshers", "--provider", "gitlab"], "no refresher for provider 'gitlab'"),
    ],
)
def test_the_error_of_refresh_due_names_the_option_to_correct(due: str, arguments: list[str], message: str) -> None:
    done = cli("refresh-due", *arguments, url=due)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    shows_no_secret(done)
