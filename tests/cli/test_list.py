"""`list`: filters, unchanged ids, and an output pipe that is closed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from support.command_line import KEYS, RESPONSE, cli, environment


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
