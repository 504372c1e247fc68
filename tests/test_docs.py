"""README.md, docs/ and examples/ are correct: their code runs, their tables match the code, their links resolve.

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

import ast
import asyncio
import builtins
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from codeop import compile_command
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from secrets import token_hex
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import typer
from sqlalchemy import MetaData
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

import servers
import tokenstore_memory
from matrix import Row, params, shared_rows
from tokenstore import AuthTokenStore, ConfigurationError, Keyring, errors, generate_key, open_store
from tokenstore.cancellation import FINISH_GRACE
from tokenstore.cli.app import app
from tokenstore.cli.exits import EXIT_CODES
from tokenstore.keyring import KEYS_VARIABLE
from tokenstore.protocol import Backend
from tokenstore.records import MAX_PROVIDER_BYTES, MAX_TOKEN_BYTES, MAX_USER_ID_BYTES
from tokenstore.registry import _BUILT_IN, schemes
from tokenstore.testing import conformance
from tokenstore_sql import base, token_table
from tokenstore_sql import mysql as mysql_backend
from tokenstore_sql import postgres as postgres_backend
from tokenstore_sql import sqlite as sqlite_backend
from tokenstore_sql.schema import DEFAULT_TABLE
from tokenstore_sql.statements import Statements

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
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
# Absolute, as programs run in folders of their own.
PYTHONPATH = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]  # noqa: PTH100
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# -- reading the pages -----------------------------------------------------------------------------


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


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_is_of_a_known_kind(page: Path) -> None:
    for block in blocks(page):
        assert block.kind in KINDS, f"{block.place}: {block.kind!r}"
        assert bool(block.path) is block.kind.endswith("="), block.place
        assert block.text.strip(), block.place


# -- running them ----------------------------------------------------------------------------------


@dataclass
class Reader:
    """A reader who follows a page: a folder, environment variables that last from block to block, and programs."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        programs = self.folder / "bin"
        programs.mkdir()
        commands = {name: f"-m {name}" for name in ("tokenstore", "alembic", "pytest")}
        for name, arguments in {**commands, "python": "-W error"}.items():
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
            program.chmod(0o755)
        activate = self.folder / "work" / ".venv" / "bin" / "activate"
        activate.parent.mkdir(parents=True)
        activate.touch()  # the programs above are on PATH already
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("TOKENSTORE_", "PYTEST_"))}
        self.environment = {
            **kept,
            "PATH": f"{programs}{os.pathsep}{kept['PATH']}",
            "PYTHONPATH": os.pathsep.join(PYTHONPATH),
            **self.environment,
        }

    def run(self, block: Block) -> str:
        script = self.folder / "block"
        if block.kind == "python file=":
            path = self.folder / "work" / block.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, "utf-8")
            return ""
        if block.kind.startswith("python"):
            script.write_text(block.text, "utf-8")
            return self._run(block, sys.executable, "-W", "error", str(script))
        state = self.folder / "environment"
        script.write_text(f'set -euo pipefail\n{block.text}env -0 > "{state}"\n', "utf-8")
        printed = self._run(block, "bash", str(script))
        self.environment = dict(line.split("=", 1) for line in state.read_text().split("\0") if line)
        return printed

    def _run(self, block: Block, *command: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder / "work",
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{block.place}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


def follow(page: Path, reader: Reader, *kinds: str) -> list[str]:
    """Run the blocks of these kinds, and give what each printed."""
    return [reader.run(block) for block in of_kind(page, *kinds)]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_programs_can_be_pasted_at_the_prompt(page: Path) -> None:
    """A blank line ends an indented block there, so a blank line inside of one would break the program."""
    for block in of_kind(page, "python", "python file="):
        statement: list[str] = []
        for number, line in enumerate([*block.text.splitlines(), ""], start=1):
            statement.append(line)
            try:
                complete = compile_command("\n".join(statement))
            except SyntaxError as error:
                pytest.fail(f"{block.place}, line {number}: {error.msg}")
            if complete is not None:
                statement.clear()
        assert not statement, block.place


@pytest.mark.sqlite
def test_the_quick_start_runs_and_prints_no_token(tmp_path: Path) -> None:
    *_, printed = follow(README, Reader(tmp_path), "console", "python file=")
    assert "'access_token': <redacted>" in printed
    assert not re.search(r"gh[our]_(abc|xyz)", printed)


@pytest.mark.sqlite
@pytest.mark.parametrize("page", [LOCKING, REFRESH, PROVIDERS, SEALING], ids=named)
def test_a_page_runs(page: Path, tmp_path: Path) -> None:
    assert follow(page, Reader(tmp_path), "console", "python")


@pytest.mark.sqlite
def test_the_page_of_the_command_line_runs_and_prints_no_token(tmp_path: Path) -> None:
    printed = follow(CLI, Reader(tmp_path), "console", "python file=")
    assert "nothing due" in printed[-1]
    assert "deleted" in printed[-1]
    assert not re.search(r"gh[our]_(abc|xyz)", "".join(printed))


@pytest.mark.sqlite
def test_the_page_of_the_keys_changes_the_key_in_the_order_that_it_gives(tmp_path: Path) -> None:
    """The new key is added behind the old one first; at the end it is the only key, and opens every row."""
    reader = Reader(tmp_path)
    rings, printed = [], ""
    for block in of_kind(KEYS, "console", "python"):
        printed = reader.run(block)
        rings.append(Keyring.from_string(reader.environment[KEYS_VARIABLE]).names)
    assert list(dict.fromkeys(rings)) == [("k1",), ("k1", "k2"), ("k2", "k1"), ("k2",)]
    assert "k2" in printed
    assert "k1" not in printed


@contextmanager
def new_database(row: Row, folder: Path) -> Iterator[tuple[str, str]]:
    """An empty database of its own, as an asynchronous driver's URL and as a synchronous one's."""
    if row.mark == "sqlite":
        yield f"sqlite:///{folder}/own.db", f"sqlite:///{folder}/own.db"
        return
    start: dict[str, Callable[[], servers.Server | None]] = {
        "postgresql": servers.postgres,
        "mariadb": servers.mariadb,
        "mysql9": servers.mysql,
    }
    kind, _, driver = row.name.partition("+")
    server = start[kind]()
    assert server is not None
    name = f"docs_{token_hex(6)}"
    server.execute(f"CREATE DATABASE {name}")
    try:
        yield server.url(driver, name), server.url("psycopg" if kind == "postgresql" else "pymysql", name)
    finally:
        server.execute(f"DROP DATABASE {name}{' WITH (FORCE)' * (kind == 'postgresql')}")


@pytest.mark.parametrize("row", params(names=["sqlite", "postgresql+psycopg", "mariadb+aiomysql"]))
def test_alembic_creates_the_table(row: Row, tmp_path: Path) -> None:
    """Autogenerate finds the table, finds nothing more to do once it is there, and the store uses it."""
    with new_database(row, tmp_path) as (url, synchronous):
        reader = Reader(tmp_path, {"TOKENSTORE_URL": url, "DATABASE_URL": synchronous})
        [own_urls, *rest] = of_kind(SCHEMA, "console", "python file=")
        assert own_urls.text.startswith("export DATABASE_URL=sqlite:///")
        if row.mark == "sqlite":
            reader.run(own_urls)
        *_, migrated, used = [reader.run(block) for block in rest]
        assert "No new upgrade operations detected" in migrated
        assert "user-123" in used


def test_the_contract_is_the_contract() -> None:
    """The example stands in the README word for word."""
    [block] = of_kind(README, "python contract")
    assert block.text == CONTRACT


CONTRACT = """\
store = AuthTokenStore(db_session=session)
await store.store_tokens(provider="github", user_id="user-123", access_token="gho_abc", refresh_token="ghr_xyz",
                         access_token_expires_at=datetime.utcnow() + timedelta(hours=8),
                         refresh_token_expires_at=datetime.utcnow() + timedelta(days=180))
record = await store.load_tokens(provider="github", user_id="user-123", for_update=True)
if record and not store.is_access_token_valid(record) and store.is_refresh_token_valid(record):
    new = await provider.refresh(record["refresh_token"])
    await store.store_tokens(provider="github", user_id="user-123", access_token=new["access_token"],
                             refresh_token=new["refresh_token"], access_token_expires_at=new["expires_at"])
"""


class NineHoursAgo(datetime):
    """A clock by which the example's access token has expired since."""

    @classmethod
    def utcnow(cls) -> datetime:  # type: ignore[override]
        return datetime.now(UTC).replace(tzinfo=None) - timedelta(hours=9)


class Provider:
    """Refreshes once."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def refresh(self, refresh_token: str) -> dict[str, Any]:
        self.seen.append(refresh_token)
        return {"access_token": "new", "refresh_token": "next", "expires_at": datetime.now(UTC) + timedelta(hours=8)}


@pytest.mark.parametrize("clock", [datetime, NineHoursAgo], ids=["valid", "expired"])
@shared_rows
def test_the_contract_runs_in_a_session(
    row: Row, clock: type[datetime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every database: the token is there from another connection, and no lock remains."""
    [block] = of_kind(README, "python contract")
    program = compile(block.text, block.place, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    monkeypatch.setenv(KEYS_VARIABLE, generate_key())
    provider = Provider()

    async def main(url: str) -> dict[str, Any] | None:
        engine = create_async_engine(url.replace("sqlite:", "sqlite+aiosqlite:"))
        async with open_store(url, lock_timeout=1) as other:
            await other.setup()
            async with AsyncSession(engine) as session:
                names = {"AuthTokenStore": AuthTokenStore, "session": session, "provider": provider}
                await eval(program, {**names, "datetime": clock, "timedelta": timedelta})
                assert session.in_transaction() is (clock is datetime)  # a lock that nothing was stored under
            async with other.transaction() as tx:
                record = await tx.load_tokens("github", "user-123", for_update=True)
        await engine.dispose()
        return record

    with new_database(row, tmp_path) as (url, _), warnings.catch_warnings():
        # Deprecated since Python 3.12, and still what is passed.
        warnings.filterwarnings("ignore", r"datetime.datetime.utcnow", DeprecationWarning)
        record = asyncio.run(main(url))
    assert record is not None
    expected = ("gho_abc", "ghr_xyz", []) if clock is datetime else ("new", "next", ["ghr_xyz"])
    assert (record["access_token"], record["refresh_token"], provider.seen) == expected


def test_the_demo_prints_what_the_readme_shows(tmp_path: Path) -> None:
    """The README's lines are the demo's; a smaller demo here, so other numbers."""

    def shape(text: str) -> set[str]:
        lines = (re.sub(r"─+", "─", re.sub(r"\d+(\.\d+)?", "0", line)) for line in text.splitlines())
        return {" ".join(line.split()) for line in lines} - {""}

    [block] = of_kind(README, "text demo")
    smaller = Block(block.place, "console", "", "tokenstore demo --processes 2 --tasks 4 --latency 0.2\n")
    assert shape(block.text) <= shape(Reader(tmp_path).run(smaller))


def test_what_is_to_be_installed_can_be() -> None:
    """The lines that need the package index: known commands, extras of the project, paths that exist."""
    extras = PROJECT["optional-dependencies"].keys()
    for page in PAGES:
        for block in of_kind(page, "console install"):
            for command in " && ".join(block.text.splitlines()).split(" && "):
                installed = re.fullmatch(r"(?:\.venv/bin/)?pip install (.+)", command)
                if installed is None:
                    known = ("python3 -m venv .venv", ".venv/bin/tox", ".venv/bin/tokenstore demo")
                    assert command in known, block.place
                    continue
                for argument in shlex.split(installed[1]):
                    name, _, wanted = argument.removesuffix("]").partition("[")
                    if name.startswith("."):
                        assert (ROOT / name / "pyproject.toml").is_file(), block.place
                        assert {*wanted.split(",")} - {""} <= extras, block.place
                    else:  # tokenstore itself is on no package index
                        assert name in {"tox", "alembic"}, block.place
    assert PROJECT["scripts"].keys() == {"tokenstore"}


# -- examples/ -------------------------------------------------------------------------------------


def install_example(site: Path, **more: str) -> None:
    """The example backend as an installer would leave it in ``site``; with further entry points."""
    site.mkdir()
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text("utf-8"))["project"]
    shutil.copy(EXAMPLE / "tokenstore_jsonfile.py", site)
    metadata = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    metadata.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in {**points, **more}.items())
        for group, points in project["entry-points"].items()
    ]
    metadata.joinpath("entry_points.txt").write_text("\n".join(lines))


