"""What a newcomer who types a page word for word needs: the environment first, whole commands and whole programs."""

from __future__ import annotations

import ast
from pathlib import Path
from textwrap import dedent

import pytest

from support.pages import PAGES, README, TUTORIAL, named, of_kind

WITH_COMMANDS = [page for page in PAGES if page != README and of_kind(page, "console", "console install")]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=named)
def test_the_first_command_enters_the_environment(page: Path) -> None:
    """In the root of a clone, as the README's installation has made it; the page says so. The tutorial makes one."""
    first, *others = of_kind(page, "console", "console install")
    if page == TUTORIAL:
        assert first.text.startswith("python3 -m venv .venv && ")
        first, *_ = others
    assert first.kind == "console"
    assert first.text.splitlines()[0] == ". .venv/bin/activate"
    assert "in the root of a clone" in " ".join(page.read_text("utf-8").split())


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_code_breaks_at_the_end_of_a_line(page: Path) -> None:
    """A command in a sentence would be two commands when it is copied."""
    fenced = False
    for number, line in enumerate(page.read_text("utf-8").splitlines(), start=1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            assert line.count("`") % 2 == 0, f"{named(page)}:{number}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_an_excerpt_is_whole_statements(page: Path) -> None:
    for block in of_kind(page, "python from="):
        assert ast.parse(dedent(block.text)).body, block.place
