"""Differences between databases are only in the dialects."""

from __future__ import annotations

import ast

import pytest

from support.source_files import SOURCES


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("tokenstore_sql")])
def test_no_module_compares_the_dialect_s_name(name: str) -> None:
    """A difference between databases is an overridden method, never a comparison of names."""
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        if isinstance(node, ast.Compare):
            assert "dialect" not in ast.unparse(node).lower()
