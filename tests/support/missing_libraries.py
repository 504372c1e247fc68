"""What a user without an extra sees."""

from __future__ import annotations

import subprocess
import sys

__all__ = ["import_error"]


def import_error(module: str, missing: str) -> str:
    """Import a module where a library is not installed. Returns the type and the text of the ImportError."""
    program = f"""
import sys
sys.modules[{missing!r}] = None
try:
    import {module}
except ImportError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    return done.stdout
