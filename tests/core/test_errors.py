"""The tree of errors."""

from __future__ import annotations

import re

import tokenstore
import tokenstore.errors


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
