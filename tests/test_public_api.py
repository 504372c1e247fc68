"""The shape of the code: what is exported, what imports what, and where differences may stand."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import tokenstore
import tokenstore.errors
import tokenstore_memory
import tokenstore_sql

PACKAGES = (tokenstore, tokenstore_memory, tokenstore_sql)
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


def _sources() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), path


SOURCES = dict(_sources())
MODULES = [name for name in SOURCES if not name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_exports_are_sorted_and_real(name: str) -> None:
    """Each module with public names lists them, in ruff's order, and has them."""
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", None)
    if exported is None:
        assert name.rpartition(".")[2].startswith("_"), "a public module has an __all__"
        return
    assert len(set(exported)) == len(exported)
    assert list(exported) == sorted(exported, key=_isort_style)
    for public in exported:
        assert hasattr(module, public)


def _isort_style(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2), name


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name: str) -> None:
    """Whatever is exported and can have a docstring has one, and so have its public methods."""
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{public} has no docstring"
        if inspect.isclass(value) and name.startswith("tokenstore.") and not name.startswith("tokenstore.testing"):
            for method, function in inspect.getmembers(value, inspect.isfunction):
                if not method.startswith("_"):
                    assert inspect.getdoc(function), f"{name}.{public}.{method} has no docstring"


def test_every_error_has_its_place_in_the_tree() -> None:
    """The tree in the module's docstring is the tree of classes, and all of it is exported at the top."""
    drawn = re.findall(
        r"(\w+Error)\b", str(tokenstore.errors.__doc__).partition("::")[2].partition("\n\nNo message")[0]
    )
    assert set(tokenstore.errors.__all__) <= set(drawn)
    for name in tokenstore.errors.__all__:
        error = getattr(tokenstore.errors, name)
        assert issubclass(error, tokenstore.TokenStoreError)
        assert getattr(tokenstore, name) is error


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


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("tokenstore_sql")])
def test_no_branch_asks_for_the_dialect(name: str) -> None:
    """A database's difference is an overridden method, never a comparison with a dialect's name."""
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        if isinstance(node, ast.Compare):
            assert "dialect" not in ast.unparse(node).lower()


def test_the_packages_say_that_they_are_typed() -> None:
    """Each carries the marker of PEP 561."""

    def marker(package: ModuleType) -> Path:
        return Path(str(package.__file__)).parent / "py.typed"

    assert all(marker(package).exists() for package in PACKAGES)
