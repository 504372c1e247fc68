"""`list`: filters, unchanged ids, and an output pipe that is closed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from support.command_line import KEYS, RESPONSE, cli, environment
from tokenstore import BackendUnavailableError
from tokenstore.records import ScannedRow
from tokenstore_sql.sqlite.backend import SQLiteBackend


def test_list_filters(sqlite: str) -> None:
    for provider, user in (("github", "u1"), ("github", "u2"), ("gitlab", "u1")):
        cli("put", provider, user, url=sqlite, stdin=json.dumps(RESPONSE))

    def keys(*options: str) -> list[tuple[str, str]]:
        return [(row["provider"], row["user_id"]) for row in cli("list", "--json", *options, url=sqlite).rows]

    assert keys() == [("github", "u1"), ("github", "u2"), ("gitlab", "u1")]
    assert keys("--provider", "github") == [("github", "u1"), ("github", "u2")]
    assert keys("--user", "u1") == [("github", "u1"), ("gitlab", "u1")]
    assert keys("--user", "u2", "--provider", "gitlab") == []


def test_ids_are_not_truncated_at_any_terminal_width(sqlite: str) -> None:
    user = "u" * 500
    cli("put", "github", user, url=sqlite, stdin=json.dumps(RESPONSE))
    assert cli("list", "--json", url=sqlite, COLUMNS="20").rows[0]["user_id"] == user
    assert user in cli("list", url=sqlite, COLUMNS="20").out
    assert user in cli("show", "github", user, url=sqlite, COLUMNS="20").out


def test_an_id_cannot_control_the_terminal(sqlite: str) -> None:
    """An id can contain anything; escape sequences, markup and reversed text are printed as plain text."""
    user = "\x1b[2J\u202e[red]\n"
    cli("put", "github", user, url=sqlite, stdin=json.dumps(RESPONSE))
    for arguments in (["list"], ["list", "--json"], ["show", "github", user], ["show", "github", user + "?"]):
        done = cli(*arguments, url=sqlite)
        assert not {"\x1b", "\u202e"} & {*done.out, *done.err}
        assert "[red]" in done.out + done.err


def test_list_of_an_empty_store_prints_no_json(sqlite: str) -> None:
    assert cli("list", "--json", url=sqlite) == (0, "", "")


@pytest.mark.parametrize("options", [["--json"], []], ids=["json", "table"])
def test_a_closed_output_pipe_ends_the_list_without_an_error(filled: str, options: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tokenstore", "list", *options],
        env=environment(filled, KEYS),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Unbuffered, because the buffer of Python 3.15 has 128 KiB and would read the whole list.
        bufsize=0,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait(60) == 141


@pytest.mark.parametrize("options", [["--json"], []], ids=["json", "table"])
def test_rows_are_printed_before_all_of_them_were_read(
    filled: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database fails in the middle; the rows of the pages before are in the output, one in each line."""
    pages = 0
    scan = SQLiteBackend.scan

    async def failing(self: SQLiteBackend, **arguments: Any) -> list[ScannedRow]:
        nonlocal pages
        pages += 1
        if pages == 3:
            raise BackendUnavailableError("the database is unavailable")
        return await scan(self, **arguments)

    monkeypatch.setattr(SQLiteBackend, "scan", failing)
    done = cli("list", *options, url=filled)
    assert done.code == 3
    lines = done.out.splitlines()
    assert len(lines) == 1000 + (not options)
    assert all(f"user-{number:04}" in line for number, line in enumerate(lines[-1000:]))


def test_the_columns_of_a_table_are_aligned(sqlite: str) -> None:
    for provider, user in (("github", "u1"), ("gitlab-self-hosted", "日本"), ("slack", "a longer name")):
        cli("put", provider, user, url=sqlite, stdin=json.dumps(RESPONSE))
    heading, *lines = cli("list", url=sqlite).out.splitlines()
    assert heading.index("USER") == lines[0].index("u1") == lines[1].index("日本") == lines[2].index("a longer")
    # Each of the two characters takes two cells of a terminal.
    assert heading.index("ACCESS") - 2 == lines[1].index("20")
    assert lines[0].rstrip() == lines[0]
