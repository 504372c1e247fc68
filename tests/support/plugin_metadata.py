"""The metadata by which pytest finds the plugin, also where the installed tokenstore is an older one."""

from __future__ import annotations

import os
from pathlib import Path

from support.page_reader import PYTHONPATH
from support.pages import PROJECT

PACKAGES = ("tokenstore", "tokenstore_memory", "tokenstore_sql")


def python_path(folder: Path) -> str:
    """Write what an installed tokenstore has in its metadata; return the PYTHONPATH of programs that see it."""
    metadata = folder / f"tokenstore-{PROJECT['version']}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tokenstore\nVersion: {PROJECT['version']}\n")
    points = "".join(f"{name} = {target}\n" for name, target in PROJECT["entry-points"]["pytest11"].items())
    (metadata / "entry_points.txt").write_text(f"[pytest11]\n{points}")
    # By its files pytest knows which modules belong to the plugin, and rewrites their assertions.
    (metadata / "RECORD").write_text("".join(f"{package}/__init__.py,,\n" for package in PACKAGES))
    return os.pathsep.join([str(folder), *PYTHONPATH])
