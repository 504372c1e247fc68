"""Commands for a new installation: a key, and the tables."""

from __future__ import annotations

from typing import Annotated

import typer

from tokenstore.cli.options import JsonOption, UrlOption, common_options, open_from_options, run_async
from tokenstore.cli.output import print_json, print_line
from tokenstore.keyring import generate_key

__all__ = ["init", "keygen"]


def keygen(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", show_default=False, help="The key's name; default: k1.")
    ] = "k1",
    as_json: JsonOption = False,
) -> None:
    """Print a new random key as an entry for TOKENSTORE_KEYS. Nothing is stored."""
    entry = generate_key(name)
    if common_options(ctx, None, as_json).as_json:
        print_json({"name": name, "entry": entry})
    else:
        print_line(entry)


def init(ctx: typer.Context, url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Create the tables that are missing. Needs no keys."""
    options = common_options(ctx, url, as_json)

    async def create() -> None:
        async with open_from_options(options, needs_keys=False) as store:
            await store.setup()

    run_async(create())
    if options.as_json:
        print_json({"ready": True})
    else:
        print_line("the tables are ready")
