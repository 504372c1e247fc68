"""The app's configuration, which Django finds by the name of the package."""

from __future__ import annotations

from django.apps import AppConfig
from django.core import checks

from tokenstore.integrations.django.checks import check_settings

__all__ = ["TokenStoreConfig"]


class TokenStoreConfig(AppConfig):  # type: ignore[misc]
    """The app ``tokenstore``. It has no models."""

    name = "tokenstore.integrations.django"
    label = "tokenstore"
    verbose_name = "OAuth tokens"

    def ready(self) -> None:
        """Register the check of the settings. Nothing is connected, and the setting is not read."""
        checks.register(check_settings, "tokenstore")
