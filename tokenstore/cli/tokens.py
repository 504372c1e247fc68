"""Commands on rows: put, show, list, delete."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from time import time
from typing import Annotated, Any, Final, Never

import typer

from tokenstore.cli.exits import NOT_FOUND
from tokenstore.cli.options import (
    AccountOption,
    JsonOption,
    NamespaceOption,
    ProviderArgument,
    UrlOption,
    UserArgument,
    common_options,
    has_keys,
    open_from_options,
    run_async,
)
from tokenstore.cli.output import format_time, print_error, print_json, print_line, print_table
from tokenstore.errors import InvalidInputError, TamperedError
from tokenstore.escaping import escaped
from tokenstore.integrations._bodies import parsed
from tokenstore.records import TokenKey, optional_datetime
from tokenstore.refresh.responses import ACCESS_TOKEN_EXPIRY, REFRESH_TOKEN_EXPIRY, ExpiryFields, read_expiry

__all__ = ["delete", "list_tokens", "put", "show"]

_MAX_INPUT: Final = 4 * 1024 * 1024  # more than a row can hold
_NOT_PRIMARY: Final = " (not the primary key)"


def put(
    ctx: typer.Context,
    provider: ProviderArgument,
    user: UserArgument,
    account: AccountOption = "",
    expires_in: Annotated[float | None, typer.Option(metavar="SECONDS", help="The access token's lifetime.")] = None,
    expires_at: Annotated[
        str | None, typer.Option(metavar="TIME", help="The access token's expiry, ISO 8601; UTC if no zone.")
    ] = None,
    refresh_expires_in: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="The refresh token's lifetime.")
    ] = None,
    refresh_expires_at: Annotated[
        str | None, typer.Option(metavar="TIME", help="The refresh token's expiry, ISO 8601; UTC if no zone.")
    ] = None,
    url: UrlOption = None,
    namespace: NamespaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store a user's tokens, in place of earlier ones.

    Reads a token response (JSON as in RFC 6749 section 5.1, or a form) from standard input; on a terminal it prompts
    for the tokens, without echo. It reads the fields expires_in, expires_at, expires_on, expiry_date or expiry, and
    refresh_token_expires_in or refresh_token_expires_at; an option overrides them. A token without such a field never
    expires. All other fields are stored, encrypted, as `extra`.
    """
    options = common_options(ctx, url, as_json, namespace)
    # The store is opened first: a missing key is reported before the user types in tokens.
    store = open_from_options(options, needs_keys=True)
    response = _prompt() if sys.stdin.isatty() else _parse_response(sys.stdin.buffer.read(_MAX_INPUT + 1))
    access_expiry = _expiry(response, ACCESS_TOKEN_EXPIRY, expires_in, expires_at)
    refresh_expiry = _expiry(response, REFRESH_TOKEN_EXPIRY, refresh_expires_in, refresh_expires_at)
    access_token, refresh_token = response.pop("access_token", None), response.pop("refresh_token", None)
    refresh_token = None if refresh_token == "" else refresh_token  # none was issued, as in a refresh
    if access_token is None:
        raise InvalidInputError("the token response has no access_token")

    async def write() -> None:
        async with store:
            await store.store_tokens(
                *(provider, user, access_token, refresh_token, access_expiry, refresh_expiry),
                account=account,
                extra=response,
            )

    run_async(write())
    if options.as_json:
        print_json(
            {
                **TokenKey(provider, user, account)._asdict(),
                "access_token_expires_at": access_expiry,
                "refresh_token_expires_at": refresh_expiry,
                "has_refresh_token": refresh_token is not None,
                "extra_fields": sorted(response),
            }
        )
    else:
        refresh = f"expires {format_time(refresh_expiry)}" if refresh_token is not None else "none"
        print_line(f"stored; access token expires {format_time(access_expiry)}; refresh token: {refresh}")


def _prompt() -> dict[str, Any]:
    access_token = typer.prompt("Access token", hide_input=True, err=True)
    refresh_token = typer.prompt(
        "Refresh token (empty: none)", hide_input=True, err=True, default="", show_default=False
    )
    return {"access_token": access_token, "refresh_token": refresh_token or None}


def _parse_response(data: bytes) -> dict[str, Any]:
    response = None
    if len(data) <= _MAX_INPUT:
        response = parsed(data)
    if not isinstance(response, dict):
        raise InvalidInputError("standard input must be a token response: one JSON object or form with access_token")
    return response


def _expiry(
    response: dict[str, Any], fields: ExpiryFields, lifetime: float | None, moment: str | None
) -> datetime | None:
    """Take a token's expiry out of the response; the options override it."""
    if lifetime is not None and moment is not None:
        option = "--refresh-expires" if fields is REFRESH_TOKEN_EXPIRY else "--expires"
        raise InvalidInputError(f"pass either {option}-in or {option}-at, not both")
    if fields is REFRESH_TOKEN_EXPIRY and lifetime is not None and lifetime <= 0:
        raise InvalidInputError("--refresh-expires-in must be more than zero")
    times = {name: response.pop(name, None) for name in fields.names}
    if lifetime is not None or moment is not None:
        times = {fields.lifetimes[0]: lifetime, fields.moments[0]: moment}
    return optional_datetime(read_expiry(times, fields, int(time() * 1_000_000), fresh=False))


