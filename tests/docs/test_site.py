"""The site that is built from the pages and the docstrings. The build is strict; these tests read what it wrote."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import expect

import tokenstore
from support.browser import open_page
from support.pages import EXAMPLE, LINKED, named
from support.paths import ROOT
from support.site import build

pytestmark = pytest.mark.site


@dataclass
class Document:
    """What a page of the site contains.

    Attributes:
        ids: The ids of its elements, which links can name.
        links: The tag and the URL of everything that it links to or loads.
        text: Its text, as a reader sees it.
    """

    ids: set[str] = field(default_factory=set)
    links: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""


class Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.document = Document()
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.document.ids |= {values[name] for name in ("id", "name") if name in values}
        self.document.links += [(tag, values[name]) for name in ("href", "src") if name in values]
        self._hidden += tag in {"script", "style"}

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in {"script", "style"}

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.document.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("docs"))


@pytest.fixture(scope="module")
def documents(site: Path) -> dict[Path, Document]:
    found = {}
    for path in site.rglob("*.html"):
        parser = Parser()
        parser.feed(path.read_text("utf-8"))
        found[path] = parser.document
    return found


def test_every_page_is_on_the_site(site: Path, documents: dict[Path, Document]) -> None:
    for page in LINKED:
        name = named(page).removesuffix(".md").removesuffix("README")
        assert site / name / "index.html" in documents, named(page)


def test_every_link_leads_to_a_file_and_an_element_of_the_site(site: Path, documents: dict[Path, Document]) -> None:
    """The strict build does not look at links to files that are no pages, nor at links in docstrings."""
    for path, document in documents.items():
        for _, link in document.links:
            url = urlsplit(link)
            if url.scheme or path.name == "404.html":  # which may be shown at any path
                continue
            there = (path.parent / unquote(url.path)).resolve() if url.path else path
            there = there / "index.html" if there.is_dir() else there
            assert there.is_relative_to(site), f"{path}: {link}"
            assert there.is_file(), f"{path}: {link}"
            if url.fragment and there in documents and not url.fragment.startswith("__"):  # the theme's own
                assert url.fragment in documents[there].ids, f"{path}: {link}"


def test_the_site_loads_nothing_from_another_host(documents: dict[Path, Document]) -> None:
    loaded = {link for document in documents.values() for tag, link in document.links if tag != "a"}
    assert not [link for link in loaded if urlsplit(link).netloc]


def test_no_markup_is_shown_as_it_is_written(documents: dict[Path, Document]) -> None:
    """Sphinx's roles, code blocks and double backticks of docstrings, and info strings of pages."""
    for path, document in documents.items():
        markup = r":(?:attr|class|data|exc|func|meth|mod):|``|\w::$|autoref|^::: "
        shown = re.search(markup, document.text, re.MULTILINE)
        assert shown is None, f"{path}: {document.text[shown.start() - 60 : shown.end() + 60]!r}"


def test_every_public_name_has_one_place_in_the_reference(documents: dict[Path, Document]) -> None:
    for name in tokenstore.__all__:
        anchors = {f"tokenstore.{name}", f"{getattr(tokenstore, name).__module__}.{name}"}
        places = [path for path, document in documents.items() if anchors & document.ids]
        assert len(places) == 1, (name, places)


def test_a_docstring_links_to_what_it_names(site: Path) -> None:
    """Across modules and pages, for a name of the module, a method of the class, and a complete path."""
    store = (site / "docs/reference/store/index.html").read_text("utf-8")
    testing = (site / "docs/reference/testing/index.html").read_text("utf-8")
    assert re.search(r'<a [^>]*href="\./#tokenstore\.open_store"><code>open_store</code></a>', store)
    assert re.search(r'<a [^>]*href="\.\./records/#tokenstore\.ProviderCallFailure"><code>ProviderCallFailure<', store)
    assert re.search(r'<a [^>]*href="\.\./backend/#tokenstore\.protocol\.Backend"><code>tokenstore\.protocol', testing)
    assert "<code>time.time</code>" in store


def test_llms_txt_links_to_markdown_files_of_the_site(site: Path) -> None:
    links = re.findall(r"\]\((\S+)\)", (site / "llms.txt").read_text("utf-8"))
    assert len(links) == len(LINKED)
    assert all((site / link).read_text("utf-8").startswith("# ") for link in links)


def test_a_broken_link_a_missing_heading_and_an_unknown_name_fail_the_build(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "plots")
    for name in ("docs", "examples", "tokenstore", "backends"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for path in (*ROOT.glob("*.md"), ROOT / "LICENSE", ROOT / "pyproject.toml"):
        shutil.copy(path, checkout)
    with (checkout / "docs" / "mcp.md").open("a", encoding="utf-8") as page:
        page.write("\n[a](gone.md) [b](keys.md#gone) [c](../tokenstore/gone.py)\n")
    with (checkout / "tokenstore" / "results.py").open("a", encoding="utf-8") as module:
        module.write('\ndef gone():\n    """See :func:`no_such_function`."""\n\n__all__ += ["gone"]\n')
    with (checkout / "docs" / "reference" / "records.md").open("a", encoding="utf-8") as page:
        page.write("\n::: tokenstore.results.gone\n")
    with pytest.raises(AssertionError) as failed:
        build(tmp_path / "docs", checkout)
    printed = re.sub(r"\x1b\[[\d;]*m", "", str(failed.value))
    assert re.search(r"page does not exist.*?docs/mcp\.md", printed, re.DOTALL)
    assert re.search(r"anchor does not exist.*?docs/mcp\.md", printed, re.DOTALL)
    assert "unresolved autoref `no_such_function` in docs/reference/records.md" in printed
    assert "3 issues found" in printed


def test_the_example_backend_can_be_read_on_the_site(site: Path) -> None:
    for path in EXAMPLE.glob("*.py"):
        assert (site / path.relative_to(ROOT)).read_text("utf-8") == path.read_text("utf-8")


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The site on a web server of this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
        """Print no log."""


@pytest.mark.browser
def test_a_reader_finds_the_tutorial_and_a_method_s_description(address: str) -> None:
    """In a browser; no page has an error."""
    with open_page(1280, 900) as page:
        page.goto(address)
        page.get_by_role("link", name="From nothing to a refreshed token").first.click()
        expect(page.locator("article h1")).to_contain_text("From nothing to a refreshed token in ten minutes")
        expect(page.locator("article pre code").first).to_be_visible()
        page.goto(f"{address}/docs/reference/store/")
        method = page.locator("[id='tokenstore.AuthTokenStore.load_fresh_tokens']")
        method.scroll_into_view_if_needed()
        expect(method).to_contain_text("load_fresh_tokens")
