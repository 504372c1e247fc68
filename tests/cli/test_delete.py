"""`delete` asks for confirmation."""

from __future__ import annotations

import json

import pytest

from support.command_line import RESPONSE, cli, load
from support.terminal import Terminal


@pytest.mark.parametrize(("answer", "code"), [("n", 1), ("y", 0)])
def test_delete_at_a_terminal_asks_for_confirmation(sqlite: str, answer: str, code: int) -> None:
    cli("put", "github", "u1", url=sqlite, stdin=json.dumps(RESPONSE))
    terminal = Terminal("delete", "github", "u1", url=sqlite)
    terminal.answer("[y/N]", answer)
    assert terminal.finish().code == code
    assert (load(sqlite) is None) is (code == 0)


def test_delete_without_a_terminal_needs_yes(sqlite: str) -> None:
    cli("put", "github", "u1", url=sqlite, stdin=json.dumps(RESPONSE))
    done = cli("delete", "github", "u1", url=sqlite, stdin="y\n")
    assert done.code == 2
    assert "--yes" in done.err
    assert load(sqlite) is not None
