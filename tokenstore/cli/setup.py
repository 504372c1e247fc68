"""Commands for a new installation, or a new version: a key, and the tables."""

from __future__ import annotations

from typing import Annotated

import typer

from tokenstore.cli.options import JsonOption, UrlOption, common_options, open_from_options, run_async
from tokenstore.cli.output import print_json, print_line
from tokenstore.keyring import generate_key
from tokenstore.records import MigrationResult

__all__ = ["init", "keygen", "migrate"]


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


def migrate(
    ctx: typer.Context,
    url: UrlOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; print what there is to do.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring the tables of an older tokenstore to this version, beside running programs. Needs no keys.

    Programs of the version before go on meanwhile and afterwards: migrate first, then replace the programs.
    """
    options = common_options(ctx, url, as_json)

    async def run() -> MigrationResult:
        async with open_from_options(options, needs_keys=False) as store:
            return await store.migrate(dry_run=dry_run)

    result = run_async(run())
    if options.as_json:
        print_json({**result._asdict(), "dry_run": dry_run})
        return
    for step in result.steps:
        print_line(f"{'to do' if dry_run else 'done'}: {step}")
    if dry_run and result.steps:
        print_line(f"the tables are of version {result.found}; `tokenstore migrate` brings them to {result.version}")
    else:
        print_line(f"the tables are of version {result.version}")
