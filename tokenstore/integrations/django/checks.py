"""The system check of the setting ``TOKENSTORE``, which ``manage.py check`` and ``runserver`` run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from django.core.checks import CheckMessage, Error, Warning  # noqa: A004 - Django's names
from django.urls import NoReverseMatch

from tokenstore.errors import TokenStoreError
from tokenstore.integrations.django.settings import login_path, login_pattern, store_settings

__all__ = ["check_settings"]


def check_settings(**_kwargs: Any) -> list[CheckMessage]:
    """Check the setting, and import the refreshers. Nothing is connected.

    Returns:
        ``tokenstore.E001``: no store can be opened with the setting. ``tokenstore.E002``: ``LOGIN_URL`` names no URL
        pattern that takes a provider's name. ``tokenstore.W001``: the URL is ``memory://``.
    """
    try:
        settings = store_settings()
        _ = settings.open()  # connects nothing, so there is nothing to close
    except TokenStoreError as error:
        return [Error(str(error), id="tokenstore.E001")]
    found: list[CheckMessage] = []
    if settings.url.lower().startswith("memory:"):
        found.append(
            Warning(
                "each process, and each event loop, has a memory:// store of its own",
                hint="Use memory:// in tests of def views alone.",
                id="tokenstore.W001",
            )
        )
    pattern = login_pattern()
    if pattern is not None:
        found += _login_problems(pattern, settings.refreshers)
    return found


def _login_problems(pattern: str, providers: Iterable[str]) -> Iterator[CheckMessage]:
    for provider in sorted(providers):
        try:
            _ = login_path(pattern, provider)
        except NoReverseMatch:
            yield Error(
                f'TOKENSTORE["LOGIN_URL"] is {pattern!r}, and no URL pattern of this name takes {provider!r}',
                hint=f"Such a pattern is path('connect/<provider>/', view, name={pattern!r}).",
                id="tokenstore.E002",
            )
            return
