"""Commands on rows: put, show, list, clear-failure, delete."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
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
from tokenstore.cli.output import (
    Listing,
    format_expiry,
    format_time,
    print_error,
    print_json,
    print_line,
    print_table,
)
from tokenstore.errors import InvalidInputError, RefreshError
from tokenstore.escaping import escaped
from tokenstore.health import STATUSES
from tokenstore.integrations._bodies import parsed
from tokenstore.records import TokenKey, TokenRecord
from tokenstore.refresh.responses import (
    ACCESS_TOKEN_EXPIRY,
    REFRESH_TOKEN_EXPIRY,
    ExpiryFields,
    read_expiry,
    response_fields,
)

__all__ = ["clear_failure", "delete", "list_tokens", "put", "show"]

_MAX_INPUT: Final = 4 * 1024 * 1024  # more than a row can hold
_NOT_PRIMARY: Final = " (not the primary key)"
_SECRET: Final = ("access_token", "refresh_token", "extra", "metadata")


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
    keep_refresh_token: Annotated[
        bool,
        typer.Option(help="Whether a response without a refresh token keeps the stored one."),
    ] = True,
    if_absent: Annotated[bool, typer.Option("--if-absent", help="Store only if the user has no tokens yet.")] = False,
    url: UrlOption = None,
    namespace: NamespaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store a user's tokens, in place of earlier ones.

    Reads a token response (JSON as in RFC 6749 section 5.1, or a form) from standard input; on a terminal it prompts
    for the tokens, without echo. It reads the fields expires_in, expires_at, refresh_token_expires_in and their other
    spellings; an option overrides them. All other fields are stored, encrypted, as `extra`. A response without a
    refresh token keeps the stored one.
    """
    options = common_options(ctx, url, as_json, namespace)
    # The store is opened first: a missing key is reported before the user types in tokens.
    store = open_from_options(options, needs_keys=True)
    response = _prompt() if sys.stdin.isatty() else _parse_response(sys.stdin.buffer.read(_MAX_INPUT + 1))
    with suppress(RefreshError):  # the store tells what it is
        response = dict(response_fields(response))
    _set_expiry(response, ACCESS_TOKEN_EXPIRY, "--expires", expires_in, expires_at)
    _set_expiry(response, REFRESH_TOKEN_EXPIRY, "--refresh-expires", refresh_expires_in, refresh_expires_at)

    async def write() -> TokenRecord:
        async with store:
            return await store.store_token_response(
                provider,
                user,
                response,
                account=account,
                keep_refresh_token=keep_refresh_token,
                if_absent=if_absent,
            )

    record = run_async(write())
    has_refresh_token = record["refresh_token"] is not None
    if options.as_json:
        print_json(
            {
                **TokenKey(provider, user, account)._asdict(),
                "access_token_expires_at": record["access_token_expires_at"],
                "access_token_expiry_known": record["access_token_expiry_known"],
                "refresh_token_expires_at": record["refresh_token_expires_at"],
                "has_refresh_token": has_refresh_token,
                "extra_fields": sorted(record["extra"]),
            }
        )
    else:
        refresh = f"expires {format_time(record['refresh_token_expires_at'])}" if has_refresh_token else "none"
        print_line(f"stored; access token expires {format_expiry(record)}; refresh token: {refresh}")


def _prompt() -> dict[str, Any]:
    access_token = typer.prompt("Access token", hide_input=True, err=True)
    refresh_token = typer.prompt(
        "Refresh token (empty: keep a stored one)", hide_input=True, err=True, default="", show_default=False
    )
    return {"access_token": access_token, "refresh_token": refresh_token or None}


def _parse_response(data: bytes) -> dict[str, Any]:
    response = None
    if len(data) <= _MAX_INPUT:
        response = parsed(data)
    if not isinstance(response, dict):
        raise InvalidInputError("standard input must be a token response: one JSON object or form with access_token")
    return response


