"""The commands of the console script ``tokenstore``."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Never, TypeVar, cast

import rich  # noqa: F401  # its absence is to show at once, not in the middle of a command
import typer
from typer.core import TyperGroup

from tokenstore.errors import (
    BackendError,
    ConfigurationError,
    InvalidInputError,
    RefreshError,
    SealingError,
    TokenStoreError,
)
from tokenstore.keyring import KEYS_VARIABLE, Keyring, generate_key
from tokenstore.store import AuthTokenStore, open_store

if TYPE_CHECKING:
    from tokenstore.refresh.attempt import Refresh

__all__ = ["app", "run"]

T = TypeVar("T")

URL_VARIABLE: Final = "TOKENSTORE_URL"
REFRESHERS_VARIABLE: Final = "TOKENSTORE_REFRESHERS"
NOT_FOUND, USAGE, DATABASE, SEALING, PROVIDER, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 4, 5, 130, 141
_EXIT_CODES: Final = (
    "Exit codes: 0 done; 1 no such row, or declined; 2 usage or configuration; 3 the database refused or cannot be "
    "reached; 4 a stored value does not open; 5 a provider failed; 130 interrupted; 141 the reader of the output went "
    "away."
)
_MAX_INPUT: Final = 4 * 1024 * 1024  # beyond everything that a row can hold
# Click's UsageError, which typer brings along in its newer releases and does not export.
_UsageError: Final = cast(type[Exception], typer.BadParameter.__base__)


class _Group(TyperGroup):
    """Ends every command, however it ends, with one line at most and the exit code that stands for it."""

    def main(self, *args: Any, **kwargs: Any) -> Never:
        code: object = None
        try:
            # Not in "standalone mode": that would print the offending argument, which may be a URL with its password.
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except _UsageError as error:
            format_message: Callable[[], str] = getattr(error, "format_message", error.__str__)
            _fail(re.sub(r"\S*(://|@)\S*", "***", format_message()))
            context: typer.Context | None = getattr(error, "ctx", None)
            _fail(f"try: {context.command_path if context else 'tokenstore'} --help", prefix="")
            code = USAGE
        except typer.Abort:
            _fail("aborted", prefix="\n")
            code = INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except TokenStoreError as error:
            _fail(str(error))
            raise typer.Exit(_exit_code(error)) from None
        except BrokenPipeError:
            # Python flushes stdout once more on its way out, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    pretty_exceptions_enable=False,  # they would show local variables: tokens and URLs
    epilog=_EXIT_CODES,
)


def run() -> int:
    """Run ``sys.argv`` and return the exit code."""
    try:
        typer.main.get_command(app).main(prog_name="tokenstore")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


# -- what the commands share -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Settings:
    url: str | None = None
    as_json: bool = False


Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        show_default=False,
        help=f"The database: postgresql://…, mysql://…, sqlite:///file. Default: ${URL_VARIABLE}, which unlike an "
        "argument does not show in `ps`. Options such as the table's name go into its query: ?table=NAME.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Provider = Annotated[str, typer.Argument(metavar="PROVIDER", help="The provider's name, such as github.")]
User = Annotated[str, typer.Argument(metavar="USER", help="The user's id.")]


def _settings(ctx: typer.Context, url: str | None, as_json: bool) -> _Settings:
    """The options of the command over those before it."""
    outer = ctx.obj if isinstance(ctx.obj, _Settings) else _Settings()
    return _Settings(outer.url if url is None else url, as_json or outer.as_json)


def _open(settings: _Settings, *, needs_keys: bool, refreshers: Mapping[str, Refresh] | None = None) -> AuthTokenStore:
    url = settings.url or os.environ.get(URL_VARIABLE)
    if not url:
        raise ConfigurationError(f"which database? Set {URL_VARIABLE} or give --url")
    if url.lower().startswith("memory:"):
        raise ConfigurationError("memory:// would be gone when this command ends; name a database")
    keyring = None
    if not needs_keys and not _has_keys():
        # A store wants a keyring; this one seals and opens nothing.
        keyring = Keyring({"unused": os.urandom(32)})
    return open_store(url, keyring=keyring, refreshers=refreshers)


def _has_keys() -> bool:
    return bool(os.environ.get(KEYS_VARIABLE))


def _run(operation: Coroutine[Any, Any, T]) -> T:
    import asyncio  # here: to show help it is not needed, and would take as long as all of the store

    return asyncio.run(operation)


def _exit_code(error: TokenStoreError) -> int:
    for kind, code in ((BackendError, DATABASE), (SealingError, SEALING), (RefreshError, PROVIDER)):
        if isinstance(error, kind):
            return code
    return USAGE


def _fail(message: str, *, prefix: str = "error: ") -> None:
    sys.stderr.write(f"{prefix}{message}\n")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _say_json(value: Mapping[str, Any]) -> None:
    # ASCII: an id's control characters must not reach a terminal.
    _say(json.dumps(value, default=lambda moment: moment.isoformat()))


def _plain(text: str) -> str:
    """The text with everything escaped that could move a terminal's cursor or reverse its writing."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _when(moment: datetime | None) -> str:
    return "never" if moment is None else f"{moment:%Y-%m-%d %H:%M}Z"


