"""The command ``tokenstore demo``."""

from __future__ import annotations

from typing import Annotated

import typer

from tokenstore.cli.options import JsonOption, UrlOption, common_options
from tokenstore.cli.output import print_json

__all__ = ["demo"]


def demo(
    ctx: typer.Context,
    processes: Annotated[int, typer.Option(min=2, max=16, help="Worker processes.")] = 8,
    tasks: Annotated[int, typer.Option(min=1, max=200, help="Tasks in each process.")] = 25,
    latency: Annotated[float, typer.Option(min=0.0, max=5.0, help="Seconds the provider takes to answer.")] = 0.5,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare three ways to refresh one expired token from many processes: load_fresh_tokens, a row lock, neither.

    The demo has its own provider on the loopback interface, its own key, and its own table, which it drops at the end.
    It uses a temporary SQLite file, or the database that --url names; it ignores TOKENSTORE_URL.
    """
    options = common_options(ctx, url, as_json)
    # Imported here: the help of the command line needs neither processes nor a provider.
    from tokenstore.cli.demo.rounds import run_demo

    report = run_demo(options.url, processes=processes, tasks=tasks, latency=latency, quiet=options.as_json)
    if options.as_json:
        print_json(report.as_dict())
    raise typer.Exit(0 if report.passed else 1)
