"""What imports what, and what is loaded when."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest

from support.source_files import SOURCES

DATABASE_PACKAGES = {
    "aiomysql",
    "aiosqlite",
    "alembic",
    "asyncmy",
    "asyncpg",
    "psycopg",
    "pymysql",
    "sqlalchemy",
    "sqlite3",
    "tokenstore_memory",
    "tokenstore_sql",
}
EXTRAS = {"authlib", "httpx", "hypothesis", "joserfc", "opentelemetry", "pytest", "rich", "typer"}
ENGINE = {f"tokenstore.refresh.{name}" for name in ("attempt", "engine", "telemetry")}


def _runtime_imports(tree: ast.AST) -> Iterator[str]:
    """The modules that a file imports at run time, wherever it does."""
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.dump(tree.test):
        return
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    if isinstance(tree, ast.ImportFrom):
        yield str(tree.module)
    for child in ast.iter_child_nodes(tree):
        yield from _runtime_imports(child)


@pytest.mark.parametrize("name", [name for name in SOURCES if name.partition(".")[0] == "tokenstore"])
def test_the_core_imports_no_database_package(name: str) -> None:
    """Arrows point one way, from a backend to the core; for annotations alone the core may name SQLAlchemy."""
    imported = {module.partition(".")[0] for module in _runtime_imports(ast.parse(SOURCES[name].read_text()))}
    assert not imported & DATABASE_PACKAGES


def _loaded_by(program: str) -> set[str]:
    """The modules, and the packages above them, that a program loads beyond those of an idle interpreter."""
    before, after = "import sys; idle = {*sys.modules}", "print('loaded:', *{*sys.modules} - idle)"
    code = f"{before}\n{program}\n{after}"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    loaded = output.rpartition("loaded:")[2].split()
    assert "tokenstore" in loaded
    return {".".join(parts[:end]) for parts in (name.split(".") for name in loaded) for end in range(1, len(parts) + 1)}


def test_importing_the_store_loads_no_database_package() -> None:
    """A process that only imports tokenstore pays for nothing that only a store in use needs."""
    for program in ("import tokenstore", "from tokenstore import *", "from tokenstore import open_store"):
        loaded = _loaded_by(program)
        assert not loaded & (DATABASE_PACKAGES | EXTRAS)
        assert not loaded & {"asyncio", "cryptography", "email", "importlib.metadata", "logging", "secrets"}
        assert not loaded & ENGINE


OPENED = """
import asyncio
from tokenstore import Keyring, open_store
async def main():
    async with open_store("memory://", keyring=Keyring({"k": bytes(32)})%s) as store:
        await store.store_tokens("github", "u", "a", "r", None)
        await store.load_tokens("github", "u")
        %s
asyncio.run(main())
"""


def test_a_store_loads_the_refresh_engine_when_it_is_wanted() -> None:
    """At once where there are refreshers, else in the first call that may refresh; not to store and load."""
    idle = _loaded_by(OPENED % ("", ""))
    assert not idle & (DATABASE_PACKAGES - {"tokenstore_memory"} | EXTRAS)
    assert not idle & {"importlib.metadata", *ENGINE}
    assert _loaded_by(OPENED % (", refreshers={'github': print}", "")) >= ENGINE
    assert _loaded_by(OPENED % ("", "await store.load_fresh_tokens('github', 'u', refresh=print)")) >= ENGINE


def test_the_help_of_the_command_line_loads_no_store_in_use() -> None:
    """What shows help needs neither a database, nor a cipher, nor a provider."""
    loaded = _loaded_by(
        "from tokenstore.cli import main; sys.argv[1:] = ['--help']; assert main() == 0; import tokenstore.cli.app"
    )
    assert "typer" in loaded
    assert not loaded & (DATABASE_PACKAGES | ENGINE | EXTRAS - {"rich", "typer"})
    assert not loaded & {"cryptography", "tokenstore.cli.demo.rounds"}
