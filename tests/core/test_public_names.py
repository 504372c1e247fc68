"""The exports of the packages are sorted, documented and typed."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

from support.source_files import MODULES, PACKAGES


@pytest.mark.parametrize("name", MODULES)
def test_exports_are_sorted_and_exist(name: str) -> None:
    """Each public module has an ``__all__`` in ruff's order, and all names in it exist."""
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", None)
    if exported is None:
        assert name.rpartition(".")[2].startswith("_"), "a public module has no __all__"
        return
    assert len(set(exported)) == len(exported)
    assert list(exported) == sorted(exported, key=_isort_style)
    for public in exported:
        assert hasattr(module, public)


def _isort_style(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2), name


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name: str) -> None:
    """Each exported class and function has a docstring, and so have the public methods of classes."""
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{public} has no docstring"
        if inspect.isclass(value) and name.startswith("tokenstore.") and not name.startswith("tokenstore.testing"):
            for method, function in inspect.getmembers(value, inspect.isfunction):
                # A method that a class inherits from another library is documented there, or not.
                if not method.startswith("_") and function.__module__.startswith("tokenstore"):
                    assert inspect.getdoc(function), f"{name}.{public}.{method} has no docstring"


def test_each_package_contains_py_typed() -> None:
    """Without this marker of PEP 561, type checkers ignore the package's annotations."""

    def marker(package: ModuleType) -> Path:
        return Path(str(package.__file__)).parent / "py.typed"

    assert all(marker(package).exists() for package in PACKAGES)
