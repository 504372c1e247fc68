"""The settings of a store among the settings of a web application."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import quote

from tokenstore import sync
from tokenstore.errors import ConfigurationError, RefreshError
from tokenstore.keyring import Keyring
from tokenstore.store import AuthTokenStore, open_store
from tokenstore.tracebacks import clears_locals

if TYPE_CHECKING:
    from tokenstore.refresh.attempt import Refresh

__all__ = ["SETTINGS", "StoreSettings", "login_place", "read_settings"]

SETTINGS: Final = ("KEYS", "KEYS_FILE", "NAMESPACE", "OPTIONS", "REFRESHERS", "URL")
"""The names of the settings, without the prefix or the mapping that a framework puts them in."""

_CALLBACKS: Final = ("on_refreshed", "on_reauthorization_required", "on_recovered", "on_error")
# Settings of their own, and what a settings module cannot have.
_NO_OPTIONS: Final = frozenset({"clock", "keyring", "namespace", "refreshers", "target", "url"})


@dataclass(frozen=True)
class StoreSettings:
    """What a store is opened with. Nothing was connected yet.

    Attributes:
        url: The database's URL.
        keyring: The keys.
        namespace: The namespace.
        refreshers: For each provider's name a refresher.
        options: Other keyword arguments of ``open_store``.
    """

    url: str = field(repr=False)
    keyring: Keyring
    namespace: str
    refreshers: Mapping[str, Refresh]
    options: Mapping[str, Any] = field(repr=False)  # may have a password

    @clears_locals
    def open(
        self,
        *,
        url: str | None = None,
        namespace: str | None = None,
        refreshers: Mapping[str, Refresh] | None = None,
    ) -> AuthTokenStore:
        """Open an async store. An argument takes the place of its setting.

        Raises:
            ConfigurationError: The URL or an option is not acceptable, or a driver is missing.
            InvalidInputError: The namespace or a refresh setting is not acceptable.
        """
        return open_store(
            self.url if url is None else url,
            keyring=self.keyring,
            namespace=self.namespace if namespace is None else namespace,
            refreshers=self.refreshers if refreshers is None else refreshers,
            **self.options,
        )

    @clears_locals
    def open_sync(self) -> sync.AuthTokenStore:
        """Open a store without ``await``.

        Raises:
            ConfigurationError: The URL or an option is not acceptable, or a driver is missing.
            InvalidInputError: The namespace or a refresh setting is not acceptable.
        """
        return sync.open_store(
            self.url, keyring=self.keyring, namespace=self.namespace, refreshers=self.refreshers, **self.options
        )


@clears_locals
def read_settings(values: Mapping[str, object], named: Callable[[str], str]) -> StoreSettings:
    """Read and check the settings. An absent one, and None, stand for the default.

    Args:
        values: By the names of :data:`SETTINGS`; others are not looked at.
        named: How the application writes the setting of a name, for error messages.

    Raises:
        ConfigurationError: A setting is missing or not acceptable. The message does not show its value.
    """
    url = values.get("URL")
    if url is None or url == "":
        raise ConfigurationError(f"{named('URL')} is not set: it is the URL of the database, such as postgresql://…")
    return StoreSettings(
        _text(url, named("URL")),
        _keyring(values, named),
        _text(values.get("NAMESPACE") or "", named("NAMESPACE")),
        _refreshers(values.get("REFRESHERS"), named("REFRESHERS")),
        _options(values.get("OPTIONS"), named("OPTIONS")),
    )


def login_place(template: str, error: RefreshError) -> str | None:
    """Where the user logs in at the provider.

    Args:
        template: A path or URL, in which ``{provider}`` is replaced by the provider's name.
        error: The error. One that a refresher raised in a call of its own names no provider.

    Returns:
        The path or URL; None if it needs a name, and the error has none.
    """
    if "{provider}" not in template:
        return template
    return None if error.provider is None else template.replace("{provider}", quote(error.provider, safe=""))


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ConfigurationError(f"{name} must be a str")
    return value


def _keyring(values: Mapping[str, object], named: Callable[[str], str]) -> Keyring:
    keys, path = values.get("KEYS"), values.get("KEYS_FILE")
    if keys is not None and path is not None:
        raise ConfigurationError(f"both {named('KEYS')} and {named('KEYS_FILE')} are set; remove one of them")
    if isinstance(keys, Keyring):
        return keys
    if keys is not None:
        return Keyring.from_string(_text(keys, named("KEYS")), source=named("KEYS"))
    if path is None:
        return Keyring.from_env()
    if not isinstance(path, str | PathLike):
        raise ConfigurationError(f"{named('KEYS_FILE')} must be a path")
    return Keyring.from_file(cast("str | PathLike[str]", path))


def _refreshers(value: object, name: str) -> Mapping[str, Refresh]:
    found = _imported(value, name) if isinstance(value, str) else value
    if found is None:
        return {}
    if not isinstance(found, Mapping) or not all(isinstance(key, str) and callable(found[key]) for key in found):
        raise ConfigurationError(
            f"{name} must be a mapping from providers' names to refreshers, or the dotted path of one"
        )
    return found


def _options(value: object, name: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigurationError(f"{name} must be a dict of keyword arguments of open_store")
    if wrong := sorted(_NO_OPTIONS & value.keys()):
        raise ConfigurationError(f"{name} cannot have {', '.join(wrong)}")
    options = dict(value)
    for callback in _CALLBACKS:
        if isinstance(path := options.get(callback), str):
            options[callback] = _imported(path, f"{name}, {callback},")
    return options


def _imported(path: str, name: str) -> object:
    """The object that a dotted path names, such as ``project.tokens.REFRESHERS``."""
    module, _, attribute = path.rpartition(".")
    failure = None if module else "it names no module"
    if failure is None:
        try:
            found: object = getattr(import_module(module), attribute)
        except Exception as error:  # noqa: BLE001 - the module may raise anything, and its text may hold a secret
            failure, found = type(error).__name__, None
    else:
        found = None
    if failure is not None:
        raise ConfigurationError(f"{name} is {path!r}, which cannot be imported ({failure})")
    return found