def _set_expiry(
    response: dict[str, Any], fields: ExpiryFields, option: str, lifetime: float | None, moment: str | None
) -> None:
    """Put the options' expiry of a token into the response, or check the one that it has.

    A response from a file may be old. Then its lifetime began at an unknown time, and its time of expiry is right.

    Raises:
        InvalidInputError: The options or the fields cannot be read.
    """
    if lifetime is not None and moment is not None:
        raise InvalidInputError(f"pass either {option}-in or {option}-at, not both")
    if lifetime is not None and lifetime <= 0:
        raise InvalidInputError(f"{option}-in must be more than zero")
    if lifetime is not None or moment is not None:
        for name in fields.spellings:
            response.pop(name, None)
        response |= {fields.lifetimes[0]: lifetime, fields.moments[0]: moment}
    by_moment = replace(fields, lifetimes=())
    _ = read_expiry(response, fields, 0, fresh=False)
    if read_expiry(response, by_moment, 0, fresh=True).known:
        for name in replace(fields, moments=()).spellings:
            response.pop(name, None)


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
            entries = [one async for one in store.list_tokens(provider=provider, user_id=user)]
            health = next((one for one in entries if one["account"] == account), None)
            if health is None:
                _not_found(TokenKey(provider, user, account))
            shown = dict(record.items())
            secret = {name: shown.pop(name) for name in _SECRET}
            shown |= {
                "access_token_valid": store.is_access_token_valid(record),
                "refresh_token_valid": store.is_refresh_token_valid(record),
                "has_refresh_token": record["refresh_token"] is not None,
                "extra_fields": sorted(record["extra"]),
                "metadata_fields": sorted(record["metadata"]),
                "needs_reseal": store.needs_reseal(record),
                **{name: health[name] for name in ("status", "failure_code", "failed_at", "retry_at")},
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
            ("status", _status(row)),
            *([("failed", format_time(row["failed_at"]))] if row["failed_at"] is not None else []),
            *([("next try", format_time(row["retry_at"]))] if row["retry_at"] is not None else []),
            ("access token", f"{access}; expires {format_expiry(row)}"),
            ("refresh token", refresh + refresh_expiry),
            ("extra", ", ".join(row["extra_fields"]) or "none"),
            ("metadata", ", ".join(row["metadata_fields"]) or "none"),
            ("key", _key_names(row)),
            ("updated", f"{format_time(row['updated_at'])}, generation {row['generation']}"),
        ]
    )
    if reveal:
        for name in _SECRET:
            # Not in the table, which breaks long values into lines: users copy these values.
            print_line(f"{name}: {escaped(row[name]) if isinstance(row[name], str) else json.dumps(row[name])}")


def list_tokens(
    ctx: typer.Context,
    provider: Annotated[str | None, typer.Option(metavar="PROVIDER", help="Only this provider's rows.")] = None,
    user: Annotated[str | None, typer.Option(metavar="USER", help="Only this user's rows.")] = None,
    user_prefix: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Only rows whose user id begins with this text.")
    ] = None,
    status: Annotated[
        str | None, typer.Option(metavar="STATUS", help=f"Only rows with this status: {', '.join(sorted(STATUSES))}.")
    ] = None,
    expiring_within: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Only access tokens that expire within this time, or have expired."),
    ] = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """List rows, without their tokens. Needs no keys; with keys it marks rows not sealed with the primary key."""
    options = common_options(ctx, url, as_json)
    if status is not None and status not in STATUSES:
        raise InvalidInputError(f"--status must be one of {', '.join(sorted(STATUSES))}")
    rows: Any = {
        "provider": provider,
        "user_id": user,
        "user_prefix": user_prefix,
        "status": status,
        "expiring_within": expiring_within,
    }
    listing = Listing("PROVIDER", "USER", "ACCOUNT", "STATUS", "ACCESS EXPIRES", "REFRESH EXPIRES", "KEY", "UPDATED")

    async def scan() -> None:
        # Each row is printed as it is read: a table may have more rows than fit into the memory.
        async with open_from_options(options, needs_keys=False) as store:
            async for entry in store.list_tokens(**rows):
                row = {**entry, "needs_reseal": store.needs_reseal(entry) if has_keys(options) else None}
                if options.as_json:
                    print_json(row)
                else:
                    listing.add(_cells(row))

    with listing:
        run_async(scan())
    if not options.as_json and not listing.rows:
        print_error("no rows", prefix="")


def _status(row: Mapping[str, Any]) -> str:
    return f"{row['status']} ({row['failure_code']})" if row["failure_code"] is not None else str(row["status"])


def _cells(row: Mapping[str, Any]) -> Iterator[str]:
    yield row["provider"]
    yield row["user_id"]
    yield row["account"]
    yield _status(row)
    yield format_expiry(row)
    yield format_time(row["refresh_token_expires_at"]) if row["has_refresh_token"] else "none issued"
    yield _key_names(row)
    yield format_time(row["updated_at"])


def _key_names(row: Mapping[str, Any]) -> str:
    """The key that sealed the tokens, and that of the metadata if it is another one."""
    own = row["metadata_key_id"]
    names = row["key_id"] if own in (None, row["key_id"]) else f"{row['key_id']}, metadata {own}"
    return str(names) + _NOT_PRIMARY * bool(row["needs_reseal"])


def clear_failure(
    ctx: typer.Context,
    provider: ProviderArgument,
    user: UserArgument,
    account: AccountOption = "",
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Clear the failure of a row's last refresh: the next load calls the provider at once. Needs no keys."""
    options = common_options(ctx, url, as_json)
    key = TokenKey(provider, user, account)

    async def clear() -> bool:
        async with open_from_options(options, needs_keys=False) as store:
            return await store.clear_failure(provider, user, account=account)

    if not run_async(clear()):
        print_error(f"no failure of {key}")
        raise typer.Exit(NOT_FOUND)
    if options.as_json:
        print_json({**key._asdict(), "cleared": True})
    else:
        print_line("cleared")


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
