"""The documentation's site: the program that builds it, and where it is."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from support.paths import ROOT

_PROGRAM = Path("docs/site/build.py")


def build(folder: Path, checkout: Path = ROOT) -> Path:
    """Build the site in a folder, as a reader of CONTRIBUTING.md does, and return where its pages are.

    Raises:
        AssertionError: The build failed. The message is what it printed.
    """
    command = [sys.executable, str(checkout / _PROGRAM), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def builder() -> ModuleType:
    """Import the program, which is no part of a package."""
    spec = spec_from_file_location("build_site", ROOT / _PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
