"""Django's setting ``TOKENSTORE``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from django.conf import settings
from django.urls import reverse

from tokenstore.errors import ConfigurationError
from tokenstore.integrations._settings import SETTINGS, StoreSettings, login_place, read_settings
from tokenstore.tracebacks import clears_locals

if TYPE_CHECKING:
    from django.http import HttpRequest

    from tokenstore.errors import RefreshError

__all__ = ["LoginUrl", "login_path", "login_pattern", "login_url", "store_settings"]

LoginUrl = Callable[["HttpRequest", "RefreshError"], "str | None"]
"""Says where the user of a request logs in at the provider of an error."""

_LOGIN_URL: Final = "LOGIN_URL"


@clears_locals
def store_settings() -> StoreSettings:
    """Read and check the setting. It imports the refreshers.

    Raises:
        ConfigurationError: The setting is missing or not acceptable.
    """
    _ = login_url()
    return read_settings(_setting(), _named)


@clears_locals
def login_url() -> LoginUrl | None:
    """Where users log in: a function of the request and the error, or None if the setting has no ``LOGIN_URL``.

    Raises:
        ConfigurationError: The setting is not acceptable.
    """
    value = _setting().get(_LOGIN_URL)
    if value is None:
        return None
    if callable(value):
        return cast(LoginUrl, value)
    if not isinstance(value, str):
        raise ConfigurationError(
            f"{_named(_LOGIN_URL)} must be a path, a URL, a URL pattern's name, or a function of request and error"
        )
    if login_pattern() is None:
        return lambda _request, error: login_place(value, error)
    return lambda _request, error: None if error.provider is None else login_path(value, error.provider)


def login_pattern() -> str | None:
    """The name of a URL pattern in ``LOGIN_URL``; None if it is anything else. A name has no slash."""
    value = _setting().get(_LOGIN_URL)
    return value if isinstance(value, str) and "/" not in value else None


def login_path(pattern: str, provider: str) -> str:
    """The path of a URL pattern that takes a provider's name.

    Raises:
        NoReverseMatch: There is none.
    """
    return cast(str, reverse(pattern, args=[provider]))


def _setting() -> Mapping[str, Any]:
    value = getattr(settings, "TOKENSTORE", None)
    if not isinstance(value, Mapping):
        raise ConfigurationError("the setting TOKENSTORE must be a dict" + " and is missing" * (value is None))
    if unknown := sorted(str(name) for name in value.keys() - {*SETTINGS, _LOGIN_URL}):
        known = ", ".join(sorted((*SETTINGS, _LOGIN_URL)))
        raise ConfigurationError(f"the setting TOKENSTORE has no {', '.join(unknown)}; it has {known}")
    return value


def _named(name: str) -> str:
    return f'TOKENSTORE["{name}"]'
