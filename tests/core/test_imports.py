"""The direction of imports, and the modules that are loaded only when needed."""

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
EXTRAS = {
    "aiohttp",
    "authlib",
    "celery",
    "django",
    "fastapi",
    "flask",
    "gevent",
    "httpx",
    "httpx2",
    "hypothesis",
    "joserfc",
    "opentelemetry",
    "pytest",
    "requests",
    "rich",
    "starlette",
    "typer",
}
ENGINE = {f"tokenstore.refresh.{name}" for name in ("attempt", "engine", "telemetry")}


def _runtime_imports(tree: ast.AST) -> Iterator[str]:
    """Return the modules that a file imports at run time, also inside functions."""
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
    """A backend imports the core, never the other way; the core may import SQLAlchemy only for annotations."""
    imported = {module.partition(".")[0] for module in _runtime_imports(ast.parse(SOURCES[name].read_text()))}
    assert not imported & DATABASE_PACKAGES


def _loaded_by(program: str) -> set[str]:
    """Return the modules, with their parent packages, that a program loads in addition to the interpreter's own."""
    before, after = "import sys; idle = {*sys.modules}", "print('loaded:', *{*sys.modules} - idle)"
    code = f"{before}\n{program}\n{after}"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    loaded = output.rpartition("loaded:")[2].split()
    assert "tokenstore" in loaded
    return {".".join(parts[:end]) for parts in (name.split(".") for name in loaded) for end in range(1, len(parts) + 1)}


def test_importing_the_store_loads_no_database_package() -> None:
    """An import of tokenstore alone does not load modules that only a store in use needs."""
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


def test_a_store_loads_the_refresh_engine_only_when_needed() -> None:
    """With refreshers it is loaded at once, otherwise by the first call that may refresh, but not by store and load."""
    idle = _loaded_by(OPENED % ("", ""))
    assert not idle & (DATABASE_PACKAGES - {"tokenstore_memory"} | EXTRAS)
    assert not idle & {"importlib.metadata", *ENGINE}
    assert _loaded_by(OPENED % (", refreshers={'github': print}", "")) >= ENGINE
    assert _loaded_by(OPENED % ("", "await store.load_fresh_tokens('github', 'u', refresh=print)")) >= ENGINE


def test_the_help_of_the_command_line_loads_no_database_cipher_or_provider_module() -> None:
    """So ``tokenstore --help`` is fast."""
    loaded = _loaded_by(
        "from tokenstore.cli import main; sys.argv[1:] = ['--help']; assert main() == 0; import tokenstore.cli.app"
    )
    assert "typer" in loaded
    assert not loaded & (DATABASE_PACKAGES | ENGINE | EXTRAS - {"rich", "typer"})
    assert not loaded & {"cryptography", "tokenstore.cli.demo.rounds"}
