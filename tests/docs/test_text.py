"""The links, pictures, terms and lengths of the pages."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from support.pages import LINKED, PAGES, README, named, prose
from support.paths import ROOT


def slugs(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as the usual Markdown renderers make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shown(page: Path) -> tuple[str, ...]:
    """Return the names of the Python objects that the site shows on a page: test_site.py looks for their anchors."""
    return tuple(re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_links_lead_to_existing_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_relative_to(ROOT), target
        assert there.exists(), target
        if anchor:
            assert anchor in slugs(there) or anchor.startswith(shown(there)), target


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").glob("*.svg")), ids=named)
def test_a_picture_is_small_and_used_and_has_no_external_references(picture: Path) -> None:
    assert picture.stat().st_size < 6000
    root = ET.fromstring(picture.read_text("utf-8"))
    assert root.find("{http://www.w3.org/2000/svg}title") is not None
    assert not [name for element in root.iter() for name in element.attrib if name.endswith(("href", "src"))]
    assert any(f"{picture.name})" in page.read_text("utf-8") for page in PAGES)


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").glob("*.png")), ids=named)
def test_a_screenshot_is_small_and_used(picture: Path) -> None:
    assert picture.stat().st_size < 100_000
    assert any(f"]({picture.name})" in page.read_text("utf-8") for page in PAGES)


def test_the_readme_stays_short_and_names_the_command_of_ci() -> None:
    text = README.read_text("utf-8")
    assert len(text.split()) <= 900
    assert not re.search(r"!\[|<img", text), "a package index cannot show pictures with relative URLs"
    if (ROOT / ".ci" / "run").is_file():
        *_, command = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
        assert command in text.splitlines()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_page_defines_the_terms_that_it_uses(page: Path) -> None:
    """The first use of a term is in italics; there the page explains it."""
    text = prose(page)
    for term in ("pair", "generation", "lease", "margin"):
        first = re.search(rf"\*?(?<![\w`-]){term}s?(?![\w`-])\*?", text)
        assert first is None or first[0].startswith("*"), f"{named(page)}: {text[first.start() - 60 : first.end()]}"
