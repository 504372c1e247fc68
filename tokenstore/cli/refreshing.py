"""The command that refreshes tokens that expire soon."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from tokenstore.cli.exits import PROVIDER_FAILED
from tokenstore.cli.options import JsonOption, NamespaceOption, UrlOption, common_options, open_from_options, run_async
from tokenstore.cli.output import print_error, print_json, print_line, progress
from tokenstore.errors import ConfigurationError, InvalidInputError
from tokenstore.escaping import escaped
from tokenstore.records import TokenKey
from tokenstore.store import AuthTokenStore

if TYPE_CHECKING:
    from tokenstore.refresh.attempt import Refresh

__all__ = ["refresh_due"]

_REFRESHERS_VARIABLE: Final = "TOKENSTORE_REFRESHERS"
_PAGE_SIZE: Final = 500
_WORDS: Final[Mapping[str, str]] = {
    "not_due": "refreshed by other processes",
    "busy": "left to other processes",
    "gone": "deleted",
    "dead": "without a usable refresh token, so the user has to log in again",
    "deferred": "deferred after an earlier failure",
}


def refresh_due(
    ctx: typer.Context,
    within: Annotated[
        str, typer.Option(metavar="TIME", help="Refresh tokens that expire within this time: 90s, 10m, 2h, 1d.")
    ] = "10m",
    provider: Annotated[str | None, typer.Option(metavar="PROVIDER", help="Only this provider's rows.")] = None,
    refreshers: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:NAME",
            show_default=False,
            help="The mapping from providers' names to refreshers that open_store takes. The module may be in the "
            f"current folder, which is searched last. Default: ${_REFRESHERS_VARIABLE}.",
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1000, help="The most refreshes at a time.")] = 8,
    url: UrlOption = None,
    namespace: NamespaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Refresh tokens that expire soon. Several machines may run this at once: one of them refreshes each row.

    Exit code 5 means that a refresh failed in this run. Rows whose failure was known before are counted, and do not
    fail the command again; so are due rows of a provider without a refresher.
    """
    options = common_options(ctx, url, as_json, namespace)
    seconds = _seconds(within)
    if options.application is not None and refreshers is None:
        mapping = options.application().refreshers
    else:
        mapping = _import_refreshers(refreshers or os.environ.get(_REFRESHERS_VARIABLE))

    strangers: Counter[str] = Counter()

    async def run() -> Counter[str]:
        outcomes: Counter[str] = Counter()
        due = 0
        async with open_from_options(options, needs_keys=True, refreshers=mapping) as store:
            async for key in _due(store, provider, seconds):
                if key.provider in mapping:
                    due += 1
                    continue
                strangers[key.provider] += 1
                if options.as_json:
                    _print_result(key, "no_refresher", None)
            with progress(due) as advance:
                async for result in store.refresh_due(within=seconds, provider=provider, concurrency=concurrency):
                    outcomes[result.outcome] += 1
                    advance()
                    if options.as_json:
                        error = None if result.error is None else str(result.error)
                        key = TokenKey(result.provider, result.user_id, result.account)
                        _print_result(key, result.outcome, error)
                    elif result.outcome == "failed":
                        print_error(str(result.error))
        return outcomes

    outcomes = run_async(run())
    if not options.as_json:
        counts = [f"{count} {_WORDS.get(name, name)}" for name, count in sorted(outcomes.items())]
        counts += [f"{count} of {escaped(name)}, which has no refresher" for name, count in sorted(strangers.items())]
        print_line(", ".join(counts) or "nothing due")
    raise typer.Exit(PROVIDER_FAILED if outcomes["failed"] else 0)


async def _due(store: AuthTokenStore, provider: str | None, seconds: float) -> AsyncIterator[TokenKey]:
    """The rows that are due, to count them. The refresh finds them again, and reports each row that was altered."""
    from tokenstore.listing import RefusedRow, scan_providers
    from tokenstore.refresh.due import due_keys

    backend = store._backend
    names = [name async for name in scan_providers(backend)] if provider is None else [provider]
    for name in names:
        async for key in due_keys(backend, name, seconds, _PAGE_SIZE):
            if not isinstance(key, RefusedRow):
                yield key


def _print_result(key: TokenKey, outcome: str, error: str | None) -> None:
    print_json({**key._asdict(), "outcome": outcome, "error": error})


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhd]?)", text, re.ASCII)
    if match is None:
        raise InvalidInputError("--within must be a time such as 90s, 10m, 2h or 1d")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def _import_refreshers(target: str | None) -> Mapping[str, Refresh]:
    module, colon, name = (target or "").partition(":")
    if not module or not colon or not name:
        raise ConfigurationError(f"no refreshers: pass --refreshers MODULE:NAME or set {_REFRESHERS_VARIABLE}")
    # At the end: no file in this folder may take the place of an installed module.
    sys.path.append(str(Path.cwd()))
    failure = None
    try:
        found: object = getattr(import_module(module), name)
    except Exception as error:  # noqa: BLE001 - the user's module may raise anything, and its text may hold a secret
        failure, found = type(error).__name__, None
    if failure is not None:
        raise ConfigurationError(f"{target} cannot be imported ({failure}); try: python -c 'import {module}'")
    if not isinstance(found, Mapping) or not all(isinstance(key, str) and callable(found[key]) for key in found):
        raise ConfigurationError(f"{target} must be a mapping from providers' names to callables")
    if not found:
        raise ConfigurationError(f"{target} has no refreshers: it is an empty mapping")
    return found
