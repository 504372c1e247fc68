"""The site has every page and every public name, and llms.txt says what each page is about."""

from __future__ import annotations

import importlib
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

import tokenstore.integrations
from support.pages import LINKED, REFERENCES, named
from support.paths import DOCS, ROOT
from support.site import builder

BUILDER = builder()
NAVIGATION = tomllib.loads((DOCS / "site" / "zensical.toml").read_text("utf-8"))["project"]["nav"]
DIRECTIVES = [
    name for page in REFERENCES for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), flags=re.MULTILINE)
]
# Without those of which the reference shows some members only.
COMPLETE = [
    name
    for page in REFERENCES
    for name in re.findall(r"^::: (\S+)$(?!\n +options:\n +members:)", page.read_text("utf-8"), flags=re.MULTILINE)
]
INTEGRATIONS = [
    module.name
    for module in pkgutil.iter_modules(tokenstore.integrations.__path__, "tokenstore.integrations.")
    if not module.name.rpartition(".")[2].startswith("_")
]


def test_every_page_is_in_the_navigation_once() -> None:
    listed = [path.as_posix() for _, path in BUILDER.navigation(NAVIGATION)]
    assert sorted(listed) == sorted(named(page) for page in LINKED), "see `nav` in docs/site/zensical.toml"


def test_the_pages_have_the_groups_of_diataxis() -> None:
    groups = list(dict.fromkeys(group for group, _ in BUILDER.navigation(NAVIGATION)))
    assert groups == ["", "Tutorial", "How-to guides", "Explanation", "Operations", "Reference", "Project"]


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_a_page_begins_with_a_sentence_that_says_what_it_is_about(page: Path) -> None:
    """llms.txt has this sentence. A heading, a list or a block is none."""
    title, sentence = BUILDER.summary(page.read_text("utf-8"))
    assert re.fullmatch(r"[^#\n]{4,70}", title)
    assert re.fullmatch(r"[A-Z`*][^\n]{25,300}\.", sentence), sentence
    assert not re.search(r"\]\(|```|\.\.$", sentence)


def test_llms_txt_has_each_page_with_its_sentence() -> None:
    """The lines are links to the Markdown files, below headings of the navigation's groups (https://llmstxt.org)."""
    title, summary, *lines = [line for line in BUILDER.llms_txt().splitlines() if line]
    assert title == "# tokenstore"
    assert summary.startswith("> ")
    entries = [line for line in lines if not line.startswith("## ")]
    found = [re.fullmatch(r"- \[(.+)\]\((\S+\.md)\): (.+)", entry) for entry in entries]
    assert [match and match[2] for match in found] == [path.as_posix() for _, path in BUILDER.navigation(NAVIGATION)]
    for match in found:
        assert match is not None
        assert (match[1], match[3]) == BUILDER.summary((ROOT / match[2]).read_text("utf-8"))


@pytest.mark.parametrize("package", ["tokenstore", "tokenstore.sync", "tokenstore.testing"])
def test_the_reference_has_every_public_name(package: str) -> None:
    """Each name has a directive of mkdocstrings, or the module or package of its definition has one."""
    module = importlib.import_module(package)
    for name in module.__all__:
        home = getattr(module, name).__module__
        homes = {f"{package}.{name}", home, home.rpartition(".")[0]} - {package}
        assert homes & {*COMPLETE}, f"docs/reference has no `::: {package}.{name}`"


@pytest.mark.parametrize("module", [*INTEGRATIONS, "tokenstore.protocol"])
def test_the_reference_has_every_public_module(module: str) -> None:
    assert module in DIRECTIVES, f"docs/reference has no `::: {module}`"


def test_the_reference_has_each_name_once() -> None:
    assert len(DIRECTIVES) == len({*DIRECTIVES})
