"""`--account` of the commands that name a row, and the account in what the commands print."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from support.command_line import ACCESS, REFRESH, RESPONSE, cli, on_store
from support.matrix import Row, shared_rows
from support.terminal import Terminal
from tokenstore.store import AuthTokenStore


def _put(url: str, *accounts: str) -> None:
    for account in accounts:
        done = cli("put", "github", "u1", "--account", account, url=url, stdin=json.dumps(RESPONSE))
        assert done.code == 0, done.err


@shared_rows
def test_each_command_works_on_one_account(row: Row, url: str) -> None:
    """Without `--account` it is the empty account."""
    cli("init", url=url)
    stored = cli("put", "github", "u1", "--account", "work", "--json", url=url, stdin=json.dumps(RESPONSE))
    assert stored.rows[0]["account"] == "work"
    assert cli("show", "github", "u1", url=url).code == 1
    assert cli("delete", "github", "u1", "--yes", url=url).code == 1
    _put(url, "")
    for options, account in ((["--account", "work"], "work"), ([], "")):
        [shown] = cli("show", "github", "u1", *options, "--json", url=url).rows
        assert shown["account"] == account
    assert [entry["account"] for entry in cli("list", "--json", url=url).rows] == ["", "work"]
    deleted = {"provider": "github", "user_id": "u1", "account": "work", "deleted": True}
    assert cli("delete", "github", "u1", "--account", "work", "--yes", "--json", url=url).rows == [deleted]
    assert [entry["account"] for entry in cli("list", "--json", url=url).rows] == [""]
    again = cli("delete", "github", "u1", "--account", "work", "--yes", url=url)
    assert (again.code, again.err) == (1, "error: no tokens of provider 'github', user 'u1', account 'work'\n")


def test_the_text_of_show_and_list_names_the_account(sqlite: str) -> None:
    """`show` names it only if it is not empty."""
    _put(sqlite, "", "at\x1bwork")
    listed = cli("list", url=sqlite).out
    heading, *rows = listed.splitlines()
    assert heading.split()[:3] == ["PROVIDER", "USER", "ACCOUNT"]
    assert ["at\\x1bwork" in one for one in rows] == [False, True]
    assert "account" not in cli("show", "github", "u1", url=sqlite).out
    assert "at\\x1bwork" in cli("show", "github", "u1", "--account", "at\x1bwork", url=sqlite).out


def test_the_prompt_of_delete_names_the_account(sqlite: str) -> None:
    _put(sqlite, "", "work")
    terminal = Terminal("delete", "github", "u1", "--account", "work", url=sqlite)
    terminal.answer("user 'u1', account 'work'? The refresh token cannot be recovered. [y/N]", "y")
    assert terminal.finish().code == 0
    assert [entry["account"] for entry in cli("list", "--json", url=sqlite).rows] == [""]


def test_an_account_that_is_not_acceptable_is_a_usage_error(sqlite: str) -> None:
    for command in ("put", "show", "delete --yes"):
        name, *options = command.split()
        done = cli(name, "github", "u1", *options, "--account", "a" * 256, url=sqlite, stdin=json.dumps(RESPONSE))
        assert (done.code, done.err) == (2, "error: account has 256 bytes as UTF-8; at most 255 are allowed\n")


def test_refresh_due_prints_the_account_of_each_row(
    sqlite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each JSON object, also for rows without a refresher, and in each error."""

    async def fill(store: AuthTokenStore) -> None:
        soon = datetime.now(UTC) + timedelta(minutes=5)
        for provider, account in (("github", ""), ("github", "gone"), ("github", "work"), ("gitlab", "work")):
            await store.store_tokens(provider, "u1", "old", "ghr", soon, account=account)

    on_store(sqlite, fill)
    (tmp_path / "account_refreshers.py").write_text(
        f"""
from tokenstore import ReauthorizationRequiredError

async def refresh(record):
    if record["account"] == "gone":
        raise ReauthorizationRequiredError("gone")
    return {{"access_token": "{ACCESS}", "refresh_token": "{REFRESH}", "expires_in": 3600}}

refreshers = {{"github": refresh}}
""",
        "utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    done = cli("refresh-due", "--json", "--refreshers", "account_refreshers:refreshers", url=sqlite)
    assert done.code == 5
    told = {(row["provider"], row["user_id"], row["account"]): row for row in done.rows}
    assert {key: row["outcome"] for key, row in told.items()} == {
        ("github", "u1", ""): "refreshed",
        ("github", "u1", "gone"): "failed",
        ("github", "u1", "work"): "refreshed",
        ("gitlab", "u1", "work"): "no_refresher",
    }
    assert "user 'u1', account 'gone'" in told["github", "u1", "gone"]["error"]