def test_the_example_backend_passes_the_conformance_tests(tmp_path: Path) -> None:
    """The guide's programs, and the five lines that are the example's whole test."""
    install_example(tmp_path / "site")
    reader = Reader(tmp_path, {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *PYTHONPATH])})
    shutil.copytree(EXAMPLE, tmp_path / "work" / EXAMPLE.relative_to(ROOT))
    *_, tested, _ = follow(BACKENDS, reader, "python", "console")
    passed = re.search(r"^(\d+) passed in", tested, re.MULTILINE)
    assert passed, tested
    tests = {name for name in dir(conformance.BackendConformance) if name.startswith("test_")}
    assert int(passed[1]) == len(tests)


@pytest.mark.sqlite
def test_the_example_backend_is_found_and_shadows_nothing(
    tmp_path: Path, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scheme is known once it is installed; a scheme that tokenstore ships stays tokenstore's."""
    with pytest.raises(errors.UnknownBackendError):
        open_store("jsonfile:///x.json", keyring=keyring)
    install_example(tmp_path / "site", sqlite="tokenstore_jsonfile:JsonFileBackend")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    try:
        assert "jsonfile" in schemes()
        assert "JsonFileBackend" in repr(open_store(f"jsonfile:///{tmp_path}/x.json", keyring=keyring))
        with pytest.raises(ConfigurationError, match=r"unknown: colour; the options of jsonfile:// are sync"):
            open_store("jsonfile:///x.json?colour=red", keyring=keyring)
        assert "SQLiteBackend" in repr(open_store(f"sqlite:///{tmp_path}/x.db", keyring=keyring))
    finally:
        sys.modules.pop("tokenstore_jsonfile", None)


@pytest.mark.sqlite
@pytest.mark.parametrize("name", ["refresh.py", "row_lock.py"])
def test_the_examples_of_a_refresh_run(name: str, tmp_path: Path) -> None:
    program = (ROOT / "examples" / name).read_text("utf-8")
    printed = Reader(tmp_path).run(Block(f"examples/{name}", "python", "", program))
    assert printed == "50 tasks, 1 token, 1 refresh, 0 reuses\n"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_excerpts_are_word_for_word(page: Path) -> None:
    for block in of_kind(page, "python from=", "toml from="):
        assert block.text in (ROOT / block.path).read_text("utf-8"), block.place


# -- what the pages say ----------------------------------------------------------------------------


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as the usual renderers of Markdown make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_relative_to(ROOT), target
        assert there.exists(), target
        if anchor:
            assert anchor in slugs(there), target


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").glob("*.svg")), ids=named)
def test_a_picture_is_small_shown_and_refers_to_nothing(picture: Path) -> None:
    assert picture.stat().st_size < 6000
    root = ET.fromstring(picture.read_text("utf-8"))
    assert root.find("{http://www.w3.org/2000/svg}title") is not None
    assert not [name for element in root.iter() for name in element.attrib if name.endswith(("href", "src"))]
    assert any(f"{picture.name})" in page.read_text("utf-8") for page in PAGES)


def test_the_readme_stays_short_and_names_the_command_of_ci() -> None:
    text = README.read_text("utf-8")
    assert len(text.split()) <= 900
    assert not re.search(r"!\[|<img", text), "a package index shows no picture with a relative address"
    if (ROOT / ".ci" / "run").is_file():
        *_, command = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
        assert command in text.splitlines()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_errors_that_are_named_exist(page: Path) -> None:
    names = set(re.findall(r"\b[A-Z]\w+Error\b", page.read_text("utf-8")))
    assert names <= {*errors.__all__, *dir(builtins)}


def test_the_page_of_the_errors_names_every_error() -> None:
    assert {*errors.__all__} <= {*re.findall(r"\b[A-Z]\w+Error\b", ERRORS.read_text("utf-8"))}
    listed = {name for name, *_ in table(ERRORS, "error")} - {"---"}
    roots = {"`TokenStoreError`", "`RefreshError`", "`SealingError`"}
    assert listed == {f"`{name}`" for name in errors.__all__} - roots


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_page_defines_the_terms_that_it_uses(page: Path) -> None:
    """The first use is in italics, where the page says what the term means."""
    text = prose(page)
    for term in ("pair", "generation", "lease", "margin"):
        first = re.search(rf"\*?(?<![\w`-]){term}s?(?![\w`-])\*?", text)
        assert first is None or first[0].startswith("*"), f"{named(page)}: {text[first.start() - 60 : first.end()]}"


SQL = {
    "PostgreSQL": postgres_backend.PostgresBackend,
    "MySQL": mysql_backend.MySQLBackend,
    "SQLite": sqlite_backend.SQLiteBackend,
}


def test_the_table_of_urls_is_the_registry() -> None:
    """Every built-in scheme with its driver and the extra that brings it."""
    found = {}
    for schemes_cell, driver, install in table(README, "URL scheme"):
        for scheme in codes(schemes_cell):
            found[scheme.removesuffix("://")] = (driver, "".join(codes(install)).strip("[]"))
    expected = {}
    for backend in SQL.values():
        for scheme, url_driver in backend.drivers.items():
            expected[scheme] = (url_driver.partition("+")[2], backend.extras.get(url_driver, ""))
    memory = found.pop("memory")
    assert found == expected
    assert memory[1] == ""
    assert {*found, "memory"} == _BUILT_IN.keys()
    assert {extra for _, extra in found.values()} - {""} <= PROJECT["optional-dependencies"].keys()


def test_the_table_of_options_is_the_code() -> None:
    """Every option, for every database that takes it, with its default."""
    every = {"memory", *SQL}
    groups = {"all": every, "SQL": {*SQL}, "SQL, but not SQLite": {*SQL} - {"SQLite"}}
    found: dict[str, set[str]] = {name: set() for name in every}
    defaults = {}
    for names, where, default, _ in table(OPTIONS, "option"):
        for name in codes(names):
            defaults[name] = default.strip("`")
            for place in groups.get(where) or set(where.split(", ")):
                found[place].add(name)
    expected = {
        name: {*base.TABLE_OPTIONS, *base.POOL_OPTIONS, *backend.driver_options} for name, backend in SQL.items()
    }
    expected["SQLite"].remove("schema")  # known there, to be refused with the reason
    expected["memory"] = {*tokenstore_memory._OPTIONS}
    assert found == expected
    assert list(defaults)[:3] == list(base.TABLE_OPTIONS), "with an engine or session only the first three apply"

    assert defaults["table"] == DEFAULT_TABLE
    for name, value in {**base._DEFAULTS, "lock_timeout": base.LOCK_TIMEOUT}.items():
        assert float(defaults[name]) == value
    assert float(defaults["connect_timeout"]) == postgres_backend._asyncpg_arguments({})["timeout"]
    assert (defaults["prepared_statements"], defaults["ssl"]) == ("true", "false")
    assert "statement_cache_size" not in postgres_backend._asyncpg_arguments({})
    assert mysql_backend._tls({}) is None


def test_the_exit_codes_and_commands_are_those_of_the_command_line() -> None:
    codes_of_the_help = re.findall(r"(\d+) [^;.]+", EXIT_CODES)
    assert [code for code, _ in table(CLI, "exit code")] == codes_of_the_help
    # An attribute of Click's, which typer's types do not know.
    names = list(getattr(typer.main.get_command(app), "commands"))  # noqa: B009
    assert [name.strip("`") for name, *_ in table(CLI, "command")] == names


def test_the_table_of_columns_is_the_schema() -> None:
    kinds = [module.dialect() for module in (postgresql, mysql, sqlite)]
    expected = [
        [column.name, *(column.type.compile(dialect=kind) for kind in kinds), "yes" if column.nullable else "no"]
        for column in token_table(MetaData()).columns
    ]
    assert [[cell.strip("`") for cell in row[:5]] for row in table(SCHEMA, "column")] == expected


def test_the_locks_that_are_described_are_those_that_are_sent() -> None:
    found = {what: dict(zip(SQL, cells, strict=True)) for what, *cells in table(LOCKING, "")}
    dialects = {name: backend.dialect_class(1.0) for name, backend in SQL.items()}
    for name, module in (("PostgreSQL", postgresql), ("MySQL", mysql)):
        lock = Statements(token_table(MetaData()), dialects[name]).lock
        statement = str(lock.compile(dialect=module.dialect()))
        [clause] = codes(found["the lock"][name])
        assert f" {clause}" in statement
        assert found["isolation"][name] == dialects[name].isolation_level
        code = found["on timeout"][name].partition(" ")[0]
        assert dialects[name].error_classes[code] is errors.LockTimeoutError
    assert codes(found["the lock"]["SQLite"]) == ["BEGIN IMMEDIATE"]


def test_numbers_in_the_prose() -> None:
    """Constants of the code that the pages state."""
    locking, limits = prose(LOCKING), prose(LIMITS)
    assert f"a busy timeout of {sqlite_backend._BUSY_TIMEOUT_MS} ms" in locking
    assert base._SERVER_GRACE == 1.0
    assert "one second after `lock_timeout`" in locking
    assert FINISH_GRACE == 0.5
    assert "half a second" in locking
    assert f"version {'.'.join(map(str, sqlite_backend._MIN_VERSION[:2]))} or later" in limits
    assert f"1 to {MAX_PROVIDER_BYTES} bytes of UTF-8, a user id 1 to {MAX_USER_ID_BYTES}" in limits
    assert f"at most {MAX_TOKEN_BYTES}" in limits


def test_the_guide_names_every_method_and_every_class() -> None:
    methods = [name for cells in table(BACKENDS, "method") for name in codes(cells[0])]
    assert sorted(methods) == sorted(name for name in vars(Backend) if not name.startswith("_"))
    classes = [name for cells in table(BACKENDS, "class") for name in codes(cells[0])]
    assert {*classes, "Testbed", "sealed"} == {*conformance.__all__}