def _print_table(rows: Iterable[Iterable[str]], *columns: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    class Plumbing(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    table = Table(
        *columns, box=None, pad_edge=False, show_header=bool(columns), header_style="bold", padding=(0, 3, 0, 0)
    )
    if not columns:
        table.add_column(style="dim")
    for row in rows:
        table.add_row(*(Text(_plain(cell), overflow="fold") for cell in row))
    # What reads a pipe wants one line a row, however long.
    Plumbing(width=None if sys.stdout.isatty() else 4000).print(table)


# -- the commands ----------------------------------------------------------------------------------


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            _say(f"tokenstore {version('tokenstore')}")
        except PackageNotFoundError:
            _say("tokenstore (not installed: run from its sources)")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    ctx: typer.Context,
    url: Url = None,
    as_json: Json = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Encrypted OAuth tokens in PostgreSQL, MySQL/MariaDB or SQLite.

    Keys come from TOKENSTORE_KEYS (`tokenstore keygen` makes one), the database from TOKENSTORE_URL or --url.
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(USAGE)
    ctx.obj = _Settings(url, as_json)


@app.command()
def keygen(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="[NAME]", show_default=False, help="Its name; default: k1.")] = "k1",
    as_json: Json = False,
) -> None:
    """Print a new random key as an entry for TOKENSTORE_KEYS. Nothing is stored."""
    entry = generate_key(name)
    if _settings(ctx, None, as_json).as_json:
        _say_json({"name": name, "entry": entry})
    else:
        _say(entry)


@app.command()
def init(ctx: typer.Context, url: Url = None, as_json: Json = False) -> None:
    """Create the token table, if it is not there yet. Needs no keys."""
    settings = _settings(ctx, url, as_json)

    async def setup() -> None:
        async with _open(settings, needs_keys=False) as store:
            await store.setup()

    _run(setup())
    if settings.as_json:
        _say_json({"ready": True})
    else:
        _say("the token table is ready")