def show(
    ctx: typer.Context,
    provider: ProviderArgument,
    user: UserArgument,
    account: AccountOption = "",
    reveal: Annotated[bool, typer.Option("--reveal", help="Print the tokens, too.")] = False,
    url: UrlOption = None,
    namespace: NamespaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a user's row; the tokens only with --reveal."""
    options = common_options(ctx, url, as_json, namespace)

    async def read() -> dict[str, Any]:
        async with open_from_options(options, needs_keys=True) as store:
            record = await store.load_tokens(provider, user, account=account)
            if record is None:
                _not_found(TokenKey(provider, user, account))
            shown = dict(record.items())
            secret = {name: shown.pop(name) for name in ("access_token", "refresh_token", "extra")}
            shown |= {
                "access_token_valid": store.is_access_token_valid(record),
                "refresh_token_valid": store.is_refresh_token_valid(record),
                "has_refresh_token": record["refresh_token"] is not None,
                "extra_fields": sorted(record["extra"]),
                "needs_reseal": store.needs_reseal(record),
            }
            return shown | secret if reveal else shown

    row = run_async(read())
    if options.as_json:
        print_json(row)
        return
    access = "valid" if row["access_token_valid"] else "expired, or about to"
    refresh = "valid" if row["refresh_token_valid"] else "expired" if row["has_refresh_token"] else "none"
    refresh_expiry = f"; expires {format_time(row['refresh_token_expires_at'])}" if row["has_refresh_token"] else ""
    print_table(
        [
            ("provider", provider),
            ("user", user),
            *([("account", account)] if account else []),
            ("access token", f"{access}; expires {format_time(row['access_token_expires_at'])}"),
            ("refresh token", refresh + refresh_expiry),
            ("extra", ", ".join(row["extra_fields"]) or "none"),
            ("key", row["key_id"] + _NOT_PRIMARY * row["needs_reseal"]),
            ("updated", f"{format_time(row['updated_at'])}, generation {row['generation']}"),
        ]
    )
    if reveal:
        for name in ("access_token", "refresh_token", "extra"):
            # Not in the table, which breaks long values into lines: users copy these values.
            print_line(f"{name}: {escaped(row[name]) if isinstance(row[name], str) else json.dumps(row[name])}")


def list_tokens(
    ctx: typer.Context,
    provider: Annotated[str | None, typer.Option(metavar="PROVIDER", help="Only this provider's rows.")] = None,
    user: Annotated[str | None, typer.Option(metavar="USER", help="Only this user's rows.")] = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """List rows, without their tokens. Needs no keys; with keys it marks rows not sealed with the primary key."""
    options = common_options(ctx, url, as_json)
    rows: list[Mapping[str, Any]] = []
    keep = print_json if options.as_json else rows.append

    async def scan() -> TamperedError | None:
        async with open_from_options(options, needs_keys=False) as store:
            try:
                async for entry in store.list_tokens(provider=provider, user_id=user):
                    keep({**entry, "needs_reseal": store.needs_reseal(entry) if has_keys() else None})
            except TamperedError as error:
                return error
        return None

    altered = run_async(scan())
    if rows:
        print_table(
            map(_cells, rows), "PROVIDER", "USER", "ACCOUNT", "ACCESS EXPIRES", "REFRESH EXPIRES", "KEY", "UPDATED"
        )
    elif not options.as_json and altered is None:
        print_error("no rows", prefix="")
    if altered is not None:
        raise altered


def _cells(row: Mapping[str, Any]) -> Iterator[str]:
    yield row["provider"]
    yield row["user_id"]
    yield row["account"]
    yield format_time(row["access_token_expires_at"])
    yield format_time(row["refresh_token_expires_at"]) if row["has_refresh_token"] else "none issued"
    yield row["key_id"] + _NOT_PRIMARY * bool(row["needs_reseal"])
    yield format_time(row["updated_at"])


def delete(
    ctx: typer.Context,
    provider: ProviderArgument,
    user: UserArgument,
    account: AccountOption = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without a prompt.")] = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a user's tokens. Needs no keys."""
    options = common_options(ctx, url, as_json)
    key = TokenKey(provider, user, account)
    if not yes:
        if not sys.stdin.isatty():
            raise InvalidInputError("cannot prompt: standard input is not a terminal; pass --yes")
        question = f"Delete the tokens of {key}? The refresh token cannot be recovered."
        if not typer.confirm(question, err=True):
            raise typer.Exit(NOT_FOUND)

    async def remove() -> bool:
        async with open_from_options(options, needs_keys=False) as store:
            return await store.delete_tokens(provider, user, account=account)

    if not run_async(remove()):
        _not_found(key)
    if options.as_json:
        print_json({**key._asdict(), "deleted": True})
    else:
        print_line("deleted")


def _not_found(key: TokenKey) -> Never:
    print_error(f"no tokens of {key}")
    raise typer.Exit(NOT_FOUND)
