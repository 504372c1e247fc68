"""Where the differences between databases may stand."""

from __future__ import annotations

import ast

import pytest

from support.source_files import SOURCES


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("tokenstore_sql")])
def test_no_branch_asks_for_the_dialect(name: str) -> None:
    """A database's difference is an overridden method, never a comparison with a dialect's name."""
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        if isinstance(node, ast.Compare):
            assert "dialect" not in ast.unparse(node).lower()
