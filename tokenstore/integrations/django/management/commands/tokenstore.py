"""``manage.py tokenstore``: the command line, on the store of the setting ``TOKENSTORE``."""

from __future__ import annotations

import sys
from argparse import REMAINDER, ArgumentParser
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, Final

from django.core.management.base import BaseCommand, CommandError

from tokenstore.cli import main
from tokenstore.integrations.django.settings import store_settings

__all__ = ["Command"]

_PROGRAM: Final = "manage.py tokenstore"


class Command(BaseCommand):  # type: ignore[misc]
    """The commands of ``tokenstore``: ``init``, ``list``, ``refresh-due`` and the others; needs the extra ``cli``."""

    help = "Commands on the OAuth tokens of the setting TOKENSTORE: init, list, show, refresh-due and others."
    # The command itself says what is wrong with the setting. `keygen` and `--help` work without one.
    requires_system_checks: Sequence[str] = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Take the words behind the command's name as they are."""
        parser.add_argument("arguments", nargs=REMAINDER)

    def print_help(self, prog_name: str, subcommand: str) -> None:
        """Print the help of the command line; for ``manage.py help tokenstore``."""
        del prog_name, subcommand
        _ = main(["--help"], program=_PROGRAM)

    def run_from_argv(self, argv: list[str]) -> None:
        """Run ``manage.py tokenstore …``, and exit with the code of the command line."""
        # Django has read these options, and allows them at any place.
        of_django = ArgumentParser(add_help=False, allow_abbrev=False)
        _ = of_django.add_argument("--settings")
        _ = of_django.add_argument("--pythonpath")
        _, arguments = of_django.parse_known_args(argv[2:])
        sys.exit(main(arguments, program=_PROGRAM, application=store_settings))

    def handle(self, *_: Any, **options: Any) -> None:
        """Run ``call_command("tokenstore", …)``.

        Raises:
            CommandError: The command failed. It has printed why; ``returncode`` is the exit code.
        """
        output, errors = options.get("stdout") or sys.stdout, options.get("stderr") or sys.stderr
        with redirect_stdout(output), redirect_stderr(errors):
            code = main(options["arguments"], program=_PROGRAM, application=store_settings)
        if code:
            raise CommandError(f"{_PROGRAM} ended with exit code {code}", returncode=code)
