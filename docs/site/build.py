"""Build the documentation's site: ``python docs/site/build.py [FOLDER]`` writes it to the folder ``site`` in FOLDER.

The pages are those that readers find in the repository. They are copied, with the repository's folders and the source
files that they link to, so that every link leads to the same file on the site. A link to a missing page or heading
fails the build, and so does a docstring that names an unknown Python object.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_FOLDER = ROOT / "build" / "docs"

_COPIED = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "docs", "examples")
# The info string of a fenced block says how it is tested (tests/support/pages.py). The site needs its language, and
# shows the name of a file that the reader saves.
_FENCE = re.compile(r"^```(\w+)(?: (?:(?:file|from)=(\S+)|\w+))?$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]+)\]\(([^)\s#]*)[^)]*\)")


def _copy_pages(pages: Path) -> None:
    for name in _COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("site", "templates", "__pycache__", ".*", "*.egg-info", "build")
            shutil.copytree(ROOT / name, pages / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, pages / name)
    for page in [*pages.rglob("*.md")]:
        text = page.read_text("utf-8")
        page.write_text(_FENCE.sub(_fence, text), "utf-8")
        for _, link in _LINK.findall(text):
            copy = (page.parent / link).resolve()
            if copy.is_relative_to(pages) and not copy.exists() and (ROOT / copy.relative_to(pages)).is_file():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / copy.relative_to(pages), copy)


def _fence(match: re.Match[str]) -> str:
    language, path = match.groups()
    language = "bash" if language == "console" else language  # `console` would be commands after prompts
    return f"```{language}" + (f' title="{path}"' if path else "")


def navigation(entries: list[Any], group: str = "") -> Iterator[tuple[str, Path]]:
    """Yield the top-level group and the path of each page of the navigation.

    Args:
        entries: The value of ``nav`` in zensical.toml.
        group: The top-level group that the entries belong to.
    """
    for entry in entries:
        if isinstance(entry, str):
            yield group, Path(entry)
        else:
            for title, below in entry.items():
                yield from navigation(below, group or title)


def summary(text: str) -> tuple[str, str]:
    """Return a page's title and the first sentence below it, without links."""
    title, _, body = text.partition("\n")
    [paragraph, *_] = re.split(r"\n\s*\n", body.strip())
    paragraph = _LINK.sub(r"\1", " ".join(paragraph.split()))
    sentence, *_ = re.split(r"(?<=\.) ", paragraph)
    return title.removeprefix("# "), sentence.rstrip(":.") + "."


def llms_txt() -> str:
    """Return the text of ``llms.txt`` (https://llmstxt.org): every page of the navigation, with what it is about."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    config = tomllib.loads((ROOT / "docs" / "site" / "zensical.toml").read_text("utf-8"))["project"]
    lines = [f"# {project['name']}", "", f"> {project['description']}."]
    last = None
    for group, path in navigation(config["nav"]):
        if group != last:
            lines += ["", f"## {group}"] if group else []
            lines.append("")
            last = group
        title, sentence = summary((ROOT / path).read_text("utf-8"))
        lines.append(f"- [{title}]({path.as_posix()}): {sentence}")
    return "\n".join([*lines, ""])


def build(folder: Path) -> int:
    """Build the site, and return the exit code.

    Args:
        folder: The site is in its folder ``site``, and what it is made of in ``pages``. Both are made anew.
    """
    pages, site = folder / "pages", folder / "site"
    for made in (pages, site, folder / ".cache"):
        shutil.rmtree(made, ignore_errors=True)
    pages.mkdir(parents=True)
    _copy_pages(pages)
    for name in ("zensical.toml", "roles.py"):
        shutil.copy(ROOT / "docs" / "site" / name, folder)
    # mkdocstrings reads the source files; it imports nothing.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")])}
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=folder, env=environment, check=False)  # noqa: S603 - a fixed command
    if done.returncode:
        return done.returncode
    (site / "llms.txt").write_text(llms_txt(), "utf-8")
    for page in pages.rglob("*.md"):  # the Markdown that llms.txt links to
        shutil.copy(page, site / page.relative_to(pages))
    return 0


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]).resolve() if sys.argv[1:] else DEFAULT_FOLDER))
