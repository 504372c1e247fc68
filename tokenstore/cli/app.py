"""The program ``tokenstore``: its commands, and how each of them ends."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, Never, cast

import typer
from typer.core import TyperGroup

from tokenstore.cli.demo.command import demo
from tokenstore.cli.exits import BROKEN_PIPE, EXIT_CODES, INPUT_OUTPUT, INTERRUPTED, USAGE, exit_code_of
from tokenstore.cli.options import Application, CommonOptions, JsonOption, NamespaceOption, UrlOption
from tokenstore.cli.output import print_error, print_line
from tokenstore.cli.refreshing import refresh_due
from tokenstore.cli.setup import init, keygen, migrate
from tokenstore.cli.tokens import clear_failure, delete, list_tokens, put, show
from tokenstore.errors import TokenStoreError
from tokenstore.tracebacks import clears_locals

__all__ = ["app", "run"]

# Click's UsageError. Newer releases of typer contain Click and do not export the class.
_UsageError: Final = cast(type[Exception], typer.BadParameter.__base__)


class _CommandGroup(TyperGroup):
    """Ends every command with at most one line on standard error, and with an exit code."""

    @clears_locals
    def main(self, *args: Any, **kwargs: Any) -> Never:
        code: object = None
        try:
            # Not in "standalone mode", which would print the wrong argument. That may be a URL with its password.
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
            sys.stdout.flush()
        except _UsageError as error:
            _explain(error)
            code = USAGE
        except typer.Abort:
            print_error("aborted", prefix="\n")
            code = INTERRUPTED
        except OSError as error:
            _abandon_output()
            print_error(f"input or output failed: {error.strerror or type(error).__name__}")
            code = INPUT_OUTPUT
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except TokenStoreError as error:
            print_error(str(error))
            code = exit_code_of(error)
        except BrokenPipeError:
            _abandon_output()
            code = BROKEN_PIPE
        raise typer.Exit(code)  # outside the handlers: the error's frames have tokens and URLs


def _explain(error: Exception) -> None:
    """Print what is wrong with the command line, without a wrong argument that may be a URL."""
    format_message: Callable[[], str] = getattr(error, "format_message", error.__str__)
    print_error(re.sub(r"\S*(://|@)\S*", "***", format_message()))
    context: typer.Context | None = getattr(error, "ctx", None)
    print_error(f"try: {context.command_path if context else 'tokenstore'} --help", prefix="")


def _abandon_output() -> None:
    """Drop what is not written yet: Python writes it once more at exit, and would print an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    cls=_CommandGroup,
    add_completion=False,
    pretty_exceptions_enable=False,  # they would show local variables: tokens and URLs
    epilog=EXIT_CODES,
)


def run(
    arguments: Sequence[str] | None = None,
    program: str = "tokenstore",
    application: Callable[[], Application] | None = None,
) -> int:
    """Run the arguments, or ``sys.argv``, and return the exit code: see :func:`tokenstore.cli.main`."""
    words = None if arguments is None else [*arguments]
    try:
        typer.main.get_command(app).main(args=words, prog_name=program, obj=application)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _show_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print_line(f"tokenstore {version('tokenstore')}")
        except PackageNotFoundError:
            print_line("tokenstore (not installed: run from its sources)")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    ctx: typer.Context,
    url: UrlOption = None,
    as_json: JsonOption = False,
    namespace: NamespaceOption = None,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Encrypted OAuth tokens in PostgreSQL, MySQL/MariaDB or SQLite.

    The keys are in TOKENSTORE_KEYS (`tokenstore keygen` prints one), the database in TOKENSTORE_URL or --url.
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(USAGE)
    ctx.obj = CommonOptions(url, as_json, namespace, ctx.obj)


# In the order of the help.
app.command()(keygen)
app.command()(init)
app.command()(migrate)
app.command()(put)
app.command()(show)
app.command("list")(list_tokens)
app.command("clear-failure")(clear_failure)
app.command()(delete)
app.command("refresh-due")(refresh_due)
app.command()(demo)
