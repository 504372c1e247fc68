"""The pages of the documentation: README.md, docs/ and examples/.

The info string of a fenced block says how it is tested. The blocks of a page run in order in one new folder, each with
the environment variables that the blocks before it exported:

* ``python``: a complete program, run with warnings as errors. ``console``: commands, run by bash.
* ``console install``: commands that need the package index or a clone; they are checked but not run here.
  test_readme_commands.py runs those of the README.
* ``python file=PATH``: a file that the reader saves, and that later blocks use.
* ``python from=PATH``, ``toml from=PATH``: an excerpt of that file in the repository, word for word.
* ``python contract``: the example of ``AuthTokenStore``, run with a session on every database.
* ``text output``: what the block before it prints, word for word; ``…`` stands for the rest of a line.
* ``text demo``: lines that ``tokenstore demo`` prints, with any numbers.

Any other info string is an error. Every Python program can also be pasted at Python's prompt, where a blank line ends
an indented block.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from support.paths import DOCS, ROOT

README = ROOT / "README.md"
(
    BACKENDS,
    BENCHMARKS,
    CLI,
    ERRORS,
    HTTP_CLIENTS,
    KEYS,
    LIMITS,
    LOCKING,
    OPTIONS,
    PROVIDERS,
    REFRESH,
    SCHEMA,
    SEALED_FORMAT,
    SEALING,
    STACKS,
    SYNC,
    TESTING,
    TUTORIAL,
    VALUES,
) = (
    DOCS / f"{name}.md"
    for name in (
        "backends",
        "benchmarks",
        "cli",
        "errors",
        "http-clients",
        "keys",
        "limits",
        "locking",
        "options",
        "providers",
        "refresh",
        "schema",
        "sealed-format",
        "sealing",
        "stacks",
        "sync",
        "testing",
        "tutorial",
        "values",
    )
)
EXAMPLE = ROOT / "examples" / "tokenstore-jsonfile"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
# These show the docstrings, on the site.
REFERENCES = sorted((DOCS / "reference").glob("*.md"))
LINKED = [*PAGES, *REFERENCES, *sorted({*ROOT.glob("*.md")} - {README}), *sorted((ROOT / "examples").rglob("*.md"))]
KINDS = [
    "python",
    "python contract",
    "python file=",
    "python from=",
    "toml from=",
    "console",
    "console install",
    "text demo",
    "text output",
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        place: The page and the line.
        kind: The kind, as in ``KINDS``.
        path: The path after ``=`` in the info string, or an empty string.
        text: The lines inside the block.
    """

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
    """Return the cells of the only table with this first header cell, without the two header lines."""
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
    """Return all texts between backticks."""
    return re.findall(r"`([^`]+)`", text)


def prose(page: Path) -> str:
    """Return the page without its blocks, as one line."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return " ".join(text.split())
