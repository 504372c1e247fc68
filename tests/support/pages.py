"""The pages of the documentation: README.md, docs/ and examples/.

The info string of a fenced block decides what happens to it. The blocks of a page run in order in one new folder, each
with the environment variables that the blocks before it exported:

* ``python``: a whole program, run with warnings as errors. ``console``: commands, run by bash.
* ``console install``: needs the package index or a clone, so its commands are checked and not run here;
  test_readme_commands.py runs those of the README.
* ``python file=PATH``: the reader saves this file, and later blocks use it.
* ``python from=PATH``, ``toml from=PATH``: an excerpt of that file of the repository, word for word.
* ``python contract``: the contract's example, run on every database in its own session.
* ``text demo``: lines that ``tokenstore demo`` prints, with any numbers.

Every other info string is an error. Every Python program can also be pasted at Python's prompt, where a blank line ends
an indented block.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from support.paths import DOCS, ROOT

README = ROOT / "README.md"
BACKENDS, CLI, ERRORS, KEYS, LIMITS, LOCKING, OPTIONS, PROVIDERS, REFRESH, SCHEMA, SEALING = (
    DOCS / f"{name}.md"
    for name in (
        "backends",
        "cli",
        "errors",
        "keys",
        "limits",
        "locking",
        "options",
        "providers",
        "refresh",
        "schema",
        "sealing",
    )
)
EXAMPLE = ROOT / "examples" / "tokenstore-jsonfile"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
LINKED = [*PAGES, *sorted({*ROOT.glob("*.md")} - {README}), *sorted((ROOT / "examples").rglob("*.md"))]
KINDS = [
    "python",
    "python contract",
    "python file=",
    "python from=",
    "toml from=",
    "console",
    "console install",
    "text demo",
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block: its place, its kind as in ``KINDS``, the path after ``=`` in its info string, and its lines."""

    place: str
    kind: str
    path: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = []
    lines = enumerate(page.read_text("utf-8").splitlines(), start=1)
    for number, line in lines:
        if not line.startswith("```"):
            continue
        before, equals, path = line.removeprefix("```").partition("=")
        body = []
        for _, inner in lines:
            if inner.startswith("```"):
                break
            body.append(inner)
        found.append(Block(f"{named(page)}:{number}", before + equals, path, "\n".join([*body, ""])))
    return found


def of_kind(page: Path, *kinds: str) -> list[Block]:
    return [block for block in blocks(page) if block.kind in kinds]


def table(page: Path, header: str) -> list[list[str]]:
    """The cells of the one table whose first header cell is this, without its two header lines."""
    rows = []
    inside = False
    for line in page.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells and not inside:
            inside = cells[0] == header
        elif inside and cells:
            rows.append(cells)
        elif not cells:
            inside = False
    assert rows, f"{named(page)} has no table that begins with {header!r}"
    return rows[1:]


def codes(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", text)


def prose(page: Path) -> str:
    """The page without its blocks, in one line."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return " ".join(text.split())
