"""Options that several commands have, and the store that they name."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final, Protocol, TypeVar

import typer

from tokenstore.errors import ConfigurationError
from tokenstore.keyring import KEYS_VARIABLE, Keyring
from tokenstore.store import AuthTokenStore, open_store

if TYPE_CHECKING:
    from tokenstore.refresh.attempt import Refresh

__all__ = [
    "NAMESPACE_VARIABLE",
    "URL_VARIABLE",
    "AccountOption",
    "Application",
    "CommonOptions",
    "JsonOption",
    "NamespaceOption",
    "ProviderArgument",
    "UrlOption",
    "UserArgument",
    "common_options",
    "has_keys",
    "open_from_options",
    "run_async",
]

T = TypeVar("T")

URL_VARIABLE: Final = "TOKENSTORE_URL"
"""The environment variable with the database's URL."""

NAMESPACE_VARIABLE: Final = "TOKENSTORE_NAMESPACE"
"""The environment variable with the store's namespace."""

UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        show_default=False,
        help=f"The database: postgresql://…, mysql://…, sqlite:///file. Default: ${URL_VARIABLE}, which `ps` does not "
        "show to other users. Options such as the table's name go into the URL's query: ?table=NAME.",
    ),
]
"""``--url``."""

NamespaceOption = Annotated[
    str | None,
    typer.Option(
        "--namespace",
        metavar="NAME",
        show_default=False,
        help=f"The namespace that your application passes to its store. Default: ${NAMESPACE_VARIABLE}, or none.",
    ),
]
"""``--namespace``."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
"""``--json``."""

ProviderArgument = Annotated[str, typer.Argument(metavar="PROVIDER", help="The provider's name, such as github.")]
"""The first part of a row's key."""

UserArgument = Annotated[str, typer.Argument(metavar="USER", help="The user's id.")]
"""The second part of a row's key."""

AccountOption = Annotated[
    str,
    typer.Option(
        "--account",
        metavar="ACCOUNT",
        show_default=False,
        help="Which of the user's accounts at the provider; default: the empty name, for a user who has one.",
    ),
]
"""The third part of a row's key."""


class Application(Protocol):
    """An application whose own settings name the store, so that no option has to: ``manage.py tokenstore``."""

    @property
    def url(self) -> str:
        """The URL of the database."""
        ...

    @property
    def refreshers(self) -> Mapping[str, Refresh]:
        """For each provider's name a refresher."""
        ...

    def open(
        self,
        *,
        url: str | None = None,
        namespace: str | None = None,
        refreshers: Mapping[str, Refresh] | None = None,
    ) -> AuthTokenStore:
        """Open the store. An argument takes the place of the application's own setting."""
        ...


@dataclass(frozen=True, slots=True)
class CommonOptions:
    """``--url``, ``--json`` and ``--namespace``, which may stand before or after the command's name.

    Attributes:
        application: Returns the settings of the application that runs the command, if one does.
    """

    url: str | None = field(default=None, repr=False)
    as_json: bool = False
    namespace: str | None = None
    application: Callable[[], Application] | None = None


def common_options(ctx: typer.Context, url: str | None, as_json: bool, namespace: str | None = None) -> CommonOptions:
    """Merge the options after the command's name with those before it; the former win."""
    outer = ctx.obj if isinstance(ctx.obj, CommonOptions) else CommonOptions()
    return CommonOptions(
        outer.url if url is None else url,
        as_json or outer.as_json,
        outer.namespace if namespace is None else namespace,
        outer.application,
    )


def open_from_options(
    options: CommonOptions, *, needs_keys: bool, refreshers: Mapping[str, Refresh] | None = None
) -> AuthTokenStore:
    """Open the store that the options and the environment name, or the application's settings.

    Args:
        options: The command's options.
        needs_keys: Whether the command seals or opens tokens. If not, it works without ``TOKENSTORE_KEYS``.
        refreshers: As for :func:`tokenstore.open_store`.

    Raises:
        ConfigurationError: There is no URL, or no key, or one that is not acceptable.
        InvalidInputError: The namespace is not acceptable.
    """
    application = None if options.application is None else options.application()
    url = options.url or (os.environ.get(URL_VARIABLE) if application is None else application.url)
    if not url:
        raise ConfigurationError(f"no database URL: pass --url or set {URL_VARIABLE}")
    if url.lower().startswith("memory:"):
        instead = f"set {URL_VARIABLE}" if application is None else "change the setting of the application"
        raise ConfigurationError(f"memory:// does not outlive this command: pass another --url or {instead}")
    if application is not None:
        return application.open(url=url, namespace=options.namespace, refreshers=refreshers)
    keyring = None
    if not needs_keys and not has_keys(options):
        keyring = Keyring({"unused": os.urandom(32)})  # a store needs a keyring; this one seals and opens nothing
    namespace = options.namespace
    if namespace is None:
        namespace = os.environ.get(NAMESPACE_VARIABLE, "")
    return open_store(url, keyring=keyring, namespace=namespace, refreshers=refreshers)


def has_keys(options: CommonOptions) -> bool:
    """Whether there are keys: ``TOKENSTORE_KEYS`` is set, or an application has them in its settings."""
    return options.application is not None or bool(os.environ.get(KEYS_VARIABLE))


def run_async(operation: Coroutine[Any, Any, T]) -> T:
    """Run a command's work in an event loop."""
    import asyncio  # imported here: the help does not need it, and importing it takes as long as importing the store

    return asyncio.run(operation)