@app.command()
def put(
    ctx: typer.Context,
    provider: Provider,
    user: User,
    expires_in: Annotated[float | None, typer.Option(metavar="SECONDS", help="The access token's lifetime.")] = None,
    expires_at: Annotated[
        str | None, typer.Option(metavar="TIME", help="Its expiry, ISO 8601; UTC if no zone.")
    ] = None,
    refresh_expires_in: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="The refresh token's lifetime.")
    ] = None,
    refresh_expires_at: Annotated[str | None, typer.Option(metavar="TIME", help="Its expiry, ISO 8601.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Store a user's tokens, replacing what was there.

    Reads a token response (JSON as in RFC 6749 section 5.1) from standard input; at a terminal it asks, without echo.
    Times: expires_in or expires_at, refresh_token_expires_in or refresh_token_expires_at; an option here wins.
    Without any, the token never expires. All further fields are kept, encrypted, as `extra`.
    """
    settings = _settings(ctx, url, as_json)
    # The store first: whoever lacks a key is told so before typing in tokens.
    store = _open(settings, needs_keys=True)
    response = _prompted() if sys.stdin.isatty() else _read_response(sys.stdin.buffer.read(_MAX_INPUT + 1))
    access_expiry = _expiry(response, "expires", expires_in, expires_at)
    refresh_expiry = _expiry(response, "refresh_token_expires", refresh_expires_in, refresh_expires_at)
    access_token, refresh_token = response.pop("access_token", None), response.pop("refresh_token", None)
    if access_token is None:
        raise InvalidInputError("the token response has no access_token")

    async def write() -> None:
        async with store:
            await store.store_tokens(
                provider, user, access_token, refresh_token, access_expiry, refresh_expiry, extra=response
            )

    _run(write())
    if settings.as_json:
        _say_json(
            {
                "provider": provider,
                "user_id": user,
                "access_token_expires_at": access_expiry,
                "refresh_token_expires_at": refresh_expiry,
                "has_refresh_token": refresh_token is not None,
                "extra_fields": sorted(response),
            }
        )
    else:
        refresh = f"expires {_when(refresh_expiry)}" if refresh_token is not None else "none"
        _say(f"stored; access token expires {_when(access_expiry)}; refresh token: {refresh}")


def _prompted() -> dict[str, Any]:
    access_token = typer.prompt("Access token", hide_input=True, err=True)
    refresh_token = typer.prompt(
        "Refresh token (empty: none)", hide_input=True, err=True, default="", show_default=False
    )
    return {"access_token": access_token, "refresh_token": refresh_token or None}


def _read_response(data: bytes) -> dict[str, Any]:
    response = None
    if len(data) <= _MAX_INPUT:
        with suppress(ValueError, RecursionError):  # their texts carry the document
            response = json.loads(data)
    if not isinstance(response, dict):
        raise InvalidInputError("standard input must be a token response: one JSON object with access_token")
    return response


def _expiry(response: dict[str, Any], name: str, lifetime: float | None, moment: str | None) -> datetime | None:
    """An expiry from the options or else from the response, out of which its fields are taken."""
    # Where a client library added the absolute time, `expires_in` is as old as the response.
    stored_moment, stored_lifetime = response.pop(f"{name}_at", None), response.pop(f"{name}_in", None)
    if lifetime is not None and moment is not None:
        raise InvalidInputError("give a lifetime or a time of expiry, one of the two")
    if lifetime is None and moment is None:
        at, seconds = (stored_moment, None) if stored_moment is not None else (None, stored_lifetime)
    else:
        at, seconds = moment, lifetime
    try:
        if at is not None:
            number = _number(at)
            at = datetime.fromisoformat(at) if number is None else datetime.fromtimestamp(number, UTC)
            return at if at.tzinfo else at.replace(tzinfo=UTC)
        if seconds is not None:
            number = _number(seconds)
            if number is None or number < 0:
                raise ValueError
            return datetime.now(UTC) + timedelta(seconds=number)
    except (TypeError, ValueError, OverflowError, OSError):
        kind = f"{name}_in must be a number of seconds" if at is None else f"{name}_at must be ISO 8601 or Unix time"
        raise InvalidInputError(kind) from None
    return None


def _number(value: object) -> float | None:
    """A JSON number, or the string that some providers write it as."""
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, str) and not re.fullmatch(r"\d{1,15}(\.\d*)?", value, re.ASCII):
        return None
    return float(value) if isinstance(value, int | float | str) else None


@app.command()
def show(
    ctx: typer.Context,
    provider: Provider,
    user: User,
    reveal: Annotated[bool, typer.Option("--reveal", help="Show the tokens themselves.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Show a user's row; the tokens only with --reveal."""
    settings = _settings(ctx, url, as_json)

    async def read() -> dict[str, Any]:
        async with _open(settings, needs_keys=True) as store:
            record = await store.load_tokens(provider, user)
            if record is None:
                _not_found(provider, user)
            shown = dict(record)
            secret = {name: shown.pop(name) for name in ("access_token", "refresh_token", "extra")}
            shown |= {
                "access_token_valid": store.is_access_token_valid(record),
                "refresh_token_valid": store.is_refresh_token_valid(record),
                "has_refresh_token": record["refresh_token"] is not None,
                "extra_fields": sorted(record["extra"]),
                "needs_reseal": store.needs_reseal(record),
            }
            return shown | secret if reveal else shown

    row = _run(read())
    if settings.as_json:
        _say_json(row)
        return
    access = "valid" if row["access_token_valid"] else "expired, or about to"
    refresh = "valid" if row["refresh_token_valid"] else "expired" if row["has_refresh_token"] else "none"
    lines = [
        ("provider", provider),
        ("user", user),
        ("access token", f"{access}; expires {_when(row['access_token_expires_at'])}"),
        ("refresh token", refresh + f"; expires {_when(row['refresh_token_expires_at'])}" * row["has_refresh_token"]),
        ("extra", ", ".join(row["extra_fields"]) or "none"),
        ("key", row["key_id"] + _RESEAL * row["needs_reseal"]),
        ("updated", f"{_when(row['updated_at'])}, generation {row['generation']}"),
    ]
    _print_table(lines)
    if reveal:
        for name in ("access_token", "refresh_token", "extra"):
            # Whole and on one line, whatever the terminal's width: they are there to be copied.
            _say(f"{name}: {_plain(row[name]) if isinstance(row[name], str) else json.dumps(row[name])}")


_RESEAL: Final = " (not the first key)"


def _not_found(provider: str, user: str) -> Never:
    _fail(f"no tokens of provider {provider!r}, user {user!r}")
    raise typer.Exit(NOT_FOUND)


@app.command("list")
def list_(
    ctx: typer.Context,
    provider: Annotated[str | None, typer.Option(metavar="PROVIDER", help="Only this provider's rows.")] = None,
    user: Annotated[str | None, typer.Option(metavar="USER", help="Only this user's rows.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """List rows. Reads no token and needs no keys; with them it marks what another than the first key sealed."""
    settings = _settings(ctx, url, as_json)
    rows: list[Mapping[str, Any]] = []
    keep = _say_json if settings.as_json else rows.append

    async def scan() -> None:
        async with _open(settings, needs_keys=False) as store:
            async for entry in store.list_tokens(provider=provider, user_id=user):
                keep({**entry, "needs_reseal": store.needs_reseal(entry) if _has_keys() else None})

    _run(scan())
    if settings.as_json:
        return
    if not rows:
        _fail("no rows", prefix="")
        return
    _print_table(map(_cells, rows), "PROVIDER", "USER", "ACCESS EXPIRES", "REFRESH EXPIRES", "KEY", "UPDATED")


def _cells(row: Mapping[str, Any]) -> Iterator[str]:
    yield row["provider"]
    yield row["user_id"]
    yield _when(row["access_token_expires_at"])
    yield _when(row["refresh_token_expires_at"]) if row["has_refresh_token"] else "none issued"
    yield row["key_id"] + _RESEAL * bool(row["needs_reseal"])
    yield _when(row["updated_at"])


@app.command()
def delete(
    ctx: typer.Context,
    provider: Provider,
    user: User,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Delete a user's tokens. Needs no keys."""
    settings = _settings(ctx, url, as_json)
    if not yes:
        if not sys.stdin.isatty():
            raise InvalidInputError("nobody to ask: standard input is no terminal; give --yes")
        question = f"Delete the tokens of provider {provider!r}, user {user!r}? The refresh token cannot be got back."
        if not typer.confirm(question, err=True):
            raise typer.Exit(NOT_FOUND)

    async def remove() -> bool:
        async with _open(settings, needs_keys=False) as store:
            return await store.delete_tokens(provider, user)

    if not _run(remove()):
        _not_found(provider, user)
    if settings.as_json:
        _say_json({"provider": provider, "user_id": user, "deleted": True})
    else:
        _say("deleted")


@app.command("refresh-due")
def refresh_due(
    ctx: typer.Context,
    within: Annotated[
        str, typer.Option(metavar="TIME", help="Refresh what expires within this time: 90s, 10m, 2h, 1d.")
    ] = "10m",
    provider: Annotated[str | None, typer.Option(metavar="PROVIDER", help="Only this provider's rows.")] = None,
    refreshers: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:NAME",
            show_default=False,
            help="A mapping from each provider's name to what refreshes its tokens, as open_store takes it; the module "
            f"is looked for here, too. Default: ${REFRESHERS_VARIABLE}.",
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1000, help="The most refreshes at a time.")] = 8,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Refresh the tokens that expire soon. Several machines may do so at once: each row is refreshed by one of them."""
    settings = _settings(ctx, url, as_json)
    seconds = _seconds(within)
    mapping = _import_refreshers(refreshers or os.environ.get(REFRESHERS_VARIABLE))

    async def run() -> Counter[str]:
        outcomes: Counter[str] = Counter()
        async with _open(settings, needs_keys=True, refreshers=mapping) as store:
            # For the bar alone; what is due is decided row by row.
            horizon = datetime.now(UTC) + timedelta(seconds=seconds)
            due = 0
            async for entry in store.list_tokens(provider=provider):
                expires_at = entry["access_token_expires_at"]
                due += (
                    entry["has_refresh_token"]
                    and entry["provider"] in mapping
                    and expires_at is not None
                    and expires_at <= horizon
                )
            with _progress(due) as advance:
                async for result in store.refresh_due(within=seconds, provider=provider, concurrency=concurrency):
                    outcomes[result.outcome] += 1
                    advance()
                    if settings.as_json:
                        error = None if result.error is None else str(result.error)
                        key = {"provider": result.provider, "user_id": result.user_id}
                        _say_json({**key, "outcome": result.outcome, "error": error})
                    elif result.error is not None:
                        _fail(_plain(str(result.error)))
        return outcomes

    outcomes = _run(run())
    if not settings.as_json:
        words = {"not_due": "refreshed by others", "busy": "left to others", "gone": "deleted meanwhile"}
        _say(", ".join(f"{count} {words.get(name, name)}" for name, count in sorted(outcomes.items())) or "nothing due")
    raise typer.Exit(PROVIDER if outcomes["failed"] else 0)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhd]?)", text, re.ASCII)
    if match is None:
        raise InvalidInputError("--within must be a time such as 90s, 10m, 2h or 1d")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def _import_refreshers(target: str | None) -> Mapping[str, Refresh]:
    module, colon, name = (target or "").partition(":")
    if not module or not colon or not name:
        raise ConfigurationError(f"who refreshes? Set {REFRESHERS_VARIABLE} or give --refreshers, as MODULE:NAME")
    sys.path.insert(0, str(Path.cwd()))
    failure = None
    try:
        found: object = getattr(import_module(module), name)
    except Exception as error:  # noqa: BLE001 - it is somebody's module; its text may hold a secret
        failure, found = type(error).__name__, None
    if failure is not None:
        raise ConfigurationError(f"{target} cannot be imported ({failure}); try: python -c 'import {module}'")
    if not isinstance(found, Mapping) or not all(isinstance(key, str) and callable(found[key]) for key in found):
        raise ConfigurationError(f"{target} must be a mapping from providers' names to callables")
    return found


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


@app.command()
def demo(
    ctx: typer.Context,
    processes: Annotated[int, typer.Option(min=2, max=16, help="Worker processes.")] = 8,
    tasks: Annotated[int, typer.Option(min=1, max=200, help="Tasks in each process.")] = 25,
    latency: Annotated[float, typer.Option(min=0.0, max=5.0, help="Seconds the provider takes to answer.")] = 0.5,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """See many processes find one expired token at once, in three rounds: load_fresh_tokens, the row lock, neither.

    Everything is its own: a strict provider on loopback, a key, and a table that is dropped at the end. The database is
    a temporary SQLite file, or the one that --url names; TOKENSTORE_URL is not looked at.
    """
    settings = _settings(ctx, url, as_json)
    from tokenstore.demo import run_demo

    report = run_demo(settings.url, processes=processes, tasks=tasks, latency=latency, quiet=settings.as_json)
    if settings.as_json:
        _say_json(report.as_dict())
    raise typer.Exit(0 if report.passed else 1)
