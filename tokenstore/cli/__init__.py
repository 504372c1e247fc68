"""The console script ``tokenstore``.

The commands are in :mod:`tokenstore.cli.app` and the modules that it imports, which need the extra ``[cli]``. This
module imports nothing else of the package, so that :func:`main` can report a missing extra, and so that the demo's
worker processes, which import the console script, start fast.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenstore.cli.options import Application

__all__ = ["main"]


def main(
    arguments: Sequence[str] | None = None,
    *,
    program: str = "tokenstore",
    application: Callable[[], Application] | None = None,
) -> int:
    """Run the command line.

    Args:
        arguments: The words behind the program's name. Default: those of ``sys.argv``.
        program: What the help calls the program.
        application: Returns the settings of the application that names the store, and is called if a command needs one.
            Default: the options and environment variables name it.

    Returns:
        The exit code.
    """
    try:
        from tokenstore.cli.app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
        sys.stderr.write(f'error: the command line needs {error.name}: pip install "tokenstore[cli]"\n')
        return 2
    except KeyboardInterrupt:
        return 130
    return run(arguments, program, application)
