"""The console script ``tokenstore``.

The commands are in :mod:`tokenstore.cli.app` and the modules that it imports, which need the extra ``[cli]``. This
module imports nothing else of the package, so that :func:`main` can report a missing extra, and so that the demo's
worker processes, which import the console script, start fast.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line on ``sys.argv`` and return its exit code."""
    try:
        from tokenstore.cli.app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
        sys.stderr.write(f'error: the command line needs {error.name}: pip install "tokenstore[cli]"\n')
        return 2
    except KeyboardInterrupt:
        return 130
    return run()
