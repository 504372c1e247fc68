"""The code blocks of the documentation run: programs, commands and excerpts."""

from __future__ import annotations

import ast
import asyncio
import re
import shlex
import warnings
from codeop import compile_command
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from support.database import new_database
from support.matrix import Row, params, shared_rows
from support.page_reader import Reader, follow
from support.pages import (
    BACKENDS,
    BENCHMARKS,
    CLI,
    KEYS,
    KINDS,
    PAGES,
    PROJECT,
    README,
    SCHEMA,
    TESTING,
    Block,
    blocks,
    named,
    of_kind,
)
from support.paths import ROOT
from tokenstore import AuthTokenStore, Keyring, generate_key, open_store
from tokenstore.keyring import KEYS_VARIABLE

# benchmarks.md: tests/benchmarks runs its commands.
WITH_TESTS_OF_THEIR_OWN = [README, BACKENDS, BENCHMARKS, CLI, KEYS, SCHEMA, TESTING]
PLAIN = [page for page in PAGES if page not in WITH_TESTS_OF_THEIR_OWN and of_kind(page, "console", "python")]

# -- kinds of blocks -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_code_block_has_a_known_info_string(page: Path) -> None:
    for block in blocks(page):
        assert block.kind in KINDS, f"{block.place}: {block.kind!r}"
        assert bool(block.path) is block.kind.endswith("="), block.place
        assert block.text.strip(), block.place


# -- running the blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_blocks_can_be_pasted_at_the_python_prompt(page: Path) -> None:
    """At the prompt a blank line ends an indented block, so there must be no blank line inside one."""
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
@pytest.mark.parametrize("page", PLAIN, ids=named)
def test_the_code_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    assert follow(page, Reader(tmp_path), "console", "python file=", "python")


@pytest.mark.sqlite
def test_the_code_blocks_of_the_command_line_page_run_and_print_no_token(tmp_path: Path) -> None:
    printed = follow(CLI, Reader(tmp_path), "console", "python file=")
    assert "nothing due" in printed[-1]
    assert "deleted" in printed[-1]
    assert not re.search(r"gh[our]_(abc|xyz)", "".join(printed))


@pytest.mark.sqlite
def test_the_key_rotation_on_the_keys_page_works(tmp_path: Path) -> None:
    """The new key is added after the old one, becomes the primary key, and at the end opens all by itself."""
    reader = Reader(tmp_path)
    url = f"sqlite:///{tmp_path}/work/keys.db"
    rings, printed = [], ""

    async def with_store(call: Callable[[AuthTokenStore], Awaitable[object]]) -> object:
        async with open_store(url, keyring=Keyring.from_string(reader.environment[KEYS_VARIABLE])) as store:
            return await call(store)

    for block in of_kind(KEYS, "console", "python"):
        printed = reader.run(block)
        rings.append(Keyring.from_string(reader.environment[KEYS_VARIABLE]).names)
        if len(rings) == 1:
            _ = asyncio.run(with_store(lambda store: store.put_value("login", "state", "verifier")))
    assert asyncio.run(with_store(lambda store: store.get_value("login", "state"))) == "verifier"
    assert list(dict.fromkeys(rings)) == [("k1",), ("k1", "k2"), ("k2", "k1"), ("k2",)]
    assert "k2" in printed
    assert "k1" not in printed


@pytest.mark.parametrize("row", params(names=["sqlite", "postgresql+psycopg", "mariadb+aiomysql"]))
def test_the_alembic_migration_creates_the_table(row: Row, tmp_path: Path) -> None:
    """Autogenerate adds the table, finds no difference afterwards, and the store can use the table."""
    with new_database(row, tmp_path) as (url, synchronous):
        reader = Reader(tmp_path, {"TOKENSTORE_URL": url, "DATABASE_URL": synchronous})
        [_, own_urls, *rest] = of_kind(SCHEMA, "console", "python file=")
        assert own_urls.text.startswith("export DATABASE_URL=sqlite:///")
        if row.mark == "sqlite":
            reader.run(own_urls)
        *_, migrated, used = [reader.run(block) for block in rest]
        assert "No new upgrade operations detected" in migrated
        assert "user-123" in used


def test_the_readme_contains_the_example_word_for_word() -> None:
    """The example of ``AuthTokenStore`` is fixed: it must not change."""
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
    """A clock that is nine hours slow, so that the access token of the example has expired."""

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
def test_the_example_runs_in_a_session_on_every_database(
    row: Row, clock: type[datetime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards another connection reads the token, and the row is not locked."""
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
                assert session.in_transaction() is (clock is datetime)  # a valid token was only locked, not stored
            async with other.transaction() as tx:
                record = await tx.load_tokens("github", "user-123", for_update=True)
        await engine.dispose()
        return record

    with new_database(row, tmp_path) as (url, _), warnings.catch_warnings():
        # utcnow is deprecated since Python 3.12, but applications still pass it.
        warnings.filterwarnings("ignore", r"datetime.datetime.utcnow", DeprecationWarning)
        record = asyncio.run(main(url))
    assert record is not None
    expected = ("gho_abc", "ghr_xyz", []) if clock is datetime else ("new", "next", ["ghr_xyz"])
    assert (record["access_token"], record["refresh_token"], provider.seen) == expected


def test_the_demo_prints_what_the_readme_shows(tmp_path: Path) -> None:
    """The README shows the demo's lines. The test runs a smaller demo, so it ignores the numbers."""

    def shape(text: str) -> set[str]:
        lines = (re.sub(r"─+", "─", re.sub(r"\d+(\.\d+)?", "0", line)) for line in text.splitlines())
        return {" ".join(line.split()) for line in lines} - {""}

    [block] = of_kind(README, "text demo")
    smaller = Block(block.place, "console", "", "tokenstore demo --processes 2 --tasks 4 --latency 0.2\n")
    assert shape(block.text) <= shape(Reader(tmp_path).run(smaller))


def test_installation_commands_name_existing_extras_and_paths() -> None:
    """The commands that need the package index are known ones, with extras of the project and paths that exist."""
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
                    else:  # tokenstore itself is not on the package index
                        assert name in {"tox", "alembic", "pytest-asyncio"}, block.place
    assert PROJECT["scripts"].keys() == {"tokenstore"}


# -- examples/ -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_excerpts_are_word_for_word(page: Path) -> None:
    for block in of_kind(page, "python from=", "toml from="):
        assert block.text in (ROOT / block.path).read_text("utf-8"), block.place
