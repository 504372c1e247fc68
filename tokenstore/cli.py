"""The console script ``tokenstore``.

The commands stand in :mod:`tokenstore._commands`, which needs the extra ``[cli]``.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line on ``sys.argv`` and return its exit code."""
    try:
        # Here: without the extra there must be a line to read instead of a traceback; and the demo's processes, which
        # import the console script anew, need none of it.
        from tokenstore._commands import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
        sys.stderr.write(f'error: the command line needs {error.name}: pip install "tokenstore[cli]"\n')
        return 2
    except KeyboardInterrupt:
        return 130
    return run()
