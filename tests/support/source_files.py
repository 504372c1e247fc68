"""The source files of the packages under test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import tokenstore
import tokenstore_memory
import tokenstore_sql

PACKAGES = (tokenstore, tokenstore_memory, tokenstore_sql)


def _sources() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), path


SOURCES = dict(_sources())
MODULES = [name for name in SOURCES if not name.endswith("__main__")]
